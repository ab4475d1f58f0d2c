"""AlignDet: Aligning Pre-training and Fine-tuning in Object Detection (Li et al., ICCV 2023).

https://arxiv.org/abs/2307.11077

Two stages. Image domain: the backbone comes pretrained, from anywhere (``--start``). Box domain, this file: the
backbone is frozen, everything behind it learns to find Selective Search boxes and to tell them apart.

    Algorithm II, aug                 AlignDet.views
    Algorithm II, f_reg, loss_reg     the detector's own, Detector.match
    B.5, pseudo-semantic labels       AlignDet.pseudo_classes, verbs/pseudo_classes.py; their loss: Detector.match
    Algorithm II, f_con, g            Detector.match on Detector.projector, in the class layer's place
    Algorithm II, loss_con            info_nce
    Algorithm II, ema_update          AlignDet.momentum

Written against what a detector can do (``match``), for any detector that can say which of its predictions answers for
which box.

Where this file differs from the paper, or fills a gap:

* Algorithm II regresses the boxes of both views, the released code those of the online network alone: the default
  (``regress="both"`` is the paper's text).
* Labels of the contrast are the proposals' own numbers, over all processes; the released code's collide beyond 256.
* At most ``most`` predictions take part, over the whole batch of a process (the paper's numbers, where a GPU held
  two images).
* The numbers that depend on the detector are its own advice (``Detector.match_advice``): those of the supplement, and
  Deformable DETR, which the paper does not have, as DETR; only where its queries look has a tenth of the rate.
* AdamW's rate is the paper's whatever the batch.
* With queries, the last decoder layer's answers are contrasted; the released code pools those of all layers.
* The papers' learning rates (.1, .2) are not what the released configurations say (.01 for RetinaNet and FCOS, .02 for
  R-CNN at a batch of 16); these are the defaults.
* The photometric operations are not listed in the supplement: colour jitter, grey and blur, MoCo v2's.
* The teacher keeps its dropout, where the detector has any: nothing says otherwise.
* K-means (scikit-learn's, plain) sees a sample of the proposals, 200 a cluster; crops of 128 px, as DETReg's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from headstart import distributed
from headstart.detectors.detector import Ability, Detector, Matched
from headstart.ema import cosine_momentum
from headstart.errors import SettingsError
from headstart.methods.method import Method, Net, ViewBatch
from headstart.optim import OptimSettings
from headstart.settings import Settings
from headstart.views import Photometric, View, hflip, resize_short, visible

PAPER_TAU = 0.996


class AlignDetSettings(Settings):
    """Symbols are the paper's, where it has some."""

    T: float = Field(0.5, gt=0, description="temperature of the contrast")
    tau: float | None = Field(
        None,
        ge=0,
        le=1,
        description="EMA momentum of neck_k, head_k at the start; ends at 1 along a cosine. Paper: 0.996. Unset: from "
        "the number of steps",
    )
    K: int | None = Field(
        None,
        ge=1,
        description="proposals an image, drawn at random. Unset: as the detector advises, 50 with queries (released: "
        "50 for RetinaNet too), else all",
    )
    most: int | None = Field(
        None,
        ge=1,
        description="predictions a process's batch in the contrast. Unset: as the detector advises, 2048 of dense "
        "ones, else 4096",
    )
    clusters: int | None = Field(
        None,
        ge=0,
        description="pseudo classes: clusters of what the frozen backbone says of the proposals. 0: none. Unset: as "
        "the detector advises, 256 with queries, else 0",
    )
    crop_px: int = Field(128, ge=32, description="side of the squares that proposals are cut out as for that, px")
    regress: Literal["online", "both"] = Field(
        "online", description="views whose boxes are regressed: the online network's own (released), or both (paper)"
    )
    contrast_weight: float = Field(1.0, ge=0, description="weight of the contrast")
    regress_weight: float = Field(1.0, ge=0, description="weight of the detector's own losses")
    short_side_px: tuple[int, int] | None = Field(
        None, description="range of the views' short side, px. Unset: 0.8 to 1 x the detector's (paper: 640 to 800)"
    )
    long_side_px: int | None = Field(None, description="the views' longest side, px. Unset: the detector's")
    colour: float = Field(1.0, ge=0, le=1, description="strength of the colour augmentation")
    hidden: int = Field(256, ge=1, description="hidden width of the projection g")
    dim: int = Field(256, ge=1, description="width of the embeddings z")

    @model_validator(mode="after")
    def _smaller_first(self) -> Self:
        if self.short_side_px is not None and not 0 < self.short_side_px[0] <= self.short_side_px[1]:
            raise ValueError(f"short_side_px: {self.short_side_px}; expected two sides above 0, the smaller first")
        return self


