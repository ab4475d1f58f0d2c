"""Batch norm's statistics as plain images give them, taken again after training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.detectors.detector import Detector


@torch.no_grad()
def recompute_statistics(
    detector: Detector, parts: Sequence[str], batches: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> int:
    """Running mean and variance of the batch norms in ``parts``, over ``batches`` alone, each counting the same.

    Methods that train on augmented views of several sizes leave averages over all of these behind, which fit none of
    them, least of all plain images. Fine-tuning forgets them, but frozen features are only as good as they are.
    detectron2 calls this precise batch norm.

    Args:
        parts: names of parts of the detector; those that no image passes through here keep what they have.
        batches: images (B, 3, H, W) uint8, boxes (B, K, 4) xyxy px, and sizes (B, 2), height and width without padding.

    Returns:
        How many batch norms were looked at.
    """
    layers = [m for part in parts for m in detector.parts[part].modules() if isinstance(m, _BatchNorm)]
    layers = [layer for layer in dict.fromkeys(layers) if layer.track_running_stats]
    if not layers:
        return 0
    device = next(detector.parameters()).device
    training = {module: module.training for module in detector.modules()}
    detector.eval()
    with _averaging(layers):
        for images, boxes, sizes in batches:
            features = detector.features(images.to(device), sizes=sizes)
            if "pool" in detector.abilities and "head" in parts:
                detector.embed(features, boxes.to(device), (images.shape[-2], images.shape[-1]))
    for module, mode in training.items():
        module.training = mode
    return len(layers)


@contextlib.contextmanager
def _averaging(layers: Sequence[nn.Module]) -> Iterator[None]:
    """``layers`` in training, from fresh statistics, with plain averages over batches; others as they are."""
    before = [(layer, layer.momentum, {k: v.clone() for k, v in layer.named_buffers()}) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    whole = False
    try:
        yield
        whole = True
    finally:
        for layer, momentum, buffers in before:
            layer.momentum = momentum
            if not whole or not int(layer.num_batches_tracked):  # or nothing came by
                layer.load_state_dict(buffers, strict=False)
