"""What DETR and Deformable DETR share: attention, positions, heads, and the way from images to detections.

Images of a batch are padded at the right and the bottom; ``sizes`` (B, 2) are their heights and widths without that,
and None where no image is padded, which saves the masks. Boxes (..., 4) are centre, width and height, in shares of an
image without its padding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class Answers(NamedTuple):
    """What the N queries answer for B images, after each of L decoder layers."""

    hidden: Tensor  # (L, B, N, D)
    boxes: Tensor  # (L, B, N, 4)
    memory: list[Tensor]  # of the encoder, finest map first, (B, D, h, w)
    valid: list[Tensor]  # (B, h, w) bool, not padding
    first: tuple[Tensor, Tensor] | None = None  # two-stage: logits (B, S, 1) and boxes (B, S, 4) of the S cells


class Backbone(nn.Module):
    """``body``: image -> maps, finest first, with their widths in ``body.channels``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.body(images)


class MLP(nn.Module):
    """Linear layers with ReLUs between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Attention(nn.Module):
    """``nn.MultiheadAttention`` on (B, N, D), with the same weights under the same names.

    A mask is True where a query may look, and broadcasts to (B, heads, N, M).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        width = query.shape[-1]
        weights, biases = self.in_proj_weight, self.in_proj_bias
        if query is key:
            q, k = F.linear(query, weights[: 2 * width], biases[: 2 * width]).chunk(2, dim=-1)
        else:
            q = F.linear(query, weights[:width], biases[:width])
            k = F.linear(key, weights[width : 2 * width], biases[width : 2 * width])
        v = F.linear(value, weights[2 * width :], biases[2 * width :])
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FeedForwardLayer(nn.Module):
    """What every layer of an encoder or decoder ends with: ``linear1``, ReLU, ``linear2``."""

    def __init__(self, width: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.drop = nn.Dropout(dropout)

    def feed(self, x: Tensor) -> Tensor:
        return self.drop(self.linear2(self.drop(F.relu(self.linear1(x)))))


class Stack(nn.Module):
    """Layers of one kind, and a norm behind the last one, if any; their owner runs them."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm


def xavier(module: nn.Module) -> None:
    """Glorot's uniform distribution for all weights of two dimensions and more, as both papers' code has it."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def waves(places: Tensor, width: int) -> Tensor:
    """(...) angles -> (..., width): sine and cosine in turn, at wavelengths from 1 to 10 000."""
    steps = torch.arange(width, device=places.device, dtype=torch.float32)
    angles = places[..., None] / 10000 ** (2 * torch.div(steps, 2, rounding_mode="floor") / width)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def covered(sizes: Tensor, full: tuple[int, int], sides: tuple[int, int]) -> Tensor:
    """(B, 2): rows and columns, at least 1, of a map of ``sides`` that begin on the image and not on its padding.

    Args:
        sizes: (B, 2) height and width of the images without padding, px.
        full: and with it.
    """
    counts = [(sizes[:, i] * sides[i] + full[i] - 1).div(full[i], rounding_mode="floor") for i in range(2)]
    return torch.stack([count.clamp(1, side) for count, side in zip(counts, sides, strict=True)], dim=1)


def valid_cells(counts: Tensor | None, map_: Tensor) -> Tensor:
    """(B, h, w) bool of :func:`covered` ``counts``; None: all."""
    batch, _, height, width = map_.shape
    if counts is None:
        return torch.ones(batch, height, width, dtype=torch.bool, device=map_.device)
    rows = torch.arange(height, device=map_.device) < counts[:, :1]
    columns = torch.arange(width, device=map_.device) < counts[:, 1:]
    return rows[:, :, None] & columns[:, None]


def positions(counts: Tensor | None, map_: Tensor, width: int, shift: float) -> Tensor:
    """(B, h * w, width), or B = 1 where nothing is padded: where each cell lies on its image; y first, then x.

    Rows count from 1 - ``shift``, so that those of the image end at 2 pi.
    """
    halves = []
    for axis, side in enumerate(map_.shape[-2:]):
        place = torch.arange(1, side + 1, device=map_.device, dtype=torch.float32) - shift
        end = place.new_full((1, 1), side) if counts is None else counts[:, axis, None]
        halves.append(waves(place / (end + 1e-6) * (2 * math.pi), width // 2))
    y, x = halves
    height, columns = y.shape[1], x.shape[1]
    both = [y[:, :, None].expand(-1, -1, columns, -1), x[:, None].expand(-1, height, -1, -1)]
    return torch.cat(both, dim=-1).flatten(1, 2)


def corners(boxes: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(B, k, 4) shares -> xyxy px of images of ``sizes``, inside of them."""
    centre, extent = boxes[..., :2], boxes[..., 2:]
    shares = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1).clamp(0, 1)
    scale = torch.tensor([(width, height) * 2 for height, width in sizes], dtype=torch.float32, device=boxes.device)
    return shares * scale[:, None]


class QueryDetector(nn.Module):
    """Called like torchvision's detectors in evaluation: images (3, H, W) in [0, 1] -> boxes, labels, scores of each.

    In training, a dictionary of ``logits`` (L, B, N, C) and ``boxes`` (L, B, N, 4) after each decoder layer; of
    two-stage detectors also ``first``, logits (B, S, 1) and boxes (B, S, 4) of the encoder's cells.
    """

    def __init__(
        self,
        transform: GeneralizedRCNNTransform,
        backbone: Backbone,
        transformer: nn.Module,
        num_queries: int,
        width: int,
        detections: int,
    ) -> None:
        super().__init__()
        self.transform, self.backbone, self.transformer = transform, backbone, transformer
        self.num_queries, self.width, self.detections = num_queries, width, detections

    def forward(self, images: Sequence[Tensor]) -> Any:
        listed, _ = self.transform(list(images))
        padded = any(size != tuple(listed.tensors.shape[-2:]) for size in listed.image_sizes)
        sizes = torch.tensor(listed.image_sizes, device=listed.tensors.device) if padded else None
        answers = self.answer(listed.tensors, sizes)
        logits = self.logits(answers.hidden)
        if self.training:
            outputs = {"logits": logits, "boxes": answers.boxes}
            return outputs if answers.first is None else {**outputs, "first": answers.first}
        return self.best(logits[-1], answers.boxes[-1], [(i.shape[-2], i.shape[-1]) for i in images])

    def best(self, logits: Tensor, boxes: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """The ``detections`` with the highest scores, highest first; boxes xyxy px of images of ``sizes``.

        Args:
            logits: (B, N, C), of the last decoder layer.
            boxes: (B, N, 4).
        """
        scores, query, labels = self.ranked(logits.float())
        found = corners(boxes.gather(1, query[..., None].expand(-1, -1, 4)), sizes)
        return [{"boxes": b, "labels": n, "scores": s} for b, n, s in zip(found, labels, scores, strict=True)]
