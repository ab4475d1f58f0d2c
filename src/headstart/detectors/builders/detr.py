"""DETR, Carion et al. 2020 (arXiv 2005.12872): a transformer on the backbone's last map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from headstart.detectors.builders.transformer import (
    MLP,
    Answers,
    Attention,
    Backbone,
    FeedForwardLayer,
    QueryDetector,
    Stack,
    covered,
    positions,
    valid_cells,
    xavier,
)


class DETREncoderLayer(FeedForwardLayer):
    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(width, feedforward, dropout)
        self.self_attn = Attention(width, heads, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, D); ``mask`` (B, 1, 1, S)."""
        if self.pre_norm:
            y = self.norm1(x)
            place = y + position
            x = x + self.drop(self.self_attn(place, place, y, mask))
            return x + self.feed(self.norm2(x))
        place = x + position
        x = self.norm1(x + self.drop(self.self_attn(place, place, x, mask)))
        return self.norm2(x + self.feed(x))


class DETRDecoderLayer(FeedForwardLayer):
    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(width, feedforward, dropout)
        self.self_attn = Attention(width, heads, dropout)
        self.multihead_attn = Attention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.pre_norm = pre_norm

    def forward(
        self, x: Tensor, query: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None, attend: Tensor | None
    ) -> Tensor:
        """(B, N, D) of queries; ``keys`` and ``memory`` (B, S, D), ``mask`` (B, 1, 1, S), ``attend`` (N, N)."""
        if self.pre_norm:
            y = self.norm1(x)
            place = y + query
            x = x + self.drop(self.self_attn(place, place, y, attend))
            x = x + self.drop(self.multihead_attn(self.norm2(x) + query, keys, memory, mask))
            return x + self.feed(self.norm3(x))
        place = x + query
        x = self.norm1(x + self.drop(self.self_attn(place, place, x, attend)))
        x = self.norm2(x + self.drop(self.multihead_attn(x + query, keys, memory, mask)))
        return self.norm3(x + self.feed(x))


class DETRTransformer(nn.Module):
    def __init__(self, encoder: Stack, decoder: Stack) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        xavier(self)

    def forward(
        self, x: Tensor, position: Tensor, query: Tensor, mask: Tensor | None, attend: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs of each decoder layer (L, B, N, D), and the memory (B, S, D)."""
        for layer in self.encoder.layers:
            x = layer(x, position, mask)
        memory = x if self.encoder.norm is None else self.encoder.norm(x)
        keys, y, outputs = memory + position, torch.zeros_like(query), []
        for layer in self.decoder.layers:
            y = layer(y, query, keys, memory, mask, attend)
            outputs.append(y)
        stacked = torch.stack(outputs)
        return stacked if self.decoder.norm is None else self.decoder.norm(stacked), memory


class DETR(QueryDetector):
    """Of C + 1 logits the last one is "no object"."""

    def __init__(
        self,
        transform: GeneralizedRCNNTransform,
        backbone: Backbone,
        transformer: DETRTransformer,
        num_classes: int,
        num_queries: int,
        width: int,
        detections: int,
    ) -> None:
        super().__init__(transform, backbone, transformer, num_queries, width, detections)
        self.input_proj = nn.Conv2d(backbone.body.channels[-1], width, 1)
        self.query_embed = nn.Embedding(num_queries, width)
        self.class_embed = nn.Linear(width, num_classes + 1)
        self.bbox_embed = MLP(width, width, width, 4)

    def project(self, images: Tensor) -> list[Tensor]:
        """The one map (B, D, h, w) that the encoder sees."""
        return [self.input_proj(list(self.backbone(images).values())[-1])]

    def answer(
        self, images: Tensor, sizes: Tensor | None = None, extra: Tensor | None = None, attend: Tensor | None = None
    ) -> Answers:
        """
        Args:
            images: (B, 3, H, W) normalised.
            sizes: (B, 2) int64 height and width without padding, px; None: there is none.
            extra: (B, N, D) added to the query embeddings.
            attend: (N, N) bool, which query may look at which.
        """
        (map_,) = self.project(images)
        full = (images.shape[-2], images.shape[-1])
        counts = None if sizes is None else covered(sizes, full, (map_.shape[-2], map_.shape[-1]))
        valid = valid_cells(counts, map_)
        mask = None if counts is None else valid.flatten(1)[:, None, None]
        position = positions(counts, map_, self.width, shift=0.0)
        query = self.query_embed.weight[None].expand(len(images), -1, -1)
        query = query if extra is None else query + extra
        hidden, memory = self.transformer(map_.flatten(2).mT, position, query, mask, attend)
        boxes = self.bbox_embed(hidden).float().sigmoid()
        return Answers(hidden, boxes, [memory.mT.unflatten(2, map_.shape[-2:])], [valid])

    def logits(self, hidden: Tensor) -> Tensor:
        """(L, B, N, D) -> (L, B, N, C + 1)."""
        return self.class_embed(hidden)

    def ranked(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, queries and labels (B, k) of the best class of each query."""
        scores, labels = logits.softmax(dim=-1)[..., :-1].max(dim=-1)
        scores, query = scores.topk(min(self.detections, scores.shape[1]), dim=1)
        return scores, query, labels.gather(1, query) + 1


def detr(
    body: nn.Module,
    num_classes: int,
    num_queries: int,
    width: int,
    heads: int,
    encoder_layers: int,
    decoder_layers: int,
    feedforward: int,
    dropout: float,
    pre_norm: bool,
    detections: int,
    **options: Any,
) -> DETR:
    """``options`` are those of torchvision's ``GeneralizedRCNNTransform``. Labels are 1 to ``num_classes``."""
    shape = (width, heads, feedforward, dropout, pre_norm)
    transformer = DETRTransformer(
        Stack([DETREncoderLayer(*shape) for _ in range(encoder_layers)], nn.LayerNorm(width) if pre_norm else None),
        Stack([DETRDecoderLayer(*shape) for _ in range(decoder_layers)], nn.LayerNorm(width)),
    )
    transform = GeneralizedRCNNTransform(**options, size_divisible=1)
    return DETR(transform, Backbone(body), transformer, num_classes, num_queries, width, detections)
