"""The registry of pretraining methods: one file a paper, one line here. Nothing else names a method."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from headstart.errors import SettingsError

if TYPE_CHECKING:
    from headstart.methods.method import Method

METHODS = {
    "soco": "headstart.methods.soco:SoCo",
}
SUMMARIES = {  # for `headstart pretrain --help`, which must not import torch
    "soco": "Object-level BYOL on Selective Search boxes: backbone, FPN and box head (Wei et al., NeurIPS 2021)",
}


def method_type(name: str) -> type[Method]:
    """Raises: SettingsError for an unknown method, with the known ones."""
    if name not in METHODS:
        raise SettingsError(f"method {name!r}: not known; choose one of {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
