"""Deformable DETR, Zhu et al. 2021 (arXiv 2010.04159): each query looks at a few places of each map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from headstart.detectors.builders.dense import group_norm
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
    waves,
    xavier,
)


class Levels(NamedTuple):
    """The maps of a batch, whose S cells follow one another, finest map first.

    Padding is None where there is none: then a map is as large as its images.
    """

    sides: list[tuple[int, int]]  # height and width of each
    cell: Tensor  # (L, 2), width and height of one, in shares of its map
    padding: Tensor | None  # (B, S) bool
    ratios: Tensor | None  # (B, L, 2): the share of a map that an image covers, x and y

    @property
    def cells(self) -> list[int]:
        return [height * width for height, width in self.sides]

    def placed(self, reference: Tensor) -> Tensor:
        """Points or boxes (B, N, 2 or 4) in shares of the images -> (B, L or 1, 2 or 4, N) in shares of the maps."""
        placed = reference.mT[:, None]
        if self.ratios is None:
            return placed
        return placed * self.ratios.repeat(1, 1, reference.shape[-1] // 2)[..., None]

    def centres(self, device: torch.device) -> Tensor:
        """(S, 2) of each cell, in shares of its map."""
        each = []
        for height, width in self.sides:
            y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
            x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
            each.append(torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1))
        return torch.cat(each)

    def on_image(self, centres: Tensor) -> Tensor:
        """(S, 2) in shares of the maps -> (B or 1, S, 2) in shares of the images; beyond 1 in the padding."""
        if self.ratios is None:
            return centres[None]
        own = zip(self.ratios.unbind(1), self.cells, strict=True)
        return centres / torch.cat([ratio[:, None].expand(-1, n, -1) for ratio, n in own], dim=1)


def cell_sides(sides: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(L, 2): width and height of a cell in shares of its map. Filled in there: a copy would wait for the device."""
    each = [torch.full((1,), 1 / side, device=device) for height, width in sides for side in (width, height)]
    return torch.cat(each).unflatten(0, (-1, 2))


