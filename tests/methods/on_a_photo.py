"""What tests of several methods start from: boxes on the photo, batches of its views, the smallest transformer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from headstart.methods.method import ViewBatch, collate_views

BOXES = np.array([[4, 4, 40, 36], [20, 10, 70, 55], [0, 0, 80, 60], [50, 30, 78, 58], [10, 20, 30, 50]], np.float32)
TRANSFORMER = {
    "backbone": "resnet18",
    "width": 16,
    "heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward": 16,
    "short_side_px": 64,
    "long_side_px": 96,
    "dropout": 0.0,
}


@dataclass
class Views:
    """A batch as the engine hands it over."""

    views: list[ViewBatch]


def batch(method, photo, boxes=BOXES, count: int = 2) -> list[ViewBatch]:
    """The photo's views, drawn ``count`` times."""
    drawn = [method.views(photo, boxes, np.random.default_rng(i)) for i in range(count)]
    return collate_views(drawn, method.multiple_px)


def two_sizes(method, photo, boxes=BOXES, counts=(3, 2)) -> list[ViewBatch]:
    """The photo and a part of it, padded together, with so many of the boxes each."""
    photos = [photo, photo[:, :50]]
    samples = [method.views(photos[i % 2], boxes[:n], np.random.default_rng(i)) for i, n in enumerate(counts)]
    return collate_views(samples, method.multiple_px)


def assert_finite_and_all_learn(model, views) -> None:
    """Losses are finite, and so is a gradient of every parameter that learns."""
    terms = model(Views(views))
    assert all(torch.isfinite(term) for term in terms.values()), terms
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
