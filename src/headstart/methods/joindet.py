"""JoinDet: Unsupervised Object Detection Pretraining with Joint Object Priors Generation and Detector Learning
(Wang et al., NeurIPS 2022).

https://papers.nips.cc/paper_files/paper/2022/hash/50ca96a1a9ebe0b5e5688a504feb6107-Abstract-Conference.html

The detector makes its own boxes: every few epochs from what stands out in its encoder's map, and from what its queries
call an object there, smoothed with the boxes it was trained on before. In between it is trained as DETReg is.

    Supplement 4, eigen attention map M      proposals/ncut.py
    Region priors                            EigenAttention.region_priors
    Instance priors                          EigenAttention.share, JoinDet.refresh
    Box Smooth Module, m^s                   box_smooth
    Supervision R_n                          JoinDet.refresh
    f_cls, f_emb, losses                     JoinDet.heads, DETReg.loss

Where this file differs from the paper, or fills a gap. The paper's main text was not at hand, and there is no released
code: what the supplement does not say is as a public summary by others has it (region and instance priors, t, R_0, a
256-wide f_emb), or ours.

* tau and eps are TokenCut's; the map's sign is such that its largest absolute value is foreground. Ours: the map's
  mean is taken off the features first (``centre``), without which a backbone that ends in a ReLU has nothing to cut.
* For R_0 the backbone sees each image in a frame of its own mirror images, which is cut off its map again. Next to the
  zeros that convolutions pad with, the frame of a photo stands out more than any object.
* A region's score is the mean, inside its box, of the map rescaled to [0, 1]; a query's is its probability.
* Clusters are greedy, best score first, and a box belongs to the first cluster whose first box it overlaps enough.
* m_s = 1 leaves the supervision as it is, and m_s = 0 puts the new priors in its place, both to the letter.
* The cut is made on the map whose stride is nearest to ``stride_px``, of the backbone and of an encoder of several maps
  (the paper has C5's alone).
* Crops are described by the detector's own frozen backbone, C3's mean as in DETReg. Where it is wider than ``dim``, a
  fixed random projection makes it so narrow.
* Large-scale jitter takes the place of DETReg's resizing, its canvas being the longest side of those views.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.ops import nms
from typing_extensions import Self

from headstart import boxes as geometry
from headstart.detectors.detector import Detector, Target
from headstart.matching import xyxy
from headstart.methods.detreg import DETReg, DETRegSettings
from headstart.methods.method import Net, Priors, ViewBatch
from headstart.methods.query_method import detr_crop
from headstart.proposals import ncut
from headstart.views import View, hflip, jitter_scale, visible

HIDDEN = 256  # f_emb
UPDATES = 5  # sets of boxes in a run, the first from the backbone: each for 10 of 50 epochs on COCO, 1 of 5 on ImageNet
MIRRORED_PX = 64  # a multiple of all strides


class JoinDetSettings(DETRegSettings):
    """Symbols are the paper's, where it has some."""

    m_s: float = Field(
        0.45, ge=0, le=1, description="Box Smooth: weight of a box of the supervision before; a new one's is 1 - m_s"
    )
    iou: float = Field(
        0.48, gt=0, lt=1, description="Box Smooth: IoU with a cluster's first box from which on a box joins"
    )
    update_epochs: float | None = Field(
        None,
        gt=0,
        description="passes over the images between updates of the supervision; unset: a fifth of the run, which is "
        "the paper's 10 on COCO and 1 on ImageNet",
    )
    priors: Literal["region", "instance", "both"] = Field(
        "both", description="new boxes: what stands out in the map, what queries find there, or both"
    )
    merge: Literal["smooth", "nms", "replace"] = Field(
        "smooth", description="what becomes of old and new boxes: Box Smooth, NMS at iou, or the new ones alone"
    )
    t: float = Field(0.5, ge=0, le=1, description="share of a query's box that has to be foreground of the map")
    foreground: float = Field(
        0.5,
        ge=0,
        le=1,
        description="probability from which on a query has found something; 0.5: the likelier of two, which focal loss "
        "reaches late, and short runs never",
    )
    tau: float = Field(ncut.TAU, ge=-1, le=1, description="cosine from which on two cells of the map are alike")
    eps: float = Field(ncut.EPS, gt=0, lt=1, description="weight of an edge between cells that are not alike")
    centre: bool = Field(True, description="take the map's mean off its features before their cosines")
    stride_px: int = Field(
        32,
        ge=4,
        description="stride of the map that is cut: the backbone's at first, then the encoder's, where it has several. "
        "Half of it: finer boxes, 16 times the graph",
    )
    dim: int = Field(256, ge=1, description="most values that f_emb describes a box with")
    jitter: tuple[float, float] | None = Field(
        (0.1, 2.0), description="large-scale jitter: range of the views' long side, in long_side_px; unset: as DETReg"
    )

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.jitter is not None and not 0 < self.jitter[0] <= self.jitter[1]:
            raise ValueError(f"jitter: {self.jitter}; expected two factors above 0, the smaller first")
        return self