def head_major(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` (B, S, D), as (B, D', S): a head's channels in a row, which spares a copy of all of them."""
    return torch.baddbmm(layer.bias[:, None], layer.weight.expand(len(x), -1, -1), x.mT)


class DeformableAttention(nn.Module):
    """Section 4.1, Eq. 3: ``points`` places on each of ``levels`` maps, for each head and query."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def reset(self) -> None:
        """Each head starts with a direction of its own, one cell further with each point, and equal weights."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        ring = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ring = ring / ring.abs().amax(dim=-1, keepdim=True)
        reach = torch.arange(1, self.points + 1, dtype=torch.float32)
        start = (ring[:, None, None] * reach[:, None]).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(start.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, levels: Levels) -> Tensor:
        """
        Args:
            query: (B, N, D).
            reference: (B or 1, L or 1, 2 or 4, N), as :meth:`Levels.placed`. Offsets are in cells of points, and in
                half sides of boxes over the number of points.
            memory: (B, S, D).
        """
        values = head_major(self.value_proj, memory)
        if levels.padding is not None:
            values = values.masked_fill(levels.padding[:, None], 0.0)
        values = values.unflatten(1, (self.heads, -1)).flatten(0, 1)
        shape = (self.heads, self.levels, self.points)
        offsets = head_major(self.sampling_offsets, query).unflatten(1, (*shape, 2)).float()
        weights = head_major(self.attention_weights, query).unflatten(1, (self.heads, -1)).softmax(dim=2)
        weights = weights.unflatten(2, shape[1:]).flatten(0, 1)

        # grid_sample counts from -1 to 1: places are 2 * (reference + offset) - 1.
        if reference.shape[2] == 4:
            unit = reference[:, None, :, None, 2:] / self.points
        else:
            unit = 2 * levels.cell[:, None, :, None]
        places = torch.addcmul(2 * reference[:, None, :, None, :2] - 1, offsets, unit).flatten(0, 1)

        total: Any = 0
        each = zip(levels.sides, values.split(levels.cells, dim=2), places.unbind(1), weights.unbind(1), strict=True)
        for sides, map_, place, weight in each:  # (B * heads, ...): (d, cells), (points, 2, N), (points, N)
            seen = F.grid_sample(map_.unflatten(2, sides), place.movedim(2, 3), align_corners=False)
            total = total + (seen * weight[:, None]).sum(dim=2)
        return self.output_proj(total.unflatten(0, (-1, self.heads)).flatten(1, 2).mT)


class DeformableEncoderLayer(FeedForwardLayer):
    def __init__(self, width: int, heads: int, levels: int, points: int, feedforward: int, dropout: float) -> None:
        super().__init__(width, feedforward, dropout)
        self.self_attn = DeformableAttention(width, heads, levels, points)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, levels: Levels) -> Tensor:
        x = self.norm1(x + self.drop(self.self_attn(x + position, reference, x, levels)))
        return self.norm2(x + self.feed(x))


class DeformableDecoderLayer(FeedForwardLayer):
    def __init__(self, width: int, heads: int, levels: int, points: int, feedforward: int, dropout: float) -> None:
        super().__init__(width, feedforward, dropout)
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = DeformableAttention(width, heads, levels, points)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self, x: Tensor, query: Tensor, reference: Tensor, memory: Tensor, levels: Levels, attend: Tensor | None
    ) -> Tensor:
        place = x + query
        x = self.norm2(x + self.drop(self.self_attn(place, place, x, attend)))
        x = self.norm1(x + self.drop(self.cross_attn(x + query, reference, memory, levels)))
        return self.norm3(x + self.feed(x))


class DeformableTransformer(nn.Module):
    """The layers; :class:`DeformableDETR` runs them."""

    def __init__(self, encoder: Stack, decoder: Stack, levels: int, width: int, two_stage: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.level_embed = nn.Parameter(torch.empty(levels, width))
        if two_stage:
            self.enc_output, self.enc_output_norm = nn.Linear(width, width), nn.LayerNorm(width)
            self.pos_trans, self.pos_trans_norm = nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width)
        else:
            self.reference_points = nn.Linear(width, 2)
            nn.init.zeros_(self.reference_points.bias)
        xavier(self)
        nn.init.normal_(self.level_embed)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset()

    def encode(self, x: Tensor, position: Tensor, levels: Levels) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        reference = levels.placed(levels.on_image(levels.centres(x.device)))
        for layer in self.encoder.layers:
            x = layer(x, position, reference, levels)
        return x


class DeformableDETR(QueryDetector):
    """With ``refine`` each decoder layer moves the boxes of the one before, and has class and box layers of its own.

    ``two_stage``: queries begin as the encoder's own proposals, those of the highest scores.
    """

    def __init__(
        self,
        transform: GeneralizedRCNNTransform,
        backbone: Backbone,
        transformer: DeformableTransformer,
        num_classes: int,
        num_queries: int,
        width: int,
        refine: bool,
        two_stage: bool,
        detections: int,
    ) -> None:
        super().__init__(transform, backbone, transformer, num_queries, width, detections)
        self.refine, self.two_stage = refine, two_stage
        levels = len(transformer.level_embed)
        self.input_proj = input_projections(backbone.body.channels, width, levels)
        heads = len(transformer.decoder.layers) if refine else 1
        self.class_embed = nn.ModuleList(class_head(width, num_classes) for _ in range(heads))
        start = 0.0 if two_stage else -2.0  # a box begins as its proposal, or an eighth of the image wide
        self.bbox_embed = nn.ModuleList(box_mlp(width, start if i == 0 else 0.0) for i in range(heads))
        if two_stage:
            self.enc_class_embed = class_head(width, 1)
            self.enc_bbox_embed = box_mlp(width, 0.0)
        else:
            self.query_embed = nn.Embedding(num_queries, 2 * width)

    def project(self, images: Tensor) -> list[Tensor]:
        """The maps (B, D, h, w) that the encoder sees, finest first."""
        maps = list(self.backbone(images).values())
        projected = [layer(map_) for layer, map_ in zip(self.input_proj, maps, strict=False)]
        last = maps[-1]
        for layer in self.input_proj[len(maps) :]:
            last = layer(last)
            projected.append(last)
        return projected

    def answer(
        self, images: Tensor, sizes: Tensor | None = None, extra: Tensor | None = None, attend: Tensor | None = None
    ) -> Answers:
        """
        Args:
            images: (B, 3, H, W) normalised.
            sizes: (B, 2) int64 height and width without padding, px; None: there is none.
            extra: (B, N, D) added to the queries' content.
            attend: (N, N) bool, which query may look at which.
        """
        maps = self.project(images)
        sides = [(map_.shape[-2], map_.shape[-1]) for map_ in maps]
        full = (images.shape[-2], images.shape[-1])
        counts: list[Any] = [None if sizes is None else covered(sizes, full, side) for side in sides]
        valid = [valid_cells(count, map_) for count, map_ in zip(counts, maps, strict=True)]
        cell = cell_sides(sides, images.device)
        levels = Levels(sides, cell, None, None)
        if sizes is not None:
            padding = ~torch.cat([cells.flatten(1) for cells in valid], dim=1)
            levels = Levels(sides, cell, padding, torch.stack(counts, dim=1).flip(-1) * cell)
        embedded = zip(counts, maps, self.transformer.level_embed, strict=True)
        position = torch.cat([positions(c, map_, self.width, shift=0.5) + own for c, map_, own in embedded], dim=1)
        memory = self.transformer.encode(torch.cat([m.flatten(2) for m in maps], dim=2).mT, position, levels)

        first = None
        if self.two_stage:
            logits, unsquashed = self.propose(memory, levels)
            first = logits, unsquashed.sigmoid()
            query, content, reference = self.chosen(logits, unsquashed)
        else:
            query, content = self.query_embed.weight[None].expand(len(images), -1, -1).chunk(2, dim=-1)
            reference = self.transformer.reference_points(query).float().sigmoid()
        content = content if extra is None else content + extra
        hidden, boxes = self.decode(content, query, reference, memory, levels, attend)
        parts = memory.mT.split(levels.cells, dim=2)
        remembered = [part.unflatten(2, side) for part, side in zip(parts, sides, strict=True)]
        return Answers(hidden, boxes, remembered, valid, first)

    def decode(
        self, x: Tensor, query: Tensor, reference: Tensor, memory: Tensor, levels: Levels, attend: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(L, B, N, D) and boxes (L, B, N, 4), from ``reference`` points or boxes (B, N, 2 or 4)."""
        hidden, boxes = [], []
        for i, layer in enumerate(self.transformer.decoder.layers):
            x = layer(x, query, levels.placed(reference), memory, levels, attend)
            hidden.append(x)
            if self.refine:
                boxes.append(moved(reference, self.bbox_embed[i](x)))
                reference = boxes[-1].detach()
        outputs = torch.stack(hidden)
        return outputs, torch.stack(boxes) if self.refine else moved(reference, self.bbox_embed[0](outputs))

    def propose(self, memory: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """Appendix A.4: of each cell, a logit (B, S, 1) and a box (B, S, 4) before the sigmoid.

        Cells in the padding or near the edges propose nothing: their boxes are infinite.
        """
        t = self.transformer
        centre = levels.on_image(levels.centres(memory.device))
        sides = [0.05 * 2.0**level for level in range(len(levels.sides))]
        of_cell = torch.cat([centre.new_full((n, 1), side) for side, n in zip(sides, levels.cells, strict=True)])
        start = torch.cat([centre, of_cell.expand(len(centre), -1, 2)], dim=-1)
        usable = ((start > 0.01) & (start < 0.99)).all(dim=-1, keepdim=True)
        if levels.padding is not None:
            usable = usable & ~levels.padding[..., None]
        start = torch.log(start / (1 - start)).masked_fill(~usable, torch.inf)
        seen = t.enc_output_norm(t.enc_output(memory.masked_fill(~usable, 0.0)))
        return self.enc_class_embed(seen).float(), self.enc_bbox_embed(seen).float() + start

    def chosen(self, logits: Tensor, unsquashed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions and contents (B, N, D) of the queries, and boxes (B, N, 4): the N best proposals."""
        cells, t = logits.shape[1], self.transformer
        best = logits[..., 0].topk(min(self.num_queries, cells), dim=1).indices
        if cells < self.num_queries:  # images so small that proposals have to be asked more than once
            best = best[:, torch.arange(self.num_queries, device=best.device) % cells]
        reference = unsquashed.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        described = waves(reference * (2 * math.pi), self.width // 2).flatten(2)
        query, content = t.pos_trans_norm(t.pos_trans(described)).chunk(2, dim=-1)
        return query, content, reference

    def logits(self, hidden: Tensor) -> Tensor:
        """(L, B, N, D) -> (L, B, N, C)."""
        if len(self.class_embed) == 1:
            return self.class_embed[0](hidden)
        return torch.stack([layer(x) for layer, x in zip(self.class_embed, hidden, strict=True)])

    def ranked(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, queries and labels (B, k) of the best pairs of query and class."""
        scores, index = logits.sigmoid().flatten(1).topk(min(self.detections, logits[0].numel()), dim=1)
        classes = logits.shape[-1]
        return scores, torch.div(index, classes, rounding_mode="floor"), index % classes + 1


def input_projections(channels: Sequence[int], width: int, levels: int) -> nn.ModuleList:
    """1 x 1 convolutions of the backbone's maps; further levels are halved by 3 x 3 convolutions from the last one."""
    norm, layers = group_norm(width), [nn.Conv2d(c, width, 1) for c in channels]
    for i in range(levels - len(channels)):
        layers.append(nn.Conv2d(width if i else channels[-1], width, 3, stride=2, padding=1))
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.ModuleList(nn.Sequential(layer, norm(width)) for layer in layers)


def class_head(width: int, classes: int) -> nn.Linear:
    """Every class begins with a probability of 1 %."""
    layer = nn.Linear(width, classes)
    nn.init.constant_(layer.bias, -math.log((1 - 0.01) / 0.01))
    return layer


def box_mlp(width: int, start: float) -> MLP:
    """Begins without moving anything; ``start``: of width and height, before the sigmoid."""
    head = MLP(width, width, width, 4)
    last = head.layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    nn.init.constant_(last.bias[2:], start)
    return head


def moved(reference: Tensor, change: Tensor) -> Tensor:
    """Boxes (..., 4) from points or boxes (B, N, 2 or 4) and ``change`` (..., 4), added before the sigmoid."""
    low = reference.clamp(min=1e-5)
    start = torch.log(low / (1 - reference).clamp(min=1e-5))
    return (change.float() + F.pad(start, (0, 4 - start.shape[-1]))).sigmoid()


def deformable_detr(
    body: nn.Module,
    num_classes: int,
    num_queries: int,
    width: int,
    heads: int,
    encoder_layers: int,
    decoder_layers: int,
    feedforward: int,
    dropout: float,
    levels: int,
    points: int,
    refine: bool,
    two_stage: bool,
    detections: int,
    **options: Any,
) -> DeformableDETR:
    """``options`` are those of torchvision's ``GeneralizedRCNNTransform``. Labels are 1 to ``num_classes``."""
    shape = (width, heads, levels, points, feedforward, dropout)
    transformer = DeformableTransformer(
        Stack([DeformableEncoderLayer(*shape) for _ in range(encoder_layers)]),
        Stack([DeformableDecoderLayer(*shape) for _ in range(decoder_layers)]),
        levels,
        width,
        two_stage,
    )
    transform = GeneralizedRCNNTransform(**options, size_divisible=1)
    return DeformableDETR(
        transform, Backbone(body), transformer, num_classes, num_queries, width, refine, two_stage, detections
    )
