"""The registry of detector families: one file a family, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from headstart.errors import SettingsError

if TYPE_CHECKING:
    from torch import nn

    from headstart.detectors.detector import Detector, DetectorSettings

FAMILIES = {
    "faster_rcnn": "headstart.detectors.rcnn:RCNN",
    "mask_rcnn": "headstart.detectors.rcnn:RCNN",
    "cascade_rcnn": "headstart.detectors.cascade_rcnn:CascadeRCNN",
    "retinanet": "headstart.detectors.retinanet:RetinaNet",
    "fcos": "headstart.detectors.fcos:FCOS",
    "detr": "headstart.detectors.detr:DETR",
    "deformable_detr": "headstart.detectors.deformable_detr:DeformableDETR",
}


def family(name: str) -> type[Detector]:
    """Raises: SettingsError for an unknown family, with the known ones."""
    if name not in FAMILIES:
        raise SettingsError(f"--detector {name}: not known; choose one of {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(module), attribute)


def settings_type(name: str) -> type[DetectorSettings]:
    return family(name).settings_type  # type: ignore[attr-defined,no-any-return]


def build(settings: DetectorSettings) -> Detector:
    """A detector with random weights."""
    return family(settings.name).build(settings)


def parse_settings(values: Mapping[str, Any]) -> DetectorSettings:
    from headstart.settings import validate

    return validate(settings_type(str(values.get("name", "faster_rcnn"))), values, "detector settings")


def wrap(module: nn.Module) -> Detector:
    """A user's own detector object as it is.

    Raises:
        SettingsError: no family here knows such an object.
    """
    from headstart.detectors.detector import Detector

    if isinstance(module, Detector):
        return module
    for name in dict.fromkeys(FAMILIES):
        cls = family(name)
        if cls.accepts(module):
            return cls(module, None)
    raise SettingsError(
        f"{type(module).__name__}: not a detector of a known family ({', '.join(FAMILIES)}); "
        "expected a torchvision FasterRCNN, MaskRCNN, RetinaNet or FCOS, what headstart.detectors.builders build, "
        "or a Headstart detector"
    )
