"""Maps of a backbone other than those its detector works on: ResNet's ``layer2`` (C3), where a DETR sees C5 alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from headstart.detectors import backbones
from headstart.detectors.builders.backbones import Composite, channels_first
from headstart.errors import SettingsError

TRIAL_PX = (288, 352)  # multiples of every stride, and of each other's not


@dataclass(frozen=True)
class StageMap:
    """Where a map comes from.

    Attributes:
        layer: name of the submodule of the body that gives it; None: the body itself, its last map.
        width: channels.
    """

    layer: str | None
    width: int


class _ReachedError(Exception):
    """Thrown by a hook: what follows in the backbone need not be computed."""


def find(body: nn.Module, stage: int | None) -> StageMap:
    """The last layer whose map has stride ``2 ** stage``; None: the last map ``body`` gives.

    Found by a run on the meta device: no memory, no time, and nothing in ``body`` changes.

    Raises:
        SettingsError: there is no such layer.
    """
    images = torch.empty(1, 3, *TRIAL_PX, device="meta")
    state = {name: value.to("meta") for name, value in body.state_dict(keep_vars=True).items()}
    layers = {id(layer): layer for group in backbones.stages(body) for layer in group}
    names = {id(module): name for name, module in body.named_modules()}
    seen: list[tuple[str, Tensor]] = []

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            seen.append((names[id(layer)], _oriented(body, output)))

    hooks = [layer.register_forward_hook(note) for layer in layers.values()]
    try:
        with torch.no_grad():
            output = functional_call(body, state, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    if stage is None:
        last = output if isinstance(output, Tensor) else list(output.values())[-1]
        return StageMap(None, last.shape[1])
    side = TRIAL_PX[0] // 2**stage
    fitting = [(name, map_) for name, map_ in seen if map_.shape[2] == side]
    if not fitting:
        strides = sorted({TRIAL_PX[0] // map_.shape[2] for _, map_ in seen})
        raise SettingsError(
            f"this backbone has no layer whose map has stride {2**stage} (C{stage}); it has strides {strides}"
        )
    name, map_ = fitting[-1]
    return StageMap(name, map_.shape[1])


def run(body: nn.Module, images: Tensor, found: StageMap) -> Tensor:
    """(B, C, h, w) of ``images`` as ``body`` takes them; layers behind the map are not run."""
    if found.layer is None:
        output = body(images)
        return output if isinstance(output, Tensor) else list(output.values())[-1]
    with _caught(body.get_submodule(found.layer)) as caught, suppress(_ReachedError):
        body(images)
    return _oriented(body, caught[0])


@contextmanager
def _caught(layer: nn.Module) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def stop(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(output)
        raise _ReachedError

    hook = layer.register_forward_hook(stop)
    try:
        yield found
    finally:
        hook.remove()


def _oriented(body: nn.Module, map_: Tensor) -> Tensor:
    while isinstance(body, Composite):
        body = body.lead
    return channels_first(body, map_)
