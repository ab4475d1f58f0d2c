"""UP-DETR: Unsupervised Pre-training for Object Detection with Transformers (Dai et al., CVPR 2021).

https://arxiv.org/abs/2011.09094

Patches are cut out of an image at random, and queries that are told what is in a patch learn to find it.

    Query patches, multi-query           UPDETR.views, UPDETR.asked: M patches, N / M queries each
    Attention mask X                     UPDETR.groups: queries look at those of their own patch alone
    Dropped query patches, 10 %          UPDETR.asked
    L_cls, L_box (Hungarian)             QueryMethod.found: every query against every patch, every decoder layer
    L_rec                                UPDETR.loss, every decoder layer
    Object query shuffle                 left out, as in the released code ("not helpful")

Where this file differs from the paper, or fills a gap:

* N queries need no multiple of M: query n is of group ``n * M // N``, so that groups follow one another and their
  sizes differ by one at most.
* The mask is right for any N and M; the released one is right where a patch has as many queries as there are patches.
* An image with fewer than M patches gives them to its groups in turn, so that every query asks for something. An
  image without any asks for nothing.
* The patches' features come from the detector's own frozen backbone, its last map (the paper: SwAV's ResNet-50, C5).
* Patches are cut from the view that the detector sees.
* L_rec and boxes are divided by the patches of the batch, over all processes.
* Adam's rate is the paper's whatever the batch (the paper's: 256 images).
* With ``deformable_detr`` patches are added to the queries' content; class loss, focal, and matching are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from headstart.detectors.detector import Detector
from headstart.detectors.set_loss import Objects, objects_in_all
from headstart.errors import SettingsError
from headstart.matching import padded
from headstart.methods.method import Net, ViewBatch
from headstart.methods.query_method import QueryMethod, QuerySettings, mlp, place
from headstart.proposals.random_boxes import RandomPatches
from headstart.views import View, visible


class UPDETRSettings(QuerySettings):
    """Symbols are the paper's."""

    M: int = Field(10, ge=1, description="query patches an image; each is asked for by N / M of the N queries")
    patches: Literal["random", "proposals"] = Field(
        "random", description="random: of any size and shape, new ones in each epoch (paper); proposals: M of them"
    )
    mask_patches: float = Field(0.1, ge=0, lt=1, description="share of the queries that are not told their patch")
    lambda_rec: float = Field(1.0, ge=0, description="weight of the reconstruction of the patches' features")
    flip_prob: float = Field(0.0, ge=0, le=1, description="probability of mirroring a view (released: never)")
    crop_prob: float = Field(0.0, ge=0, le=1, description="probability of DETR's crop (released: never)")


class UPDETR(QueryMethod[UPDETRSettings]):
    """Find the patches that the queries were told of."""

    name = "updetr"
    settings_type = UPDETRSettings
    paper = "https://arxiv.org/abs/2011.09094"
    epochs = 60
    detector = "detr"
    lr = 1e-4
    drop = 40 / 60

    def settle(self, detector: Detector, total_steps: int) -> list[str]:
        s = self.settings
        if "proposer" in detector.parts:
            raise SettingsError(
                f"updetr tells certain queries of certain patches, but queries of a two-stage {detector.family} are "
                "proposals of each image; expected detector.two_stage=false"
            )
        if detector.query_count < s.M:
            raise SettingsError(
                f"method.M={s.M}: each patch needs a query, and this {detector.family} has {detector.query_count}"
            )
        return super().settle(detector, total_steps)

    @property
    def needs_proposals(self) -> bool:
        return self.settings.patches == "proposals"

    # ---- query patches ----------------------------------------------------------------------------------------

    def views(self, image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> list[View]:
        s = self.settings
        if s.patches == "random":
            boxes = RandomPatches(s.M)(image, rng)
        boxes = boxes[visible(boxes)]
        view = self.augment(View(image, boxes, np.arange(len(boxes))), rng)
        if len(view.ids) > s.M:
            view = view.take(np.sort(rng.choice(len(view.ids), s.M, replace=False)))
        return [view]

    def heads(self, detector: Detector) -> nn.ModuleDict:
        width, patch_width = detector.query_width, detector.stage_width(self.settings.stage)
        return nn.ModuleDict(
            {
                "patch": nn.Linear(patch_width, width),
                "f_cls": detector.class_layer(1),
                "f_rec": mlp(width, patch_width),
            }
        )

    def groups(self, count: int, device: torch.device | None = None) -> Tensor:
        """(N,) int64: the patch that each of N = ``count`` queries asks for."""
        return torch.arange(count, device=device) * self.settings.M // count

    def attention(self, count: int, device: torch.device | None = None) -> Tensor:
        """(N, N) bool: which query may look at which."""
        group = self.groups(count, device)
        return group[:, None] == group[None, :]

    def asked(self, net: Net, p: Tensor, counts: Sequence[int]) -> Tensor:
        """(B, N, D): what each query is told; 0 where that is dropped, or where an image has no patch.

        Args:
            p: (P, C), image by image.
            counts: patches of each image.
        """
        n, batch = net.detector.query_count, len(counts)
        patches = padded([*p.split(list(counts)), p.new_zeros(1, p.shape[1])])[:batch]  # at least one row each
        told = net.heads["patch"](patches)
        many = torch.tensor(counts, device=p.device)[:, None]
        which = self.groups(n, p.device) % many.clamp(min=1)
        told = told.gather(1, which[..., None].expand(-1, -1, told.shape[2]))
        kept = (many > 0).expand(-1, n)
        if net.training:
            kept = kept & (torch.rand(batch, n, device=p.device) >= self.settings.mask_patches)
        return told * kept[..., None]

    # ---- L_cls, L_box, L_rec ------------------------------------------------------------------------------------

    def loss(self, student: Net, views: Sequence[ViewBatch], targets: None) -> dict[str, Tensor]:
        (view,) = views
        wanted = view.targets()
        objects = Objects.of(wanted, view.sizes)
        p = self.describe(student, view, wanted)
        extra = self.asked(student, p, objects.counts)
        attend = self.attention(extra.shape[1], extra.device)
        answers = student.detector.queries(view.images, view.sizes, extra=extra, attend=attend)
        terms, matches = self.found(student, answers, objects, p)
        image, query, box = (torch.stack(each) for each in zip(*matches, strict=True))  # (L, matched) each
        layer = torch.arange(len(matches), device=image.device)[:, None]
        rebuilt = student.heads["f_rec"](answers.hidden[layer, image, query]).float()
        rebuilt, told = F.normalize(rebuilt, dim=-1), F.normalize(p[place(view, image, box)], dim=-1)
        each = (rebuilt - told).square().sum(dim=-1)
        return {**terms, "rebuild": self.settings.lambda_rec * each.sum() / objects_in_all(objects, each)}
