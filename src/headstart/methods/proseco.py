"""ProSeCo: Proposal-Contrastive Pretraining for Object Detection from Fewer Data (Bouniot et al., ICLR 2023).

https://arxiv.org/abs/2310.16835

A student and its moving average see one image in two colourings. What the teacher's queries answer are proposals, and
the student's are told apart by them; where things are, both learn from Selective Search. The backbone is frozen.

    Table 4           ProSeCo.views
    Eq. 1, 2          matched_proposals
    Eq. 3, 4          SetLoss.match, by boxes alone
    Eq. 5             ProSeCo.loss
    Eq. 6-12          losses.loc_sce
    Table 2b, 6       delta, loss          Table 3    train.batch_size, view_scale, tau_t, keep_rate
    Table 2a          --start              Table 9    the detector's number of queries

Written against what a detector can do (``query``), for any detector whose queries answer with boxes.

Where this file differs from the paper, or fills a gap:

* Eq. 2 adds the cosine to a cost that is minimised; it is taken off here. :mod:`headstart.losses` says what else of the
  printed equations is read otherwise.
* The K boxes are drawn among those that the crop has left, so that a crop does not cost objects; they and the sum of
  Eq. 5 are as many as there are where an image has fewer than K.
* Unstated: box losses are taken after every decoder layer, each with its own matching, as the detectors do; the
  contrast after the last (``contrast_layers``). The teacher has its dropout off. The learning rate never drops, as in
  DETReg's on ImageNet, and is the paper's at any batch size. The student is what is kept.
* The crop is cut from the image itself, not from one resized to a short side of 400, 500 or 600 px before.
* Sizes are the paper's in proportion to the detector's own input, whose short side stands for the paper's 800 px. The
  longest side, unstated, is DETR's 1333, and 600 with ``view_scale="mid"``, as in the works that range is taken from.
* A two-stage detector, which the paper does not have, learns its first stage from the same boxes, by its own set loss
  with a single class: nothing else would train what picks the queries.
* ``keep_rate`` is the paper's .999 for runs of 10 000 steps or more; shorter ones get less, see ``settle``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from headstart import boxes as geometry
from headstart.detectors.detector import Ability, Detector, Queries
from headstart.detectors.set_loss import Objects, objects_in_all
from headstart.losses import loc_sce
from headstart.matching import giou_cost, hungarian, l1_cost, similarity_cost, xyxy
from headstart.methods.method import Method, Net, ViewBatch
from headstart.methods.query_method import detr_crop
from headstart.optim import OptimSettings
from headstart.settings import Settings
from headstart.views import Photometric, View, hflip, resize_short, visible

SHORT_PX = 800  # the short side that the paper's sizes belong to
SCALES = {"mid": range(320, 481, 16), "large": range(480, 801, 32)}  # short sides, px
LONG_PX = {"mid": 600, "large": 1333}
PAPER_KEEP_RATE = 0.999
FOUND_IOU = 0.5  # of a sampled box with a teacher's, for the log


class ProSeCoSettings(Settings):
    """Symbols are the paper's, where it has some."""

    loss: Literal["locsce", "locnce"] = Field(
        "locsce", description="contrast: locsce, or locnce (Eq. 12); with delta = 1 they are SCE and InfoNCE"
    )
    delta: float = Field(
        0.5, ge=0, le=1, description="IoU from which a teacher's other boxes are positives too; 1: none are"
    )
    tau: float = Field(0.1, gt=0, description="temperature between student and teacher")
    tau_t: float = Field(0.07, gt=0, description="temperature between the teacher's own objects")
    lambda_sce: float = Field(0.5, ge=0, le=1, description="share of the positives in the wanted similarities")
    lambda_sim: float = Field(2.0, ge=0, description="cost of the cosine in the proposals' matching")
    lambda_coord: float = Field(5.0, ge=0, description="L1 of boxes: cost in both matchings, weight in the loss")
    lambda_giou: float = Field(2.0, ge=0, description="1 - GIoU of boxes: cost in both matchings, weight in the loss")
    lambda_contrast: float = Field(2.0, ge=0, description="weight of the contrast")
    contrast_layers: Literal["last", "all"] = Field(
        "last", description="decoder layers whose answers are contrasted; all: the sum over them"
    )
    keep_rate: float | None = Field(
        None, ge=0, le=1, description="EMA momentum of the teacher (paper: 0.999). Unset: from the number of steps"
    )
    K: int = Field(30, ge=1, description="proposals an image, drawn at random among those in the view")
    view_scale: Literal["mid", "large"] = Field(
        "large", description="sizes of the views: 480 to 800 px (large), or 320 to 480"
    )
    short_side_px: int | None = Field(
        None, ge=16, description="what the paper's short side of 800 px is here, px. Unset: the detector's own"
    )
    hidden: int = Field(4096, ge=1, description="hidden width of the projector")
    dim: int = Field(256, ge=1, description="width of the embeddings z")


