"""timm: the backbone alone, under the names of ``timm.create_model(NAME, num_classes=0)``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor

from headstart.detectors.backbones import own_names
from headstart.detectors.formats.renaming import Translated, is_resnet, refuse_composite, timm_name
from headstart.errors import SettingsError, WeightsError

NAME = "timm"
BODY = "backbone.body."


def from_torchvision(state: Mapping[str, Tensor], backbone: str) -> Translated:
    """The backbone of a detector for timm's network of that name.

    A C4 detector's 5th block, which is its head, counts to the backbone. What timm's network has after its last
    stage (a last norm, a last convolution) is not part of a detector and shows in ``missing``.

    Raises:
        SettingsError: timm has no such network, or the detector's is built otherwise.
    """
    refuse_composite(state, NAME)
    full = full_names(backbone)
    own = own_names(state)
    inner = {name: state[key] for key, name in own.items()}
    others = [key for key in state if key not in own]
    strange = [key for key in inner if key not in full]
    if strange:
        raise SettingsError(f"--to {NAME}: timm's {backbone} has no {', '.join(strange[:3])}")
    made = {full[key]: value for key, value in inner.items()}
    counters = ("num_batches_tracked",)  # which torch does without
    missing = [name for name in dict.fromkeys(full.values()) if name not in made and not name.endswith(counters)]
    return Translated(made, {"other parts than the backbone": others} if others else {}, missing=missing)


def to_torchvision(state: Mapping[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """The inverse of :func:`from_torchvision`, as the backbone below a pyramid (``backbone.body.``).

    Raises:
        WeightsError: there are keys that timm's network does not have, but for its classifier.
    """
    features = features_names(backbone)
    own = set(full_names(backbone).values())
    classifier = timm.create_model(timm_name(backbone, NAME), pretrained=False).default_cfg["classifier"]
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    strange = [name for name in state if name not in own and not name.startswith(heads)]
    if strange:
        raise WeightsError(f"timm weights: {backbone} has no {', '.join(strange[:3])}")
    return {BODY + features[name]: value for name, value in state.items() if name in features}


def full_names(backbone: str) -> dict[str, str]:
    """Name in a detector -> name in timm's whole network.

    A torchvision ResNet's are the same. Others come with ``features_only=True``, for which timm takes networks apart,
    so that ``stages.0`` becomes ``stages_0``, or where it can't wraps them whole, as ``model`` or ``body``.

    Raises:
        SettingsError: timm has no such network.
    """
    names = list(timm.create_model(timm_name(backbone, NAME), pretrained=False, num_classes=0).state_dict())
    found = {name: name for name in names}
    if not is_resnet(backbone):
        found |= {re.sub(r"^([a-z]\w*)\.(\w+)\.", r"\1_\2.", name): name for name in names}
        found |= {f"{wrapper}.{name}": name for wrapper in ("model", "body") for name in names}
    return found


def features_names(backbone: str) -> dict[str, str]:
    """Name in timm's whole network -> name in a detector, for what a detector has."""
    full = full_names(backbone)
    if is_resnet(backbone):
        return {name: name for name in full}
    features = timm.create_model(timm_name(backbone, NAME), pretrained=False, features_only=True)
    return {full[name]: name for name in features.state_dict() if name in full}


def model_settings(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Images as the backbone saw them: RGB, in [0, 1] before this."""
    return {name.removeprefix("image_"): settings[name] for name in ("image_mean", "image_std") if name in settings}


def torch_file(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A plain state dictionary."""
    return dict(state)


def loading(file: str) -> str:
    reader = "torch.load" if file.endswith(".pth") else "safetensors.torch.load_file"
    return f'model.load_state_dict({reader}("{file}"), strict=False)'
