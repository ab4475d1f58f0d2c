"""What DETR and Deformable DETR share: queries that each answer with a box, and the set loss on them.

Their modules are ours (``builders/detr.py``, ``builders/deformable_detr.py``), under the names of the original
repositories' weights, but for ``backbone.body.``, the backbone by its own library's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from headstart.detectors.builders.transformer import Answers, QueryDetector
from headstart.detectors.detector import Features, MatchAdvice, Matched, Queries, Target, as_float
from headstart.detectors.formats import originals
from headstart.detectors.pyramid import TorchvisionDetector, TorchvisionSettings, at_most, with_area, with_classes
from headstart.detectors.set_loss import Objects, SetLoss, objects_in_all, per_layer
from headstart.matching import Matches
from headstart.optim import OptimSettings


class TransformerSettings(TorchvisionSettings):
    short_side_px: int | list[int] = Field(
        list(range(480, 801, 32)),
        description="images are resized to this short side, px; several: drawn at random in training",
    )
    num_queries: int = Field(100, ge=1, description="queries, each of which answers with one box")
    width: int = Field(256, ge=4, description="channels of encoder and decoder")
    heads: int = Field(8, ge=1, description="attention heads; they divide the width")
    encoder_layers: int = Field(6, ge=0, description="layers of the encoder")
    decoder_layers: int = Field(6, ge=1, description="layers of the decoder")
    feedforward: int = Field(2048, ge=1, description="hidden width of the layers' feed-forward part")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in encoder and decoder")
    detections: int = Field(100, ge=1, description="detections an image, at most")
    class_cost: float = Field(1.0, ge=0, description="matching: cost of the class")
    l1_cost: float = Field(5.0, ge=0, description="matching: cost of the boxes' L1 distance, in shares of the image")
    giou_cost: float = Field(2.0, ge=0, description="matching: cost of 1 - generalised IoU")
    class_weight: float = Field(1.0, ge=0, description="loss: weight of the class term")
    l1_weight: float = Field(5.0, ge=0, description="loss: weight of the boxes' L1 distance")
    giou_weight: float = Field(2.0, ge=0, description="loss: weight of 1 - generalised IoU")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width: {self.width} with heads: {self.heads}; expected a multiple of both heads and 4")
        return self

    def transformer_arguments(self) -> dict[str, Any]:
        """What the builders of both families take besides the body."""
        own = ("num_queries", "width", "heads", "encoder_layers", "decoder_layers", "feedforward", "dropout")
        return {
            "num_classes": self.num_classes or 90,
            **{name: getattr(self, name) for name in (*own, "detections")},
            **self.transform_arguments(),
        }

    def weights_and_costs(self) -> dict[str, float]:
        each = [f"{term}_{kind}" for term in ("class", "l1", "giou") for kind in ("cost", "weight")]
        return {name: getattr(self, name) for name in each}


class TransformerDetector(TorchvisionDetector):
    """``module`` answers with :class:`~headstart.detectors.builders.transformer.Answers`."""

    abilities = frozenset({"query", "match"})
    settings_type: ClassVar[type[TransformerSettings]]
    module: QueryDetector
    loss_kind: ClassVar[Literal["softmax", "focal"]]

    @property
    def prefixes(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "backbone": ("backbone.body.",),
            "neck": ("input_proj.",),
            "encoder": ("transformer.encoder.",),
            "decoder": ("transformer.decoder.", "query_embed."),
            "classifier": ("class_embed.",),
            "regressor": ("bbox_embed.",),
        }

    @property
    def body(self) -> nn.Module:
        return self.module.backbone.body

    def adapt(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Under this library's names, from the original repositories' and transformers' too."""
        return originals.adapt(state)

    def features(self, images: Tensor, neck: bool = True, sizes: Tensor | None = None) -> Features:
        """The maps that the encoder sees; ``neck=False``: the backbone's last one."""
        given = self.normalise(images, sizes)
        if neck:
            return {str(i): map_ for i, map_ in enumerate(self.module.project(given))}
        name, last = list(self.module.backbone(given).items())[-1]
        return {name: last}

    # ---- queries --------------------------------------------------------------------------------------------------

    @property
    def query_width(self) -> int:
        return self.module.width

    @property
    def query_count(self) -> int:
        return self.module.num_queries

    def queries(
        self, images: Tensor, sizes: Tensor | None = None, extra: Tensor | None = None, attend: Tensor | None = None
    ) -> Queries:
        return as_queries(self._answer(self.normalise(images, sizes), sizes, extra, attend))

    def _answer(
        self, images: Tensor, sizes: Tensor | None, extra: Tensor | None = None, attend: Tensor | None = None
    ) -> Answers:
        """``images`` normalised, with zeros in the padding."""
        full = list(images.shape[-2:])
        if sizes is not None:  # without padding there is nothing to mask, which is faster
            sizes = sizes.to(images.device) if any(size != full for size in sizes.tolist()) else None
        return self.module.answer(images, sizes, extra, attend)

    @property
    def set_loss(self) -> SetLoss:
        settings = self.settings if isinstance(self.settings, TransformerSettings) else self.settings_type()
        return SetLoss(self.loss_kind, **settings.weights_and_costs(), **self.further_weights(settings))

    def further_weights(self, settings: TransformerSettings) -> Mapping[str, float]:
        return {}

    # ---- losses ---------------------------------------------------------------------------------------------------

    def loss(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """``class``, ``l1`` and ``giou``, over all decoder layers; two-stage, also the proposals' own, ``first_...``.

        Raises:
            DataError: a box has no area, or a label is beyond the classes.
        """
        with_area(targets)
        listed, scaled = self.module.transform([as_float(image) for image in images], list(targets))
        sizes = torch.tensor(listed.image_sizes, device=listed.tensors.device)
        answers = self._answer(listed.tensors, sizes)
        objects = Objects.of(scaled, sizes)
        logits = self.module.logits(answers.hidden)
        rule = self.set_loss
        with_classes(targets, rule.class_count(logits))
        return {**rule(logits, answers.boxes, objects), **rule.first_losses(answers.first, objects)}

    @property
    def class_parts(self) -> Sequence[str]:
        """The box layers are the same for all classes."""
        return ["classifier"]

    @property
    def num_classes(self) -> int:
        layers = self.module.class_embed
        last = layers[-1] if isinstance(layers, nn.ModuleList) else layers
        return last.out_features - (self.set_loss.kind == "softmax")

    @property
    def match_advice(self) -> MatchAdvice:
        """AlignDet's for DETR (supplement B.5): pseudo classes, or the matching would not fit the loss. What the family
        itself trains more slowly, it does here too (B.1)."""
        slow = {name: factor for name, factor in (self.tuning().lr_scale or {}).items() if name != "backbone"}
        optim = OptimSettings(
            optimizer="adamw",
            base_lr=2e-4,
            base_batch=64,
            weight_decay=1e-4,
            warmup_steps=0,
            schedule="steps",
            drops=[40 / 50],
            clip=0.1,
            lr_scale=slow,
        )
        return MatchAdvice(optim, epochs=50, batch=64, most=4096, boxes=50, classes=256)

    def projector(self, hidden: int, dim: int, classes: int = 0) -> nn.Module:
        """Linear, ReLU, linear: ``dim`` values of each query."""
        return QueryProjector(
            nn.Sequential(nn.Linear(self.query_width, hidden), nn.ReLU(), nn.Linear(hidden, dim)),
            self.class_layer(classes) if classes else None,
        )

    def match(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Sequence[Target],
        projector: nn.Module,
        most: int,
        losses: bool = True,
    ) -> Matched:
        """One query a box. Embeddings are the last layer's; losses those of all layers."""
        assert isinstance(projector, QueryProjector)
        answers = self._answer(self.normalise(images, sizes), sizes)
        objects = Objects.of(targets, sizes.to(images.device))
        found, (image, query, box) = self._matched(answers, objects, projector.classes)
        found = {**found, **self.set_loss.first_losses(answers.first, objects)} if losses else {}
        kept = at_most(len(image), most, image.device)
        image, query, box = image[kept], query[kept], box[kept]
        return Matched(projector(answers.hidden[-1][image, query]), image, box, found)

    def _matched(
        self, answers: Answers, objects: Objects, classes: nn.Module | None
    ) -> tuple[dict[str, Tensor], Matches]:
        """Losses of all layers, and the last one's matching; without ``classes`` both by the boxes alone."""
        rule = self.set_loss
        if classes is not None:
            terms, each = rule.with_matches(classes(answers.hidden), answers.boxes, objects)
            return terms, each[-1]
        layers, batch = answers.boxes.shape[:2]
        boxes, every = answers.boxes.flatten(0, 1), objects.repeated(layers)
        matches = rule.match(None, boxes, every)
        terms = rule.box_losses(boxes, matches, every, objects_in_all(objects, boxes))
        return terms, per_layer(matches, layers, batch)[-1]


class QueryProjector(nn.Module):
    """What AlignDet puts in the class layer's place: a projection and, for its matching, a layer of pseudo classes."""

    def __init__(self, project: nn.Module, classes: nn.Module | None) -> None:
        super().__init__()
        self.project = project
        self.classes = classes

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, D) -> (M, dim)."""
        return self.project(hidden)


def as_queries(answers: Answers) -> Queries:
    return Queries(answers.hidden, answers.boxes, answers.memory, answers.valid, answers.first)