class JoinDet(DETReg):
    """DETReg's losses on boxes of the detector's own."""

    name = "joindet"
    settings_type = JoinDetSettings
    settings: JoinDetSettings
    paper = (
        "https://papers.nips.cc/paper_files/paper/2022/hash/50ca96a1a9ebe0b5e5688a504feb6107-Abstract-Conference.html"
    )
    epochs = 50  # on COCO; 5 on ImageNet
    proposals: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, settings: JoinDetSettings) -> None:
        super().__init__(settings)
        self._total_steps = 0

    @property
    def decode_px(self) -> int:
        s = self.settings
        if s.jitter is None:
            return super().decode_px
        assert s.long_side_px is not None
        return math.ceil(s.long_side_px * s.jitter[1])

    def augment(self, view: View, rng: np.random.Generator) -> View:
        s = self.settings
        if s.jitter is None:
            return super().augment(view, rng)
        assert s.long_side_px is not None
        if rng.random() < s.crop_prob:
            view = detr_crop(view, rng)
        view = jitter_scale(view, s.jitter, s.long_side_px, rng)
        if rng.random() < s.flip_prob:
            view = hflip(view)
        return view.take(visible(view.boxes))

    def settle(self, detector: Detector, total_steps: int) -> list[str]:
        notes = super().settle(detector, total_steps)
        self._total_steps = total_steps
        if self.settings.update_epochs is None:
            notes.append(
                f"{UPDATES} sets of boxes in {total_steps} steps, as in the paper (--set method.update_epochs)"
            )
        return notes

    # ---- heads --------------------------------------------------------------------------------------------------

    def heads(self, detector: Detector) -> nn.ModuleDict:
        described = detector.stage_width(self.settings.stage)
        dim = min(self.settings.dim, described)
        f_emb = nn.Sequential(
            *(nn.Linear(detector.query_width, HIDDEN), nn.ReLU()), *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
            nn.Linear(HIDDEN, dim),
        )  # fmt: skip
        return nn.ModuleDict(
            {"f_cls": detector.class_layer(1), "f_emb": f_emb, "narrow": Narrow(described, dim)},
        )

    def describe(self, net: Net, view: ViewBatch, wanted: Sequence[Target]) -> Tensor:
        return net.heads["narrow"](super().describe(net, view, wanted))

    # ---- priors -------------------------------------------------------------------------------------------------

    def refresh_every(self, steps_a_pass: float) -> int:
        epochs = self.settings.update_epochs
        return max(1, round(self._total_steps / UPDATES if epochs is None else epochs * steps_a_pass))

    def refresh(self, student: Net, images: Tensor, sizes: Tensor, before: list[Priors] | None) -> list[Priors]:
        """R_0: regions of the frozen backbone's own map. R_n: of the encoder's, and its queries', merged with R_n-1."""
        s, detector, padded = self.settings, student.detector, images.shape[-2:]
        heights_widths = sizes.tolist()
        if before is None:
            framed = torch.stack([mirrored(i, size) for i, size in zip(images, heights_widths, strict=True)])
            map_ = detector.stage_map(framed, min(5, round(math.log2(s.stride_px))))
            cells = MIRRORED_PX // stride_of(map_, framed.shape[-2:])
            map_ = map_[..., cells : map_.shape[-2] - cells, cells : map_.shape[-1] - cells]
            return [attention.region_priors() for attention in self.attend(map_, padded, heights_widths)]
        answers = detector.queries(images, sizes)
        map_ = min(answers.memory, key=lambda m: abs(math.log2(stride_of(m, padded) / s.stride_px)))
        logits = student.heads["f_cls"](answers.hidden[-1]).float()
        found = detector.set_loss.probabilities(logits)[..., 0].cpu()
        scale = sizes.to(logits.device).flip(1).repeat(1, 2)[:, None]
        boxes = (xyxy(answers.boxes_cxcywh[-1].float()) * scale).cpu()
        refreshed = []
        for attention, b, p, old in zip(self.attend(map_, padded, heights_widths), boxes, found, before, strict=True):
            kinds = []
            if s.priors != "instance":
                kinds.append(attention.region_priors())
            if s.priors != "region":
                kinds.append(attention.instance_priors(Priors(b, p), s.foreground, s.t))
            new = Priors(torch.cat([k.boxes for k in kinds]), torch.cat([k.scores for k in kinds]))
            refreshed.append(self.merged(Priors(old.boxes.cpu().float(), old.scores.cpu().float()), new))
        return refreshed

    def attend(self, map_: Tensor, padded: Sequence[int], sizes: Sequence[Sequence[int]]) -> list[EigenAttention]:
        """The eigen attention of each image of a batch, from features (B, C, h, w) of padded images."""
        s, stride = self.settings, stride_of(map_, padded)
        maps = map_.float().permute(0, 2, 3, 1).cpu().numpy()
        found = []
        for features, (height, width) in zip(maps, sizes, strict=True):
            features = features[: math.ceil(height / stride), : math.ceil(width / stride)]  # what lies on the image
            features = ncut.centred(features) if s.centre else features
            found.append(EigenAttention(ncut.attention_map(features, s.tau, s.eps), stride, (height, width)))
        return found

    def merged(self, old: Priors, new: Priors) -> Priors:
        s = self.settings
        if s.merge == "replace":
            return new
        if s.merge == "smooth":
            return box_smooth(old, new, s.m_s, s.iou)
        boxes, scores = torch.cat([old.boxes, new.boxes]), torch.cat([old.scores, new.scores])
        kept = nms(boxes, scores, s.iou)
        return Priors(boxes[kept], scores[kept])

    # ---- health -----------------------------------------------------------------------------------------------

    def warnings(self, watched: Mapping[str, Any]) -> str | None:
        if watched and not watched["objects"]:
            return (
                "no image of this batch has a box to find: nothing stands out in the maps (all boxes are in priors/ in "
                "the run folder). Start from a trained backbone (--start), or cut a finer map (--set "
                "method.stride_px=16)"
            )
        return super().warnings(watched)


