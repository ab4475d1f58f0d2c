"""The registry of pretraining methods: one file a paper, one line here. Nothing else names a method."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from headstart.errors import SettingsError

if TYPE_CHECKING:
    from headstart.methods.method import Method

METHODS = {
    "soco": "headstart.methods.soco:SoCo",
    "adept": "headstart.methods.adept:ADePT",
    "aligndet": "headstart.methods.aligndet:AlignDet",
    "detreg": "headstart.methods.detreg:DETReg",
    "updetr": "headstart.methods.updetr:UPDETR",
    "proseco": "headstart.methods.proseco:ProSeCo",
    "joindet": "headstart.methods.joindet:JoinDet",
}
SUMMARIES = {  # for `headstart pretrain --help`, which must not import torch
    "soco": "Object-level BYOL on Selective Search boxes: backbone, FPN and box head (Wei et al., NeurIPS 2021)",
    "adept": "SoCo plus the RPN, jointly or on top of a SoCo run (Dong et al., 2022)",
    "aligndet": "Neck and heads of any detector, on a frozen backbone: box contrast and regression (Li et al., 2023)",
    "detreg": "DETR and its kin find Selective Search's boxes, and say what a backbone says of them (Bar et al., 2022)",
    "updetr": "DETR and its kin find random patches that their queries are told of (Dai et al., 2021)",
    "proseco": "All of a detector with queries, on a frozen backbone: proposal contrast (Bouniot et al., ICLR 2023)",
    "joindet": "DETR and its kin find what stands out in their own maps, over and over (Wang et al., NeurIPS 2022)",
}


def table() -> list[list[str]]:
    """Which method pretrains which detector: a header, and a row a detector family, "yes" or ""."""
    from headstart.detectors import FAMILIES

    return [["", *METHODS], *([name, *("yes" if goes_with(m, name) else "" for m in METHODS)] for name in FAMILIES)]


def goes_with(method: str, detector: str) -> bool:
    """Whether detectors of this family can do what the method needs."""
    from headstart.detectors import family

    return method_type(method).needs.keys() <= family(detector).abilities


def method_type(name: str) -> type[Method]:
    """Raises: SettingsError for an unknown method, with the known ones."""
    if name not in METHODS:
        raise SettingsError(f"method {name!r}: not known; choose one of {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
