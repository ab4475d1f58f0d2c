"""Which network a backbone name means."""

from __future__ import annotations

from collections.abc import Sequence

import torchvision

from headstart.detectors.builders.backbones import resnet_body
from headstart.detectors.plain_code import Call
from headstart.errors import SettingsError


def resnets() -> list[str]:
    return torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])


def body(name: str, stages: Sequence[int]) -> Call:
    """The network that gives maps C2 (stride 4) .. C5 (stride 32), those in ``stages``.

    Raises:
        SettingsError: no such backbone.
    """
    if name in resnets():
        return Call(resnet_body, {"name": name, "stages": tuple(stages)})
    raise SettingsError(f"--backbone {name}: not known; choose one of {', '.join(resnets())}")