@dataclass(frozen=True)
class EigenAttention:
    """An image's eigen attention map.

    Attributes:
        M: (h, w), large where something stands out.
        stride: px a cell.
        size: height and width of the image, px; the last cells may reach beyond.
    """

    M: np.ndarray
    stride: int
    size: tuple[int, int]

    def region_priors(self) -> Priors:
        """Boxes of the connected parts of the foreground, which is what is above the map's mean."""
        cells, scores = ncut.regions(self.M)
        height, width = self.size
        boxes = np.minimum(cells * self.stride, [width, height, width, height])
        return Priors(torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(scores.astype(np.float32)))

    def instance_priors(self, found: Priors, foreground: float, t: float) -> Priors:
        """Of the queries' boxes those whose score is above ``foreground``, and with a share ``t`` of it in them."""
        height, width = self.size
        boxes = geometry.clip(found.boxes, width, height)
        kept = (found.scores > foreground) & (geometry.area(boxes) > 0)
        boxes, scores = boxes[kept], found.scores[kept]
        inside = torch.from_numpy(self.share(boxes.numpy()) >= t)
        return Priors(boxes[inside], scores[inside])

    def share(self, boxes: np.ndarray) -> np.ndarray:
        """(n,) the share of each of ``boxes`` (n, 4), xyxy px inside the image, with an area, that is foreground."""
        above = ncut.foreground(self.M).astype(np.float64)
        boxes = boxes.astype(np.float64)
        # What each row, and each column, of cells has in common with each box, px.
        common = []
        for axis, cells in ((1, above.shape[0]), (0, above.shape[1])):
            edges = np.minimum(np.arange(cells + 1) * self.stride, self.size[1 - axis])
            low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
            common.append((np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])).clip(0))
        rows, columns = common
        return ((rows @ above) * columns).sum(axis=1) / geometry.area(boxes)


