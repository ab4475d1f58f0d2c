"""SoCo: Aligning Pretraining for Detection via Object-Level Contrastive Learning (Wei et al., NeurIPS 2021).

https://arxiv.org/abs/2106.02637

    Section 3.2, views and box jitter      SoCo.views
    Eq. 1-3    h  = f^H(RoIAlign(f^I(V), b))    SoCo.describe
    Eq. 4      v  = q(g(h)), v' = g(h')         SoCo.targets, SoCo.loss
    Eq. 5-6    L  = -2 cos(v, v') - 2 cos(v, v'')   SoCo.loss, symmetrised
    Section 3.3, scale-aware assignment    SoCo.levels
    Tables 4, 5, ablations                 SoCoSettings

Where this file differs from the paper, or fills a gap:

* V3 is V2 downsampled, as the paper says; the released code crops anew (``v3="independent_crop"``).
* Only V1's boxes are jittered, as in the released code; the paper says "across views" (``jitter="all"``). The
  released code draws four independent r a box; so do we. It moves the corner; we move the centre, as the paper does.
* Without scale-aware assignment the paper does not say which level a box comes from; we use FPN's own rule.
* Without a head (Table 4) the pooled features are averaged; without FPN they come from the last residual block.
* At the end batch norm's statistics are taken over plain images (``precise_bn``); the paper does not speak of it.
* A box that a crop cuts is kept and clipped; one that it leaves outside is dropped (for the padded sample of K,
  see :meth:`SoCo.views`).
* The released code also cuts out squares of boxes in one of its scripts, which the paper does not mention; we do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.detectors.detector import Ability, Detector, Features
from headstart.ema import cosine_momentum
from headstart.methods.method import Method, Net, ViewBatch
from headstart.optim import OptimSettings
from headstart.proposals.random_boxes import RandomBoxes
from headstart.settings import Settings
from headstart.views import (
    Photometric,
    View,
    crop_and_resize,
    hflip,
    jitter_boxes,
    random_crop_box,
    resize,
    visible,
)

CROP_RETRIES = 5
PAPER_VIEW_PX = 224
PAPER_LEVEL_PX = (48.0, 96.0, 192.0)  # with smaller views, whole levels would never see a box


class SoCoSettings(Settings):
    """Symbols are the paper's."""

    K: int = Field(4, ge=1, description="boxes an image and step (Table 5c: 1, 4, 8, 16)")
    tau: float | None = Field(
        None,
        ge=0,
        le=1,
        description="EMA momentum of the target network at the start; ends at 1 along a cosine. "
        "Paper: 0.99 (Table 5d: .98, .99, .993). Unset: from the number of steps",
    )
    view_px: int = Field(224, ge=32, description="side of V1 and V2, px")
    crop_scale: tuple[float, float] = Field((0.5, 1.0), description="area share of the crop that becomes V2")
    v3: Literal["downsample", "independent_crop", "none"] | None = Field(
        None,
        description="V3: downsample (of V2, the paper), independent_crop (released code), none. "
        "Unset: downsample; none on C4 detectors, as in the paper",
    )
    v3_px: int | None = Field(
        None, ge=16, description="side of V3, px (Table 5a: 96 to 192). Unset: view_px / 2, the paper's 112"
    )
    star: bool = Field(False, description="SoCo*: a fourth view, another crop of V1")
    v4_px: int | None = Field(None, ge=16, description="side of V4, px. Unset: view_px x 6/7, the paper's 192")
    instances: Literal["proposals", "random", "whole_image"] = Field(
        "proposals",
        description="what an object is: proposals; K random boxes (Table 5c); the whole image (Table 4: BYOL)",
    )
    jitter: Literal["v1", "all", "none"] = Field("v1", description="views whose boxes are jittered")
    jitter_prob: float = Field(0.5, ge=0, le=1, description="probability of jittering a box")
    jitter_r: float = Field(0.1, ge=0, lt=0.5, description="r of the jitter ~ U(-r, r), in box sides")
    colour: float = Field(
        1.0,
        ge=0,
        le=1,
        description="strength of the colour augmentation; 1 is BYOL's, as in the paper. What it varies, the "
        "network learns to ignore: lower it where colour tells your classes apart",
    )
    fpn: bool = Field(True, description="pretrain the FPN (Table 4); off: boxes from the last residual block")
    head: bool = Field(True, description="pretrain the box head (Table 4); off: pooled features, averaged")
    scale_aware: bool = Field(True, description="scale-aware assignment of boxes to levels (Table 4)")
    level_px: tuple[float, float, float] | None = Field(
        None,
        description="largest box side sqrt(wh) on P2, P3, P4, in view px; larger ones on P5. "
        "Unset: the paper's 48, 96, 192 at 224 px, in proportion to view_px",
    )
    precise_bn: int = Field(
        256,
        ge=0,
        description="plain images that batch norm's statistics are taken over again at the end, as detectron2's "
        "PRECISE_BN does; 0: left as the views made them",
    )
    hidden: int = Field(4096, ge=1, description="hidden width of projector g and predictor q")
    dim: int = Field(256, ge=1, description="width of the embeddings v")


