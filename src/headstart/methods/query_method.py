"""What methods share that pretrain a DETR on a frozen backbone, by finding boxes and saying what is in them.

DETReg and UP-DETR differ in which boxes, and in what queries are told and asked about them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from headstart import boxes as geometry
from headstart.detectors.detector import Ability, Detector, Queries, Target
from headstart.detectors.set_loss import Objects, SetLoss
from headstart.errors import SettingsError
from headstart.matching import Matches, padded, xyxy
from headstart.methods import crops
from headstart.methods.method import Method, Net, ViewBatch
from headstart.optim import OptimSettings
from headstart.settings import Settings
from headstart.views import View, hflip, random_size_crop, resize_short, visible

# Both released codes: short side 320 to 480, long side at most 600. DETR's crop is cut from an image of one of three
# short sides; its own sides are between the two that follow.
SHORT_PX, LONG_PX = (320, 480), 600
CUT_SHORT_PX, CUT_PX = (400, 500, 600), (384, 600)


class QuerySettings(Settings):
    lambda_cls: float | None = Field(None, ge=0, description="weight of the class loss; unset: the detector's own")
    lambda_l1: float | None = Field(None, ge=0, description="weight of the boxes' L1 loss; unset: the detector's own")
    lambda_giou: float | None = Field(
        None, ge=0, description="weight of the boxes' GIoU loss; unset: the detector's own"
    )
    crop_px: int = Field(crops.CROP_PX, ge=16, description="side of the squares that boxes are described in, px")
    stage: int | None = Field(
        None, ge=2, le=6, description="backbone map whose mean describes a box: 3 for C3, stride 8; unset: the last"
    )
    colour: float = Field(1.0, ge=0, le=1, description="strength of the colour augmentation of the crops")
    short_side_px: tuple[int, int] | None = Field(
        None,
        description="range of the views' short side, px. Unset: the released 320 to 480, or 2/3 to 1 x the detector's "
        "where that is smaller",
    )
    long_side_px: int | None = Field(
        None, ge=1, description="the views' longest side, px. Unset: 5/4 of short_side_px (released: 600)"
    )
    flip_prob: float = Field(0.5, ge=0, le=1, description="probability of mirroring a view, left to right")
    crop_prob: float = Field(0.5, ge=0, le=1, description="probability of DETR's crop")

    @model_validator(mode="after")
    def _smaller_first(self) -> Self:
        if self.short_side_px is not None and not 0 < self.short_side_px[0] <= self.short_side_px[1]:
            raise ValueError(f"short_side_px: {self.short_side_px}; expected two sides above 0, the smaller first")
        return self


@dataclass(frozen=True)
class Answered:
    """A batch's last decoder layer, without gradient: what :meth:`QueryMethod.watch` looks at.

    Attributes:
        scores: (B, N), higher where a query says "object".
        boxes_cxcywh: (B, N, 4), shares.
        matches: of queries and objects.
        objects: what was to be found.
        described: (M, C), what the backbone says of each.
    """

    scores: Tensor
    boxes_cxcywh: Tensor
    matches: Matches
    objects: Objects
    described: Tensor


Q = TypeVar("Q", bound=QuerySettings)


class QueryMethod(Method[Q]):
    """Everything behind the backbone learns; the backbone is frozen, and describes the crops.

    A subclass has the paper's ``lr`` and the share of the run after which it drops.
    """

    needs: ClassVar[Mapping[Ability, str]] = {"query": "trains queries that answer with boxes"}
    multiple_px = 32  # as in the detectors' own batches
    lr: ClassVar[float]
    drop: ClassVar[float]

    def __init__(self, settings: Q) -> None:
        super().__init__(settings)
        self._answered: Answered | None = None

    # ---- what is chosen for the user --------------------------------------------------------------------------

    def settle(self, detector: Detector, total_steps: int) -> list[str]:
        s, notes = self.settings, []
        try:
            detector.stage_width(s.stage)
        except SettingsError as error:
            raise SettingsError(f"method.stage={s.stage}: {error}") from None
        if s.short_side_px is None:
            s.short_side_px = view_px(detector)
            low, high = s.short_side_px
            if high < detector.input_px[0]:
                notes.append(
                    f"views of {low} to {high} px, short side: as released, smaller than the detector's "
                    f"{detector.input_px[0]} (--set method.short_side_px)"
                )
        if s.long_side_px is None:
            s.long_side_px = round(s.short_side_px[1] * LONG_PX / SHORT_PX[1])
        return notes

    def optimizer(self, detector: Detector, batch_size: int) -> OptimSettings:
        """AdamW at the paper's rate, whatever the batch: in proportion to a small one it would move next to nothing."""
        factors = detector.tuning().lr_scale or {}
        return OptimSettings(
            optimizer="adamw",
            base_lr=self.lr,
            base_batch=batch_size,
            weight_decay=1e-4,
            warmup_steps=0,
            schedule="steps",
            drops=[self.drop],
            clip=0.1,
            lr_scale={name: factor for name, factor in factors.items() if name != "backbone"},
        )

    def batch_size(self, detector: Detector, memory_gib: float) -> int:
        """At most 32; about 4 GiB hold an image of 800 x 1333 px, and smaller ones in proportion."""
        _, short = view_px(detector)
        fit = memory_gib / 4 * (800 * 1333) / (short * short * LONG_PX / SHORT_PX[1])
        return int(min(32, 2 ** np.floor(np.log2(max(2, fit)))))

    @property
    def decode_px(self) -> int:
        assert self.settings.short_side_px is not None
        largest = max(CUT_SHORT_PX) / SHORT_PX[1] if self.settings.crop_prob else 1
        return round(self.settings.short_side_px[1] * largest)

    def needs_start(self, detector: Detector) -> str | None:
        return "freezes the backbone, and learns what it says of each box, so it has to be a trained one"

    def trained_parts(self, detector: Detector) -> Sequence[str]:
        return [part for part in detector.parts if part not in ("backbone", "classifier")]

    def exported_parts(self, detector: Detector) -> Sequence[str]:
        """All but the class layer: boxes are class-agnostic in these detectors."""
        return [part for part in detector.parts if part != "classifier"]

    # ---- augmentation -----------------------------------------------------------------------------------------

    def augment(self, view: View, rng: np.random.Generator) -> View:
        """Sized as released, mirrored or not, in some part cut as DETR does; boxes that are gone are left out."""
        s = self.settings
        assert s.short_side_px is not None
        assert s.long_side_px is not None
        low, high = s.short_side_px
        short = int(rng.integers(low, high + 1))
        if rng.random() < s.crop_prob:
            view = detr_crop(view, rng)
        view = resize_short(view, short, s.long_side_px)
        if rng.random() < s.flip_prob:
            view = hflip(view)
        return view.take(visible(view.boxes))

    # ---- the set loss, object or not --------------------------------------------------------------------------

    def set_loss(self, detector: Detector) -> SetLoss:
        """The detector's own, with those weights that are set here."""
        s = self.settings
        weights: dict[str, Any] = {"class_weight": s.lambda_cls, "l1_weight": s.lambda_l1, "giou_weight": s.lambda_giou}
        return replace(detector.set_loss, **{name: value for name, value in weights.items() if value is not None})

    def targets(self, teacher: Net | None, views: Sequence[ViewBatch]) -> None:
        return None  # there is no teacher but the student's own frozen backbone

    def describe(self, net: Net, view: ViewBatch, wanted: Sequence[Target]) -> Tensor:
        """(M, C): what the backbone says of each box of ``wanted``, image by image."""
        s, boxes = self.settings, [target["boxes"] for target in wanted]
        return crops.describe(net.detector, view.images, boxes, stage=s.stage, px=s.crop_px, colour=s.colour)

    def found(
        self, student: Net, answers: Queries, objects: Objects, described: Tensor
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """Class, L1 and GIoU over all decoder layers, and over a first stage where there is one; and the matches.

        Needs the head ``f_cls``, a class layer of one class.
        """
        loss = self.set_loss(student.detector)
        logits = student.heads["f_cls"](answers.hidden)
        terms, matches = loss.with_matches(logits, answers.boxes_cxcywh, objects)
        terms |= loss.first_losses(answers.first, objects)
        scores = loss.probabilities(logits[-1].detach().float())[..., 0]
        self._answered = Answered(scores, answers.boxes_cxcywh[-1].detach(), matches[-1], objects, described)
        return terms, matches

    # ---- health -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def watch(self, views: Sequence[ViewBatch], targets: None) -> dict[str, Any]:
        """Of the last decoder layer and the last batch.

        ``objects``: boxes an image. ``matched_iou``: mean IoU of objects and the queries that answer for them.
        ``foreground``: of the k queries that are surest to have found something, k the image's objects, the share that
        do answer for one. ``spread``: how much the crops' descriptions differ, their standard deviation over their
        mean size.
        """
        if self._answered is None:
            return {}
        answered, described = self._answered, self._answered.described
        counts = answered.objects.counts
        watched: dict[str, Any] = {"objects": round(sum(counts) / len(counts), 3)}
        image, query, object_ = answered.matches
        if len(image):
            found = xyxy(answered.boxes_cxcywh.float()[image, query])
            wanted = xyxy(padded(answered.objects.boxes_cxcywh)[image, object_])
            watched["matched_iou"] = round(float(geometry.iou(found[:, None], wanted[:, None]).mean()), 4)
            ranks = answered.scores.argsort(dim=1, descending=True).argsort(dim=1)
            count = torch.tensor(counts, device=ranks.device)
            right = ranks[image, query] < count[image]
            watched["foreground"] = round(float(right.float().mean()), 4)
        if len(described) > 1:
            size = described.abs().mean().clamp(min=torch.finfo(described.dtype).tiny)
            watched["spread"] = round(float(described.std(dim=0).mean() / size), 4)
        return watched

    def warnings(self, watched: Mapping[str, Any]) -> str | None:
        if not watched:
            return None
        if not watched["objects"]:
            return (
                "no image of this batch has a box to find, so queries only learn that there is nothing: look at the "
                "proposals (headstart preview)"
            )
        if watched.get("spread", 1.0) < ALIKE:
            return (
                f"the backbone says nearly the same of every crop (spread {watched['spread']:.3f}), so there is little "
                "to learn from it: start from a trained backbone (--start), or describe boxes by another of its maps "
                "(--set method.stage)"
            )
        return None


ALIKE = 0.02  # spread of the crops' descriptions below which they tell nothing


def view_px(detector: Detector) -> tuple[int, int]:
    """Range of the views' short side: as released, or in proportion where the detector's own images are smaller."""
    low, high = SHORT_PX
    own, _ = detector.input_px
    return (low, high) if own >= high else (max(1, round(own * low / high)), own)


def detr_crop(view: View, rng: np.random.Generator) -> View:
    """DETR's crop of an image resized to a short side of 400, 500 or 600 px, cut from the image itself instead."""
    scale = min(view.size) / CUT_SHORT_PX[rng.integers(len(CUT_SHORT_PX))]
    low, high = (max(1, round(px * scale)) for px in CUT_PX)
    return random_size_crop(view, low, high, rng)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two layers, as wide as what goes in between them."""
    return nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(inplace=True), nn.Linear(inputs, outputs))


def place(view: ViewBatch, image: Tensor, box: Tensor) -> Tensor:
    """(M,) row of box ``box`` of ``image``, each (M,), where the boxes of all images follow one another."""
    counts = (view.ids >= 0).sum(dim=1)
    return (counts.cumsum(dim=0) - counts)[image] + box