class AlignDet(Method[AlignDetSettings]):
    """Box-domain pretraining of everything behind a frozen backbone."""

    name = "aligndet"
    settings_type = AlignDetSettings
    paper = "https://arxiv.org/abs/2307.11077"
    epochs = 12
    multiple_px = 32  # the stride of the coarsest map that anchors are laid on evenly
    proposals: ClassVar[Mapping[str, Any]] = {"nms_iou": 0.5}  # supplement D.1
    needs: ClassVar[Mapping[Ability, str]] = {"match": "trains on the predictions that answer for a box"}

    def __init__(self, settings: AlignDetSettings) -> None:
        super().__init__(settings)
        c = settings.colour
        self.photometric = Photometric(
            brightness=0.4 * c,
            contrast=0.4 * c,
            saturation=0.4 * c,
            hue=0.1 * c,
            grey_prob=0.2 * c,
            blur_prob=0.5,
            solarise_prob=0.0,
        )

    # ---- what is chosen for the user --------------------------------------------------------------------------

    def settle(self, detector: Detector, total_steps: int) -> list[str]:
        s = self.settings
        short, long = detector.input_px
        if s.short_side_px is None:
            s.short_side_px = (round(0.8 * short), short)
        if s.long_side_px is None:
            s.long_side_px = long
        advice = detector.match_advice
        if s.most is None:
            s.most = advice.most
        if s.K is None:
            s.K = advice.boxes
        if s.clusters is None:
            s.clusters = advice.classes
        elif s.clusters and not advice.classes:
            raise SettingsError(
                f"method.clusters={s.clusters}: a {detector.family} matches by where boxes are alone; expected 0"
            )
        if s.tau is not None:
            return []
        # The paper's .996 averages over 250 of some 88 000 steps. In a run of a few hundred the teacher would stay at
        # its random start: on blood cells the contrast did not fall in 160 steps, and with .9 it did.
        s.tau = float(np.clip(1 - 10 / max(1, total_steps), 0.9, PAPER_TAU))
        return [f"tau = {s.tau:.3f} -> 1: for {total_steps} steps (paper: {PAPER_TAU} for 88 000)"]

    def optimizer(self, detector: Detector, batch_size: int) -> OptimSettings:
        """The detector's advice; Adam's rate whatever the batch: its steps do not grow with it."""
        advised = detector.match_advice.optim
        return advised.model_copy(update={"base_batch": batch_size}) if advised.optimizer == "adamw" else advised

    def length(self, detector: Detector) -> float:
        return detector.match_advice.epochs

    def batch_size(self, detector: Detector, memory_gib: float) -> int:
        """At most the paper's; about 4 GiB hold an image of 800 x 1333 px, and smaller ones in proportion."""
        short, long = detector.input_px
        return int(
            min(
                detector.match_advice.batch,
                2 ** np.floor(np.log2(max(2, memory_gib / 4 * (800 * 1333) / (short * long)))),
            )
        )

    @property
    def decode_px(self) -> int:
        assert self.settings.short_side_px is not None
        return self.settings.short_side_px[1]

    @property
    def needs_proposals(self) -> bool:
        return True

    def needs_start(self, detector: Detector) -> str | None:
        return "freezes the backbone, so it has to be a trained one"

    def trained_parts(self, detector: Detector) -> Sequence[str]:
        return [
            part for part in detector.parts if part == "regressor" or part not in ("backbone", *detector.class_parts)
        ]

    @property
    def pseudo_classes(self) -> tuple[int, int] | None:
        return (self.settings.clusters, self.settings.crop_px) if self.settings.clusters else None

    def exported_parts(self, detector: Detector) -> Sequence[str]:
        """Without what depends on the classes, of which there are none yet."""
        return [part for part in detector.parts if part not in detector.class_parts]

    # ---- augmentation: two independent standard ones, no crop ---------------------------------------------------

    def views(self, image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> list[View]:
        s = self.settings
        ids = np.flatnonzero(visible(boxes))
        if s.K is not None and len(ids) > s.K:
            ids = np.sort(rng.choice(ids, s.K, replace=False))
        return [self.augment(View(image, boxes[ids], ids), rng) for _ in range(2)]

    def augment(self, view: View, rng: np.random.Generator) -> View:
        s = self.settings
        assert s.short_side_px is not None
        assert s.long_side_px is not None
        low, high = s.short_side_px
        view = resize_short(view, int(rng.integers(low, high + 1)), s.long_side_px)
        view = View(self.photometric(view.image, rng), view.boxes, view.ids)
        return hflip(view) if rng.random() < 0.5 else view

    # ---- Algorithm II -----------------------------------------------------------------------------------------

    def heads(self, detector: Detector) -> nn.ModuleDict:
        s = self.settings
        return nn.ModuleDict({"g": detector.projector(s.hidden, s.dim, s.clusters or 0)})

    @property
    def teacher_heads(self) -> Sequence[str]:
        return ("g",)

    def momentum(self, step: int, total_steps: int) -> float:
        tau = self.settings.tau
        return cosine_momentum(step, total_steps, PAPER_TAU if tau is None else tau)

    def predict(self, net: Net, view: ViewBatch, losses: bool) -> Matched:
        assert self.settings.most is not None
        return net.detector.match(
            view.images, view.sizes, view.targets(), net.heads["g"], self.settings.most, losses=losses
        )

    def targets(self, teacher: Net | None, views: Sequence[ViewBatch]) -> Matched:
        assert teacher is not None
        return self.predict(teacher, views[1], losses=False)

    def loss(self, student: Net, views: Sequence[ViewBatch], targets: Matched) -> dict[str, Tensor]:
        s = self.settings
        online = self.predict(student, views[0], losses=True)
        regressed = dict(online.losses)
        if s.regress == "both":
            other = self.predict(student, views[1], losses=True)
            regressed = {name: (loss + other.losses[name]) / 2 for name, loss in regressed.items()}
        z1, z2 = (F.normalize(matched.embeddings.float(), dim=-1) for matched in (online, targets))
        with torch.autocast(z1.device.type, enabled=False):  # similarities of thousands need more than 8 bits
            contrast = info_nce(z1, z2, numbers(online, views[0]), numbers(targets, views[1]), s.T)
        return {
            "contrast": s.contrast_weight * contrast,
            **{name: s.regress_weight * loss for name, loss in regressed.items()},
        }

    # ---- health -----------------------------------------------------------------------------------------------

    def watch(self, views: Sequence[ViewBatch], targets: Matched) -> dict[str, Any]:
        """``embedding_std``: spread of the normalised target embeddings, 1 when spread evenly, 0 when collapsed.

        ``matched``: predictions a proposal; ``answered``: share of the proposals that have any.
        """
        proposals = max(1, int((views[1].ids >= 0).sum()))
        answered = len(torch.unique(numbers(targets, views[1])))
        watched = {
            "matched": round(len(targets.box) / proposals, 3),
            "answered": round(answered / proposals, 3),
        }
        if len(targets.box) > 1:
            z = F.normalize(targets.embeddings.float(), dim=-1)
            watched["embedding_std"] = round(float(z.std(dim=0).mean() * math.sqrt(z.shape[1])), 4)
        return watched

    def warnings(self, watched: Mapping[str, Any]) -> str | None:
        if watched["answered"] == 0:
            return (
                "no prediction answers for any proposal, so nothing but the RPN learns: the proposals' sizes don't fit "
                "the detector's anchors (detector.anchor_px) at this image size"
            )
        if watched.get("embedding_std", 1.0) >= 0.05:
            return None
        return (
            f"the embeddings have collapsed: their spread is {watched['embedding_std']:.3f} (1 is even, 0 is one "
            "point). Try a lower learning rate (--set optim.lr) or a longer warm-up (--set optim.warmup_steps)"
        )


def numbers(matched: Matched, view: ViewBatch) -> Tensor:
    """(M,) a number for each prediction's proposal, the same in both views of an image, no other in the batch."""
    return matched.image * (2**32) + view.ids[matched.image, matched.box]


def info_nce(z1: Tensor, z2: Tensor, p1: Tensor, p2: Tensor, T: float) -> Tensor:
    """Box-level InfoNCE; mean over the pairs of each proposal, then over proposals with a pair.

    A pair is a prediction of view 1 and one of view 2 that answer for the same proposal. Its negatives are all
    predictions, of both views and of all processes, that answer for other proposals.

    Args:
        z1, z2: (M1, D), (M2, D), of length 1; z2 without gradient.
        p1, p2: (M1,), (M2,) int64, number of the proposal each answers for.
    """
    offset = distributed.rank() * 2**48
    everyone = distributed.gather_rows(torch.cat([z1, z2]))
    theirs = distributed.gather_rows(torch.cat([p1, p2]) + offset)
    similar = (z1 / T) @ everyone.T
    # Of thousands by thousands few are pairs: what is worked out for those alone is not worked out for all.
    one, two = (p1[:, None] == p2).nonzero().unbind(1)
    similar_pairs = similar[one, (theirs < offset).sum() + len(p1) + two]  # after those of the processes before
    # A finite "minus infinity": the gradient of a logsumexp over nothing is not a number.
    against = similar.masked_fill_((p1 + offset)[:, None] == theirs, -1e9).logsumexp(dim=1)
    each = F.softplus(against[one] - similar_pairs)  # -log of the pair's share
    _, proposal = torch.unique(p1, return_inverse=True)
    nothing = each.new_zeros(len(p1))
    sums = nothing.index_add(0, proposal[one], each)
    pairs = nothing.index_add(0, proposal[one], torch.ones_like(each))
    answered = (pairs > 0).sum()
    # The mean over all processes' proposals, as the mean over processes that follows sees it.
    share = distributed.mean(answered.to(each.dtype)).clamp(min=1 / distributed.world())
    return (sums / pairs.clamp(min=1)).sum() / share + 0 * everyone.sum()
