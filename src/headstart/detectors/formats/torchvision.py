"""torchvision: the names a run folder holds already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headstart.detectors.formats.renaming import Translated


def from_torchvision(state: Mapping[str, Tensor], backbone: str) -> Translated:
    return Translated(dict(state))


def to_torchvision(state: Mapping[str, Tensor], backbone: str) -> dict[str, Tensor]:
    return dict(state)


def model_settings(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def torch_file(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A plain state dictionary."""
    return dict(state)


def loading(file: str) -> str:
    if file.endswith(".pth"):
        return f'detector.load_state_dict(torch.load("{file}", weights_only=True), strict=False)'
    return f'detector.load_state_dict(safetensors.torch.load_file("{file}"), strict=False)'
