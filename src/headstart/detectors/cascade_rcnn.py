"""Cascade R-CNN (Cai and Vasconcelos 2018, https://arxiv.org/abs/1712.00726), on a pyramid.

Torchvision has none: the backbone, the pyramid, the RPN and each single box head are torchvision's own, their row of
three is :class:`headstart.detectors.builders.cascade.CascadeRoIHeads`.

The three stages ask for an IoU of .5, .6 and .7; their losses weigh 1, .5 and .25, and each samples anew, from the
ground truth and the boxes that the one before it refined: as MMDetection. (Detectron2 samples once, weighs the stages
alike and divides the gradient into the pooled features by three.) Boxes are refined alike for all classes. When
detecting, the three classifiers' probabilities are averaged, each on the boxes its own stage was given, and the boxes
are the last stage's: as Detectron2. (MMDetection averages logits.) Differs from MMDetection: smooth L1 has
torchvision's beta of 1/9, not 1, and what sampled ground truth is refined to goes on to the next stage, as in
Detectron2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from headstart.detectors.builders.cascade import CascadeRoIHeads, cascade_rcnn
from headstart.detectors.detector import Matched, Target
from headstart.detectors.plain_code import Call
from headstart.detectors.pyramid import image_list
from headstart.detectors.rcnn import RCNN, RegionSettings, box_loss, positives, stand_in


class CascadeRCNNSettings(RegionSettings):
    name: Literal["cascade_rcnn"] = Field("cascade_rcnn", description="detector family")

    def call(self) -> Call:
        """
        Raises:
            SettingsError: the backbone is not known.
        """
        return Call(cascade_rcnn, {**self.pyramid_arguments(), **self.arguments()})


class CascadeRCNN(RCNN):
    """``head`` is the first stage's; ``classifier`` and ``regressor`` are all stages'."""

    family = "cascade_rcnn"
    settings_type: ClassVar[type[RegionSettings]] = CascadeRCNNSettings
    module: GeneralizedRCNN

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Known by the name of the class of its heads: ``load_in_torchvision.py`` brings a copy of that class."""
        return isinstance(module, GeneralizedRCNN) and type(module.roi_heads).__name__ == CascadeRoIHeads.__name__

    @property
    def prefixes(self) -> Mapping[str, tuple[str, ...]]:
        first, *later = (f"roi_heads.box_heads.{stage}." for stage in self._stages)
        predictors = [f"roi_heads.box_predictors.{stage}." for stage in self._stages]
        return {
            **super().prefixes,
            "head": (first,),
            "later_heads": tuple(later),
            "classifier": tuple(f"{predictor}cls_score." for predictor in predictors),
            "regressor": tuple(f"{predictor}bbox_pred." for predictor in predictors),
        }

    @property
    def _stages(self) -> range:
        return range(len(self.module.roi_heads.box_heads))

    @property
    def box_head(self) -> nn.Module:
        """The first stage's, which sees boxes as the RPN gives them."""
        return self.module.roi_heads.box_heads[0]

    @property
    def box_predictor(self) -> nn.Module:
        return self.module.roi_heads.box_predictors[0]

    def match(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Sequence[Target],
        projector: nn.Module,
        most: int,
        losses: bool = True,
    ) -> Matched:
        """As :meth:`RCNN.match`, stage by stage, each by its own IoU, on the boxes that the one before it refined.

        Only boxes that answer for a target are refined. The stages share ``most``: each may take an equal share of
        what those before it have left. ``losses["boxes"]`` is the sum over the stages, with their weights.
        """
        heads = self.module.roi_heads
        maps, rois, found = self.regions(images, sizes, targets, losses)
        shapes = image_list(images, sizes).image_sizes
        embedded: list[Tensor] = []
        image, box, terms = [], [], []
        for stage, rules in enumerate(heads.rules):
            left = most - sum(len(hidden) for hidden in embedded)
            rois, matched = positives(rules, rois, targets, -(-left // (len(heads.rules) - stage)))
            hidden = heads.box_heads[stage](heads.box_roi_pool(maps, stand_in(rois, sizes), shapes))
            hidden = hidden[: sum(len(r) for r in rois)]
            embedded.append(hidden)
            image += [torch.full_like(m, i) for i, m in enumerate(matched)]
            box += matched
            deltas = heads.box_predictors[stage].bbox_pred(hidden)
            if losses:
                terms.append(heads.loss_weights[stage] * box_loss(rules.box_coder, deltas, rois, matched, targets))
            rois = heads.refine(stage, deltas, rois, shapes)
        if losses:
            found["boxes"] = torch.stack(terms).sum()
        return Matched(projector(torch.cat(embedded)), torch.cat(image), torch.cat(box), found)

    def adapt(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Every stage begins with the one box head that a Faster R-CNN, or a pretraining of ``head``, has."""
        adapted, notes = super().adapt(state)
        row, single = "roi_heads.box_heads.", "roi_heads.box_head."
        lacking = [stage for stage in self._stages if not any(key.startswith(f"{row}{stage}.") for key in adapted)]
        source, whose = (single, "the one") if 0 in lacking else (f"{row}0.", "stage 1's")
        head = {key.removeprefix(source): value for key, value in adapted.items() if key.startswith(source)}
        if not head or not lacking:
            return adapted, notes
        if source == single:
            adapted = {key: value for key, value in adapted.items() if not key.startswith(single)}
        adapted |= {f"{row}{stage}.{key}": value for stage in lacking for key, value in head.items()}
        stages = ", ".join(str(stage + 1) for stage in lacking)
        return adapted, [*notes, f"{whose} box head in the file copied to stage{'s' * (len(lacking) > 1)} {stages}"]
