"""DETReg: Unsupervised Pretraining with Region Priors for Object Detection (Bar et al., CVPR 2022).

https://arxiv.org/abs/2106.04550

Queries learn to find the boxes of Selective Search, and to say what a frozen backbone says of what is in them.

    Region proposals, top 30             proposals, preset "detreg"
    Object localisation task             QueryMethod.found: L_class, L_box of every decoder layer
    Object embedding task, z             QueryMethod.describe
    f_emb, L_emb                         DETReg.loss, on the last layer's matched queries
    Matching                             the detector's own set loss: by class and box, never by embedding

Where this file differs from the paper, or fills a gap:

* The backbone that describes the crops is the detector's own frozen one, whatever it was trained by; the paper's is
  SwAV's ResNet-50, and so was its detector's. C3 (``layer2`` in the released code, 512 values) is the default.
* Crops are cut from the view that the detector sees, after its crop and flip; the released code cuts them before.
* Class outputs are one for "object"; the released code has 91, of which it uses one.
* L_emb is divided by the objects of the batch, over all processes, as the other losses are: the released mean over
  matched queries, as long as there are queries for all objects.
* An image without boxes stays in the batch (the released code draws another one below two boxes): its queries learn
  that there is nothing.
* Adam's rate is the paper's whatever the batch (the paper's: 192 images).
* ``detr`` keeps its own class loss, softmax, and its own norms; the released variant has norms before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from headstart.detectors.detector import Detector
from headstart.detectors.set_loss import Objects, objects_in_all
from headstart.methods.method import Net, ViewBatch
from headstart.methods.query_method import QueryMethod, QuerySettings, mlp, place
from headstart.views import View, visible


class DETRegSettings(QuerySettings):
    """Symbols are the paper's: lambda_f is ``lambda_cls``, lambda_b its two parts ``lambda_l1`` and ``lambda_giou``."""

    lambda_e: float = Field(1.0, ge=0, description="weight of the embeddings' L1 loss")
    stage: int | None = Field(
        3, ge=2, le=6, description="backbone map whose mean describes a box: 3 for C3, stride 8; unset: the last"
    )


class DETReg(QueryMethod[DETRegSettings]):
    """Find what Selective Search finds, and embed it as a frozen backbone does."""

    name = "detreg"
    settings_type = DETRegSettings
    paper = "https://arxiv.org/abs/2106.04550"
    epochs = 50  # on COCO; 5 on ImageNet
    detector = "deformable_detr"
    proposals: ClassVar[Mapping[str, Any]] = {"preset": "detreg"}
    lr = 2e-4
    drop = 40 / 50

    @property
    def needs_proposals(self) -> bool:
        return True

    def views(self, image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> list[View]:
        boxes = boxes[visible(boxes)]
        return [self.augment(View(image, boxes, np.arange(len(boxes))), rng)]

    def heads(self, detector: Detector) -> nn.ModuleDict:
        width = detector.query_width
        f_emb = mlp(width, detector.stage_width(self.settings.stage))
        return nn.ModuleDict({"f_cls": detector.class_layer(1), "f_emb": f_emb})

    def loss(self, student: Net, views: Sequence[ViewBatch], targets: None) -> dict[str, Tensor]:
        (view,) = views
        wanted = view.targets()
        objects = Objects.of(wanted, view.sizes)
        z = self.describe(student, view, wanted)
        answers = student.detector.queries(view.images, view.sizes)
        terms, matches = self.found(student, answers, objects, z)
        image, query, box = matches[-1]
        embedded = student.heads["f_emb"](answers.hidden[-1][image, query]).float()
        each = (embedded - z[place(view, image, box)]).abs().mean(dim=1)
        return {**terms, "embed": self.settings.lambda_e * each.sum() / objects_in_all(objects, each)}
