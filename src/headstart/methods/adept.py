"""ADePT: Label-Efficient Object Detection via Region Proposal Network Pre-Training (Dong et al., 2022).

https://arxiv.org/abs/2211.09022

SoCo (:mod:`headstart.methods.soco`) plus a trained RPN.

    Section 3.2, Eq. 1   L_RPN against K Selective Search boxes      ADePT.rpn_loss
    Eq. 2-7              L_det, which is SoCo's loss                 ADePT.loss
    Eq. 8                L = L_RPN + L_det                           ADePT.loss
    Section 4.1.3        anchors of 24, 48, 96, 192 px on P2..P5     ADePT.settle
    Section 4.2          separate and joint training                 ADePTSettings.training
    Table 4, four rows   ADePTSettings.rpn_into_backbone x ADePTSettings.boxes

Where this file differs from the paper, or fills a gap:

* The paper does not say on which views the RPN is trained: V1 and V2, which have the same size. Its boxes are without
  SoCo's jitter, and those of which a crop leaves next to nothing are left out.
* With ``boxes="ss_rpn"`` (Table 4) the paper does not say how a box of the RPN gets from one view to the others: the
  RPN looks at V1, and its boxes follow V1's crop and flip. One that is not visible in all views is replaced by one of
  Selective Search's. They come from the teacher's RPN, the moving average of the student's, since both networks have
  to describe the same boxes.
* Kept is the target branch, as the paper says; its RPN is the student's, since the paper's target has none.
* Batch size and weight decay are not given: SoCo's. LARS at 0.1 for a batch of 2048 (the paper's learning rate).
* Separate training needs no views but V1 and V2, and no teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from headstart.detectors.detector import Ability, Detector, Features
from headstart.errors import SettingsError
from headstart.methods.method import Net, ViewBatch
from headstart.methods.soco import PAPER_VIEW_PX, SoCo, SoCoSettings, symmetric
from headstart.optim import OptimSettings
from headstart.views import View

PAPER_ANCHOR_PX = (24.0, 48.0, 96.0, 192.0)
BEFORE_NMS = 64  # boxes of the RPN before NMS, section 4.1.3
RPN_VIEWS = 2
SEEN_PX = 1.0  # a box of the RPN counts as visible from this side on


class ADePTSettings(SoCoSettings):
    training: Literal["joint", "separate"] = Field(
        "joint", description="joint: everything, from scratch; separate: the RPN alone, on a frozen SoCo (--start)"
    )
    rpn_into_backbone: bool = Field(
        False, description="the RPN's loss trains backbone and FPN too (Table 4: costs half a point)"
    )
    boxes: Literal["ss", "ss_rpn"] = Field(
        "ss", description="boxes of L_det: Selective Search's, or the RPN's as well (Table 4: destroys the training)"
    )
    rpn_weight: float = Field(1.0, ge=0, description="weight of L_RPN against L_det (Eq. 8: 1)")
    anchor_px: list[list[PositiveFloat]] | None = Field(
        None,
        description="sides of the RPN's anchors on each map, view px. Unset: the paper's 24, 48, 96, 192 at 224 px, in "
        "proportion to view_px",
    )
    export: Literal["target", "online"] = Field(
        "target", description="which branch is kept (paper: target; SoCo: online)"
    )


@dataclass
class Targets:
    """Attributes:
    views: the views whose boxes the student has to describe.
    z: the teacher's embeddings of them, one a view.
    """

    views: Sequence[ViewBatch]
    z: list[Tensor]


class ADePT(SoCo):
    """SoCo's loss for backbone, FPN and head; Eq. 1 for the RPN, whose ground truth are Selective Search boxes."""

    name = "adept"
    settings_type = ADePTSettings
    settings: ADePTSettings
    paper = "https://arxiv.org/abs/2211.09022"
    needs: ClassVar[Mapping[Ability, str]] = {**SoCo.needs, "propose": "trains an RPN"}

    # ---- what is chosen for the user --------------------------------------------------------------------------

    @property
    def separate(self) -> bool:
        return self.settings.training == "separate"

    def settle(self, detector: Detector, total_steps: int) -> list[str]:
        s = self.settings
        if s.instances != "proposals":
            raise SettingsError(f"adept's RPN learns from proposals; method.instances={s.instances} has none")
        if s.view_px % 32:
            raise SettingsError(f"method.view_px={s.view_px}: anchors on maps of stride 32 need a multiple of 32")
        if not s.fpn or not s.head:
            raise SettingsError("adept trains the detector whole; method.fpn and method.head belong to soco")
        if self.separate and (s.rpn_into_backbone or s.boxes != "ss"):
            raise SettingsError(
                "method.training=separate freezes everything but the RPN; rpn_into_backbone and boxes=ss_rpn are for "
                "method.training=joint"
            )
        notes = []
        if self.separate:
            if s.star or s.v3 not in (None, "none"):
                notes.append("v3 = none, star = off: the RPN is trained on V1 and V2")
            s.v3, s.star = "none", False
        settled = super().settle(detector, total_steps)
        notes += [] if self.separate else settled  # those are about a loss that is not used
        if s.anchor_px is None:
            s.anchor_px = self._anchors(detector)
        wanted = [len(level) for level in detector.anchor_px]
        if [len(level) for level in s.anchor_px] != wanted:
            raise SettingsError(
                f"method.anchor_px: {[len(level) for level in s.anchor_px]} sides on the maps, but the RPN has layers "
                f"for {wanted}"
            )
        return notes

    def _anchors(self, detector: Detector) -> list[list[float]]:
        own = detector.anchor_px
        if [len(level) for level in own] == [1] * len(PAPER_ANCHOR_PX):
            return [[side * self.settings.view_px / PAPER_VIEW_PX] for side in PAPER_ANCHOR_PX]
        # Not the paper's four levels (C4 has one): the detector's own sides, as much smaller as the views are.
        short_px, _ = detector.input_px
        return [[side * self.settings.view_px / short_px for side in level] for level in own]

    def optimizer(self, detector: Detector, batch_size: int) -> OptimSettings:
        advised = super().optimizer(detector, batch_size)
        if advised.optimizer == "lars":
            advised.base_lr, advised.base_batch, advised.warmup_epochs = 0.1, 2048, 0
        elif self.separate:
            # The RPN alone bears, and needs, more than SoCo's rate: on blood cells 3e-4 left it at its base rate.
            advised.base_lr, advised.base_batch = 2e-3, batch_size
        return advised

    def needs_start(self, detector: Detector) -> str | None:
        return "with training=separate trains the RPN on frozen features of a SoCo run" if self.separate else None

    def trained_parts(self, detector: Detector) -> Sequence[str]:
        return ["rpn"] if self.separate else [*super().trained_parts(detector), "rpn"]

    def exported_parts(self, detector: Detector) -> Sequence[str]:
        return [part for part in detector.parts if part in ("backbone", "neck", "rpn", "head")]

    def exported_from_teacher(self, detector: Detector) -> Sequence[str]:
        if self.separate or self.settings.export == "online":
            return ()
        return super().trained_parts(detector)

    def momentum(self, step: int, total_steps: int) -> float | None:
        return None if self.separate else super().momentum(step, total_steps)

    def heads(self, detector: Detector) -> nn.ModuleDict:
        return nn.ModuleDict() if self.separate else super().heads(detector)

    @property
    def teacher_heads(self) -> Sequence[str]:
        return () if self.separate else super().teacher_heads

    def crops(self, v1: View, rng: np.random.Generator) -> list[View]:
        return super().crops(v1, rng)[:1] if self.separate else super().crops(v1, rng)

    @property
    def title(self) -> str:
        return "adept separate" if self.separate else "adept"

    def export_notes(self) -> list[str]:
        s = self.settings
        assert s.anchor_px is not None
        sides = ", ".join("/".join(f"{side:g}" for side in level) for level in s.anchor_px)
        return [
            f"the RPN was trained on anchors of {sides} px on its maps, in views of {s.view_px} px; its layers fit any "
            f"anchors of as many shapes a cell ({3 * len(s.anchor_px[0])})"
        ]

    # ---- boxes: K as the head gets them, jittered, then the same K as they were found, for the RPN ---------------

    def marked(self, view: View, rng: np.random.Generator, jitter: bool) -> View:
        det = super().marked(view, rng, jitter)
        boxes, ids = np.concatenate([det.boxes, view.boxes]), np.concatenate([det.ids, view.ids])
        return View(view.image, boxes, ids, view.frame)

    def for_head(self, view: ViewBatch) -> ViewBatch:
        return replace(view, boxes=view.boxes[:, : self.settings.K], ids=view.ids[:, : self.settings.K])

    def for_rpn(self, view: ViewBatch) -> list[Tensor]:
        """(k, 4) an image; k may be 0."""
        s = self.settings
        assert s.anchor_px is not None
        least = min(side for level in s.anchor_px for side in level) / 4
        boxes = view.boxes[:, s.K :]
        large = ((boxes[..., 2:] - boxes[..., :2]) >= least).all(dim=-1)
        return [b[keep] for b, keep in zip(boxes, large, strict=True)]

    # ---- Eq. 1 ------------------------------------------------------------------------------------------------

    def rpn_loss(self, net: Net, views: Sequence[ViewBatch], maps: Sequence[Features]) -> dict[str, Tensor]:
        """L_RPN, mean over V1 and V2: objectness and boxes apart."""
        s = self.settings
        assert s.anchor_px is not None
        found = []
        for view, features in list(zip(views, maps, strict=True))[:RPN_VIEWS]:
            if not s.rpn_into_backbone:
                features = {name: map_.detach() for name, map_ in features.items()}
            found.append(net.detector.rpn_loss(features, self.for_rpn(view), view.size, s.anchor_px))
        return {name: s.rpn_weight * torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    # ---- Eq. 2-8 ----------------------------------------------------------------------------------------------

    def targets(self, teacher: Net | None, views: Sequence[ViewBatch]) -> Targets | None:  # type: ignore[override]
        if teacher is None:
            return None
        maps = [teacher.detector.features(view.images) for view in views]
        views = [self.for_head(view) for view in views]
        if self.settings.boxes == "ss_rpn":
            views = self.with_rpn_boxes(teacher, views, maps[0])
        return Targets(views, [self.describe(teacher, view, m) for view, m in zip(views, maps, strict=True)])

    def loss(self, student: Net, views: Sequence[ViewBatch], targets: Targets | None) -> dict[str, Tensor]:  # type: ignore[override]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.separate):
            maps = [student.detector.features(view.images) for view in views]
        rpn = self.rpn_loss(student, views, maps)
        if targets is None:
            return rpn
        described = [self.describe(student, view, m) for view, m in zip(targets.views, maps, strict=True)]
        v = [student.heads["q"](z) for z in described]
        return {"align": symmetric(v, targets.z), **rpn}

    def with_rpn_boxes(self, net: Net, views: Sequence[ViewBatch], maps: Features) -> list[ViewBatch]:
        """``views`` with K more boxes each: the RPN's best on V1 (whose features are ``maps``), in every view.

        A place where the RPN has no box, or one that some view does not show, holds a Selective Search box again.
        """
        s, first = self.settings, views[0]
        assert s.anchor_px is not None
        found = net.detector.rpn_boxes(maps, first.size, s.anchor_px, BEFORE_NMS, s.K)
        rpn = torch.zeros_like(first.boxes)  # no area: not visible
        for row, boxes in zip(rpn, found, strict=True):
            row[: len(boxes)] = boxes
        moved = [carry(rpn, first, view) for view in views]
        seen = torch.stack([((b[..., 2:] - b[..., :2]) >= SEEN_PX).all(dim=-1) for b in moved]).all(dim=0)
        return [
            replace(
                view,
                boxes=torch.cat([view.boxes, torch.where(seen[..., None], boxes, view.boxes)], dim=1),
                ids=torch.cat([view.ids, view.ids], dim=1),
            )
            for view, boxes in zip(views, moved, strict=True)
        ]

    # ---- health -----------------------------------------------------------------------------------------------

    def watch(self, views: Sequence[ViewBatch], targets: Targets | None) -> dict[str, Any]:  # type: ignore[override]
        return {} if targets is None else super().watch(views, targets.z)

    def warnings(self, watched: Mapping[str, Any]) -> str | None:
        return super().warnings(watched) if watched else None


def carry(boxes: Tensor, source: ViewBatch, target: ViewBatch) -> Tensor:
    """``boxes`` (B, K, 4) xyxy px of ``source`` as they lie in ``target``, clipped to it."""
    a, b = source.frames[:, None], target.frames[:, None]  # (B, 1, 4)
    share = (boxes - a[..., [0, 1, 0, 1]]) / (a[..., 2:] - a[..., :2])[..., [0, 1, 0, 1]]
    there = b[..., [0, 1, 0, 1]] + share * (b[..., 2:] - b[..., :2])[..., [0, 1, 0, 1]]
    low, high = torch.minimum(there[..., :2], there[..., 2:]), torch.maximum(there[..., :2], there[..., 2:])
    height, width = target.size
    return torch.cat([low, high], dim=-1).clamp(min=0).minimum(low.new_tensor([width, height, width, height]))