def mirrored(image: Tensor, size: Sequence[int]) -> Tensor:
    """An image (C, H, W), of which ``size`` is no padding, with its mirror images round it and in its padding."""
    for axis, (padded, px) in enumerate(zip(image.shape[1:], size, strict=True), 1):
        there_and_back = max(1, 2 * (px - 1))
        place = torch.arange(-MIRRORED_PX, padded + MIRRORED_PX, device=image.device).abs() % there_and_back
        image = image.index_select(axis, place.minimum(there_and_back - place).clamp(max=px - 1))
    return image


def stride_of(map_: Tensor, padded: Sequence[int]) -> int:
    """px a cell of a map (B, C, h, w) of images of a size ``padded``: the power of two that gives so many cells."""
    return 2 ** math.ceil(math.log2(max(px / cells for px, cells in zip(padded, map_.shape[-2:], strict=True))))


def box_smooth(old: Priors, new: Priors, m_s: float, iou: float) -> Priors:
    """The Box Smooth Module: the supervision R_n from R_n-1, ``old``, and the current priors, ``new``.

    The best box left begins a cluster and takes all boxes left that overlap it by ``iou`` or more. A cluster becomes
    one box: the mean of its members, weighted by their scores and by ``m_s`` (old) or ``1 - m_s`` (new). Its score is
    their mean score. Best first.
    """
    if m_s in (0, 1):
        return old if m_s else new
    boxes, scores = torch.cat([old.boxes, new.boxes]), torch.cat([old.scores, new.scores])
    order = scores.argsort(descending=True, stable=True)
    boxes, scores = boxes[order], scores[order]
    weights = torch.cat(
        [old.scores.new_full((len(old.scores),), m_s), new.scores.new_full((len(new.scores),), 1 - m_s)]
    )
    # Boxes of score 0 keep a weight, or a cluster of them would have no mean.
    weights = weights[order] * scores.clamp(min=1e-6)
    overlaps = geometry.iou(boxes, boxes) >= iou
    left = torch.ones(len(boxes), dtype=torch.bool)
    means, mean_scores = [boxes.new_zeros(0, 4)], [scores.new_zeros(0)]
    for first in range(len(boxes)):
        if not left[first]:
            continue
        members = left & overlaps[first]
        members[first] = True  # an empty box overlaps nothing, not even itself
        left &= ~members
        weight = weights[members, None]
        means.append((boxes[members] * weight).sum(dim=0, keepdim=True) / weight.sum())
        mean_scores.append(scores[members].mean(dim=0, keepdim=True))
    smooth = Priors(torch.cat(means), torch.cat(mean_scores))
    order = smooth.scores.argsort(descending=True, stable=True)
    return Priors(smooth.boxes[order], smooth.scores[order])


class Narrow(nn.Module):
    """A fixed random projection onto ``dim`` values, the same in every run; lengths stay as they are on average."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        matrix = torch.eye(width)
        if dim < width:
            noise = torch.randn(width, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            matrix = (torch.linalg.qr(noise)[0] * math.sqrt(width / dim)).float()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., dim)."""
        return x @ self.matrix