class SoCo(Method[SoCoSettings]):
    """Object-level BYOL: the online network predicts the target network's embedding of the same box in another view."""

    name = "soco"
    settings_type = SoCoSettings
    paper = "https://arxiv.org/abs/2106.02637"
    needs: ClassVar[Mapping[Ability, str]] = {"pool": "trains a box head on pooled boxes"}

    def __init__(self, settings: SoCoSettings) -> None:
        super().__init__(settings)
        c = settings.colour

        def photometric(blur_prob: float, solarise_prob: float) -> Photometric:
            return Photometric(
                brightness=0.4 * c,
                contrast=0.4 * c,
                saturation=0.2 * c,
                hue=0.1 * c,
                grey_prob=0.2 * c,
                blur_prob=blur_prob,
                solarise_prob=solarise_prob * c,
            )

        others = photometric(blur_prob=0.1, solarise_prob=0.2)
        self.photometric = (photometric(blur_prob=1.0, solarise_prob=0.0), others, others, others)

    # ---- what is chosen for the user --------------------------------------------------------------------------

    def settle(self, detector: Detector, total_steps: int) -> list[str]:
        s, notes = self.settings, []
        if s.v3 is None:
            s.v3 = "downsample" if "neck" in detector.parts else "none"
            if s.v3 == "none":
                notes.append("v3 = none: a detector without FPN has one scale (section 3.3)")
        neck = detector.parts.get("neck")
        if s.fpn and neck is not None and not any(isinstance(m, _BatchNorm) for m in neck.modules()):
            notes.append(
                "the FPN has no batch norm, as it has in the paper: the loss leaves the scale of its features free, "
                "and in our runs it grew and slowed fine-tuning (--set detector.fpn_norm=bn)"
            )
        if s.v3_px is None:
            s.v3_px = s.view_px // 2
        if s.v4_px is None:
            s.v4_px = round(s.view_px * 6 / 7)
        if s.level_px is None:
            small, middle, large = (px * s.view_px / PAPER_VIEW_PX for px in PAPER_LEVEL_PX)
            s.level_px = (small, middle, large)
        if s.tau is None:
            # The paper's .99 averages over 100 of some 60 000 steps. A run of a few hundred steps would be over
            # before such a teacher had left its random start.
            s.tau = float(np.clip(1 - 10 / max(1, total_steps), 0.9, 0.99))
            notes.append(f"tau = {s.tau:.3f} -> 1: for {total_steps} steps (paper: 0.99 for 60 000)")
        return notes

    def optimizer(self, detector: Detector, batch_size: int) -> OptimSettings:
        """LARS as in the paper for its large batches; AdamW for those that fit a small machine."""
        if batch_size >= 512:
            return OptimSettings(optimizer="lars", base_lr=1.0, weight_decay=1e-5, warmup_epochs=10)
        return OptimSettings(optimizer="adamw", base_lr=1e-3, base_batch=64, weight_decay=1e-5)

    @property
    def decode_px(self) -> int:
        return self.settings.view_px

    @property
    def needs_proposals(self) -> bool:
        return self.settings.instances == "proposals"

    def trained_parts(self, detector: Detector) -> Sequence[str]:
        s = self.settings
        wanted = {"backbone": True, "neck": s.fpn, "head": s.head}
        return [part for part in detector.parts if wanted.get(part, False)]

    @property
    def norm_images(self) -> int:
        return self.settings.precise_bn

    # ---- section 3.2 ------------------------------------------------------------------------------------------

    def views(self, image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> list[View]:
        """V1, V2, (V3), (V4) with the same K boxes each, row for row.

        A crop is drawn again up to 5 times until some box is visible in every view. With fewer than K such boxes
        all are taken and some repeated; with none the only box is the whole view.
        """
        s = self.settings
        if s.instances == "random":
            boxes = RandomBoxes(s.K)(image, rng)
        v1 = resize(View(image, boxes, np.arange(len(boxes))), (s.view_px, s.view_px))
        v1.frame = np.array([0, 0, s.view_px, s.view_px], np.float32)
        for _ in range(1 + CROP_RETRIES):
            views = [v1, *self.crops(v1, rng)]
            common = np.flatnonzero(np.logical_and.reduce([visible(view.boxes) for view in views]))
            if len(common) or s.instances == "whole_image":
                break
        if s.instances == "whole_image":
            views = [whole(view, 1) for view in views]
        elif not len(common):
            views = [whole(view, s.K) for view in views]
        else:
            if len(common) >= s.K:
                chosen = rng.choice(common, s.K, replace=False)
            else:
                chosen = np.concatenate([common, rng.choice(common, s.K - len(common))])
            views = [view.take(chosen) for view in views]
        jittered = {"v1": 1, "all": len(views), "none": 0}[s.jitter]
        return [
            self.augment(view, photometric, rng, jitter=i < jittered)
            for i, (view, photometric) in enumerate(zip(views, self.photometric, strict=False))
        ]

    def crops(self, v1: View, rng: np.random.Generator) -> list[View]:
        """V2, then V3 and V4 where there are such."""
        s = self.settings

        def crop(px: int | None) -> View:
            assert px is not None, "settle() fills it in"
            return crop_and_resize(v1, random_crop_box(*v1.size, rng, scale=s.crop_scale), (px, px))

        views = [crop(s.view_px)]
        if s.v3 == "downsample":
            assert s.v3_px is not None
            views.append(resize(views[0], (s.v3_px, s.v3_px)))
        elif s.v3 == "independent_crop":
            views.append(crop(s.v3_px))
        if s.star:
            views.append(crop(s.v4_px))
        return views

    def augment(self, view: View, photometric: Photometric, rng: np.random.Generator, jitter: bool) -> View:
        view = self.marked(view, rng, jitter)
        view = View(photometric(view.image, rng), view.boxes, view.ids, view.frame)
        return hflip(view) if rng.random() < 0.5 else view

    def marked(self, view: View, rng: np.random.Generator, jitter: bool) -> View:
        """The boxes as the networks get them."""
        s = self.settings
        if not jitter:
            return view
        boxes = jitter_boxes(view.boxes, rng, *view.size, prob=s.jitter_prob, frac=s.jitter_r)
        return View(view.image, boxes, view.ids, view.frame)

    # ---- section 3.3 ------------------------------------------------------------------------------------------

    def heads(self, detector: Detector) -> nn.ModuleDict:
        s = self.settings
        width = detector.embed_width(neck=s.fpn, head=s.head)
        return nn.ModuleDict({"g": mlp(width, s.hidden, s.dim), "q": mlp(s.dim, s.hidden, s.dim)})

    @property
    def teacher_heads(self) -> Sequence[str]:
        return ("g",)

    def momentum(self, step: int, total_steps: int) -> float | None:
        assert self.settings.tau is not None
        return cosine_momentum(step, total_steps, self.settings.tau)

    def levels(self, boxes: Tensor) -> Tensor | None:
        """Scale-aware assignment: level index 0..3 (P2..P5) of boxes (..., 4) by their side sqrt(wh) in view px."""
        if not self.settings.scale_aware:
            return None
        assert self.settings.level_px is not None
        sides = side(boxes)
        return torch.stack([sides > px for px in self.settings.level_px]).sum(dim=0)

    def describe(self, net: Net, view: ViewBatch, features: Features | None = None) -> Tensor:
        """g(f^H(RoIAlign(f^I(V), b))), Eq. 1-4: (B * K, dim). ``features``: f^I(V), where known already."""
        s, detector = self.settings, net.detector
        if features is None:
            features = detector.features(view.images, neck=s.fpn)
        h = detector.embed(features, view.boxes, view.size, self.levels(view.boxes), head=s.head)
        return net.heads["g"](h)

    def targets(self, teacher: Net | None, views: Sequence[ViewBatch]) -> list[Tensor]:
        assert teacher is not None
        return [self.describe(teacher, view) for view in views]

    def loss(self, student: Net, views: Sequence[ViewBatch], targets: list[Tensor]) -> dict[str, Tensor]:
        v = [student.heads["q"](self.describe(student, view)) for view in views]
        return {"align": symmetric(v, targets)}

    # ---- health -----------------------------------------------------------------------------------------------

    def watch(self, views: Sequence[ViewBatch], targets: list[Tensor]) -> dict[str, Any]:
        """``embedding_std``: spread of the normalised target embeddings, 1 when spread evenly, 0 when collapsed.

        ``level_share``: share of all boxes on P2..P5 by the scale-aware assignment.
        """
        z = F.normalize(targets[0].float(), dim=-1)
        spread = z.std(dim=0).mean() * z.shape[1] ** 0.5
        watched: dict[str, Any] = {"embedding_std": round(float(spread), 4)}
        levels = [self.levels(view.boxes) for view in views]
        if self.settings.fpn and levels[0] is not None:
            counts = torch.cat([level.reshape(-1) for level in levels if level is not None]).bincount(minlength=4)
            watched["level_share"] = [round(float(share), 3) for share in counts / counts.sum()]
        return watched

    def warnings(self, watched: Mapping[str, Any]) -> str | None:
        if watched["embedding_std"] >= 0.05:
            return None
        return (
            f"the embeddings have collapsed: their spread is {watched['embedding_std']:.3f} (1 is even, 0 is one "
            "point), so every box looks the same to the network and nothing more is learnt. Try a momentum tau "
            "nearer to 1, a lower learning rate (--set optim.lr), or a larger --batch-size"
        )


def contrast(v: Tensor, target: Tensor) -> Tensor:
    """Mean over boxes of ``-2 cos(v_i, v'_i)``, Eq. 5 and 6: v, target (B * K, dim) -> scalar."""
    return -2 * F.cosine_similarity(v.float(), target.float(), dim=-1).mean()


def symmetric(v: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """L of Eq. 6 and its mirror image: view 1 against every other one, both ways."""
    return torch.stack([contrast(v[0], targets[j]) + contrast(v[j], targets[0]) for j in range(1, len(v))]).sum()


def side(boxes: Tensor) -> Tensor:
    """sqrt(w * h) of boxes (..., 4) xyxy."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1).sqrt()


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Projector g and predictor q: linear, batch norm, ReLU, linear (section 4.1)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )


def whole(view: View, count: int) -> View:
    """The whole view as its only object, ``count`` times."""
    height, width = view.size
    boxes = np.tile(np.array([[0, 0, width, height]], np.float32), (count, 1))
    return View(view.image, boxes, np.zeros(count, np.int64), view.frame)