@dataclass
class Proposals:
    """Objects of B images as one network finds them, after each decoder layer that is contrasted.

    Attributes:
        z: (L, B, N, D) of length 1.
        boxes_cxcywh: (L, B, N, 4) in shares of each image.
    """

    z: Tensor
    boxes_cxcywh: Tensor


class ProSeCo(Method[ProSeCoSettings]):
    """Proposal contrast of everything behind a frozen backbone, and boxes from Selective Search."""

    name = "proseco"
    settings_type = ProSeCoSettings
    paper = "https://arxiv.org/abs/2310.16835"
    epochs = 10
    detector = "deformable_detr"
    multiple_px = 32  # as in the detectors' own batches
    needs: ClassVar[Mapping[Ability, str]] = {"query": "trains on what a detector's queries answer"}

    def __init__(self, settings: ProSeCoSettings) -> None:
        super().__init__(settings)
        self.photometric = Photometric(saturation=0.4, blur_prob=0.5, solarise_prob=0.0)

    # ---- what is chosen for the user --------------------------------------------------------------------------

    def settle(self, detector: Detector, total_steps: int) -> list[str]:
        s = self.settings
        if s.short_side_px is None:
            s.short_side_px = detector.input_px[0]
        if s.keep_rate is not None:
            return []
        # The paper's .999 averages over 1000 of 187 000 steps; a run of a few hundred would contrast the student with
        # the random start of its teacher until the end.
        s.keep_rate = float(np.clip(1 - 10 / max(1, total_steps), 0.9, PAPER_KEEP_RATE))
        return [f"keep_rate = {s.keep_rate:.3f}: for {total_steps} steps (paper: {PAPER_KEEP_RATE} for 187 000)"]

    def optimizer(self, detector: Detector, batch_size: int) -> OptimSettings:
        """As the detector is fine-tuned, at its rate whatever the batch: Adam's steps do not grow with it."""
        tuning = detector.tuning()
        factors = {name: factor for name, factor in (tuning.lr_scale or {}).items() if name != "backbone"}
        changed = {"base_batch": batch_size, "schedule": "constant", "warmup_steps": 0, "lr_scale": factors}
        return tuning.model_copy(update=changed)

    def batch_size(self, detector: Detector, memory_gib: float) -> int:
        """At most the paper's 64; about 5 GiB hold an image of 800 x 1333 px, and smaller ones in proportion."""
        short, long = detector.input_px
        return int(min(64, 2 ** np.floor(np.log2(max(2, memory_gib / 5 * (800 * 1333) / (short * long))))))

    def px(self, of_paper: int) -> int:
        """A length of the paper's as long as it is here."""
        assert self.settings.short_side_px is not None
        return max(1, round(of_paper * self.settings.short_side_px / SHORT_PX))

    @property
    def decode_px(self) -> int:
        return self.px(max(SCALES[self.settings.view_scale]))

    @property
    def needs_proposals(self) -> bool:
        return True

    def needs_start(self, detector: Detector) -> str | None:
        return "freezes the backbone, so it has to be a trained one (the paper's best has learnt local features)"

    def trained_parts(self, detector: Detector) -> Sequence[str]:
        return [part for part in detector.parts if part not in ("backbone", "classifier")]

    def exported_parts(self, detector: Detector) -> Sequence[str]:
        """All but the class layer, whose place the projector had."""
        return [part for part in detector.parts if part != "classifier"]

    # ---- section 3.1, Table 4 -----------------------------------------------------------------------------------

    def views(self, image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> list[View]:
        """The weak one, and the same in other colours."""
        weak = self.weak(View(image, boxes, np.arange(len(boxes))), rng)
        (inside,) = visible(weak.boxes).nonzero()
        if len(inside) > self.settings.K:
            inside = np.sort(rng.choice(inside, self.settings.K, replace=False))
        weak = weak.take(inside)
        return [weak, View(self.photometric(weak.image, rng), weak.boxes, weak.ids)]

    def weak(self, view: View, rng: np.random.Generator) -> View:
        scale = self.settings.view_scale
        if rng.random() < 0.5:
            view = hflip(view)
        if rng.random() < 0.5:
            view = detr_crop(view, rng)
        return resize_short(view, self.px(int(rng.choice(SCALES[scale]))), self.px(LONG_PX[scale]))

    # ---- section 3.2 ------------------------------------------------------------------------------------------

    def heads(self, detector: Detector) -> nn.ModuleDict:
        s = self.settings
        layers = nn.Linear(detector.query_width, s.hidden), nn.ReLU(inplace=True), nn.Linear(s.hidden, s.dim)
        return nn.ModuleDict({"projector": nn.Sequential(*layers)})

    @property
    def teacher_heads(self) -> Sequence[str]:
        return ("projector",)

    def momentum(self, step: int, total_steps: int) -> float:
        keep_rate = self.settings.keep_rate
        return PAPER_KEEP_RATE if keep_rate is None else keep_rate

    def described(self, net: Net, found: Queries) -> Proposals:
        """What is contrasted of what the queries answer."""
        layers = slice(None) if self.settings.contrast_layers == "all" else slice(-1, None)
        z = F.normalize(net.heads["projector"](found.hidden[layers]).float(), dim=-1)
        return Proposals(z, found.boxes_cxcywh[layers].float())

    def targets(self, teacher: Net | None, views: Sequence[ViewBatch]) -> Proposals:
        assert teacher is not None
        teacher.eval()  # dropout; batch norm is the frozen backbone's alone
        return self.described(teacher, teacher.detector.queries(views[0].images, views[0].sizes))

    def loss(self, student: Net, views: Sequence[ViewBatch], targets: Proposals) -> dict[str, Tensor]:
        """Eq. 5."""
        found = student.detector.queries(views[1].images, views[1].sizes)
        terms = {"contrast": self.contrast(self.described(student, found), targets)}
        terms |= self.box_losses(student.detector, found, Objects.of(views[1].targets(), views[1].sizes))
        return terms

    def contrast(self, student: Proposals, teacher: Proposals) -> Tensor:
        """Eq. 10 of the pairs of Eq. 1, summed over the layers that are contrasted."""
        s = self.settings
        sigma = matched_proposals(
            *(values.flatten(0, 1) for values in (teacher.z, teacher.boxes_cxcywh, student.z, student.boxes_cxcywh)),
            s.lambda_sim,
            s.lambda_coord,
            s.lambda_giou,
        ).view(teacher.z.shape[:3])
        each = [
            loc_sce(
                student.z[layer],
                teacher.z[layer],
                sigma[layer],
                xyxy(teacher.boxes_cxcywh[layer]),
                tau=s.tau,
                tau_t=s.tau_t,
                lambda_sce=s.lambda_sce if s.loss == "locsce" else 1.0,
                delta=s.delta,
            )
            for layer in range(len(sigma))
        ]
        return s.lambda_contrast * torch.stack(each).sum()

    def box_losses(self, detector: Detector, found: Queries, objects: Objects) -> dict[str, Tensor]:
        """Eq. 3 and 4, and the sums of Eq. 5, over the decoder's layers; and the first stage's, where there is one."""
        s = self.settings
        set_loss = dataclasses.replace(
            detector.set_loss,
            l1_cost=s.lambda_coord,
            giou_cost=s.lambda_giou,
            l1_weight=s.lambda_coord,
            giou_weight=s.lambda_giou,
        )
        boxes, every = found.boxes_cxcywh.flatten(0, 1).float(), objects.repeated(len(found.boxes_cxcywh))
        with torch.autocast(boxes.device.type, enabled=False):
            matches = set_loss.match(None, boxes, every)
            terms = set_loss.box_losses(boxes, matches, every, objects_in_all(objects, boxes))
        return {**terms, **set_loss.first_losses(found.first, objects)}

    # ---- health -----------------------------------------------------------------------------------------------

    def watch(self, views: Sequence[ViewBatch], targets: Proposals) -> dict[str, Any]:
        """``embedding_std``: spread of the teacher's embeddings, 1 when spread evenly, 0 when collapsed.

        ``positives``: other boxes of the teacher that overlap one of its own enough, of an image's N - 1 on average;
        the contrast is a sum over them, and rises with them;
        ``found``: share of the sampled boxes that one of the teacher's overlaps by an IoU of 0.5 or more.
        """
        z, boxes = targets.z[-1], xyxy(targets.boxes_cxcywh[-1])
        watched = {"positives": 0.0}
        if self.settings.delta < 1:
            overlapping = (geometry.iou(boxes, boxes) >= self.settings.delta).sum(dim=-1)
            watched["positives"] = round(float((overlapping - 1).clamp(min=0).float().mean()), 2)
        wanted = Objects.of(views[0].targets(), views[0].sizes).boxes_cxcywh
        best = torch.cat([geometry.iou(xyxy(k), b).amax(dim=1) for k, b in zip(wanted, boxes, strict=True)])
        if len(best):
            watched["found"] = round(float((best >= FOUND_IOU).float().mean()), 3)
        if z.shape[0] * z.shape[1] > 1:
            watched["embedding_std"] = round(float(z.flatten(0, 1).std(dim=0).mean() * math.sqrt(z.shape[-1])), 4)
        return watched

    def warnings(self, watched: Mapping[str, Any]) -> str | None:
        if watched.get("embedding_std", 1.0) >= 0.05:
            return None
        return (
            f"the embeddings have collapsed: their spread is {watched['embedding_std']:.3f} (1 is even, 0 is one "
            "point). Try a lower learning rate (--set optim.lr), a higher method.keep_rate or a larger batch"
        )


@torch.no_grad()
def matched_proposals(
    z: Tensor,
    boxes_cxcywh: Tensor,
    z_student: Tensor,
    boxes_student_cxcywh: Tensor,
    lambda_sim: float,
    lambda_coord: float,
    lambda_giou: float,
) -> Tensor:
    """Eq. 1: which of an image's N answers of the student each of the teacher's N is matched to, (B, N) int64.

    Args:
        z, z_student: (B, N, D).
        boxes_cxcywh, boxes_student_cxcywh: (B, N, 4), shares of the image.
    """
    with torch.autocast(z.device.type, enabled=False):
        cost = lambda_sim * similarity_cost(z, z_student)  # Eq. 2
        cost += lambda_coord * l1_cost(boxes_cxcywh, boxes_student_cxcywh)
        cost += lambda_giou * giou_cost(xyxy(boxes_cxcywh), xyxy(boxes_student_cxcywh))
        _, _, sigma = hungarian(cost, [cost.shape[2]] * len(cost))
    return sigma.view(cost.shape[:2])
