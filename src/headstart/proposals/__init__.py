"""Class-less boxes for images without labels: engines that find them, a filter, a file.

To add an engine: one file with a class like :class:`ProposalEngine`, and a line in ``ENGINES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from headstart.proposals.presets import PRESETS, PresetName

EngineName = Literal["selective_search", "opencv", "random", "random_patches", "attention"]


Mode = Literal["fixed", "exact", "diverse"]

# scale, sigma and min_size of Selective Search where nobody sets them. The papers' (SoCo appendix A, ADePT 4.1.1),
# of which "diverse" takes its own multiples; "fixed" finds more of the labelled objects with smaller segments, on
# everyday photos (COCO, 320 px) as on microscope images (BCCD, 640 px): benchmarks/selective_search.py prints it.
PAPERS = {"scale": 500.0, "sigma": 0.9, "min_size": 10}
SEARCH_DEFAULTS: dict[str, dict[str, float]] = {
    "exact": PAPERS,
    "diverse": PAPERS,
    "fixed": {"scale": 100.0, "sigma": 0.8, "min_size": 50},
}


class ProposalEngine(Protocol):
    """Finds boxes in one image. ``version`` changes whenever the boxes may: it is kept beside them."""

    name: str
    version: str

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Boxes of an image (H, W, 3), uint8 RGB: (N, 4) float32 xyxy in its pixels, N may be 0.

        The result depends on the image and ``rng`` alone, in its order too.
        """
        ...


class ProposalSettings(BaseModel):
    """How proposals are made. Segmentation and filter default to SoCo's (3.2, App. A) and ADePT's.

    What happens to an image, in this order: shrink or squash, search, scale the boxes back, clip them to the image,
    filter (with its fallbacks), suppress overlaps (``nms_iou``), keep the first (``top_k``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: PresetName | None = Field(
        default=None,
        # Its values are what is kept beside the boxes: the same boxes by another name are the same boxes.
        exclude=True,
        description="Settings of a paper, as defaults for all others (`headstart propose --help` lists them).",
    )
    engine: EngineName = Field(
        default="selective_search",
        description="What finds the boxes: selective_search (ours), opencv (OpenCV's Selective Search), random (boxes "
        "that pass the filter: SoCo Table 5c), random_patches (of any size and shape: UP-DETR) or attention (what "
        "stands out in a trained backbone's features: JoinDet).",
    )
    mode: Mode = Field(
        default="fixed",
        description="selective_search only. exact: the boxes of the Python package that the papers used, its mistakes "
        "included; fixed: without them; diverse: several scales and colour spaces, many more boxes.",
    )
    scale: float = Field(
        default=100.0,
        gt=0,
        description="Felzenszwalb's k for pixel values 0..255 (skimage's scale): larger gives larger segments and "
        "fewer boxes. Other modes than fixed, and opencv: 500, as in the papers, if not set.",
    )
    sigma: float = Field(
        default=0.8,
        ge=0,
        description="Gaussian blur before the segmentation, standard deviation in px. Others: 0.9.",
    )
    min_size: int = Field(
        default=50,
        ge=1,
        description="Segments of fewer px are merged into a neighbour. Others: 10.",
    )
    colour: Literal["hsv", "rgb"] = Field(
        default="hsv",
        description="Colour space that is segmented and compared (opencv only). hsv is OpenCV's own choice.",
    )
    features_backbone: str | None = Field(
        default=None,
        description="attention only. torchvision's or timm's name of the backbone whose features are cut. Unset: that "
        "of the run in features_weights, else resnet50.",
    )
    features_weights: str | None = Field(
        default=None,
        description="attention only. The backbone's weights: a run folder, a weights file, imagenet (the library's "
        "own supervised ones) or random (on purpose).",
    )
    features_px: int = Field(
        default=640,
        ge=32,
        description="attention only. The backbone sees images of this long side; smaller ones are enlarged.",
    )
    features_stride: Literal[4, 8, 16, 32] = Field(
        default=16,
        description="attention only. px a cell of the map that is cut: 16 is C4 of a ResNet, 32 its C5. Half of it: "
        "four times the cells, 16 times the graph.",
    )
    cut_centre: bool = Field(
        default=True,
        description="attention only. Take the map's mean off the features first: after a ReLU none is below zero, so "
        "that all cells would be alike.",
    )
    cut_tau: float = Field(
        default=0.2,
        ge=-1,
        le=1,
        description="attention only. Two cells are alike where the cosine of their features is at least this "
        "(JoinDet, Eq. 1; TokenCut's value).",
    )
    cut_eps: float = Field(
        default=1e-5, gt=0, lt=1, description="attention only. Weight of an edge between cells that are not alike."
    )
    cut_rounds: int = Field(
        default=3,
        ge=1,
        description="attention only. Cuts an image: after each, what stood out is taken away. JoinDet: 1.",
    )
    long_side_px: int = Field(
        default=640,
        ge=32,
        description="Larger images are shrunk to this long side for the search; boxes come back in the "
        "original's px. The time grows faster than the number of pixels. attention: features_px, if not set.",
    )
    squash_px: int | None = Field(
        default=None,
        ge=32,
        description="Search the image squashed to a square of this side, whatever its size and shape; wins over "
        "long_side_px. DETReg: 128.",
    )
    aspect_max: float | None = Field(
        default=3.0,
        ge=1,
        description="Filter: keep boxes with 1/aspect_max <= width/height <= aspect_max. null: boxes of any shape.",
    )
    size_min: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Filter: keep boxes with sqrt(w*h)/sqrt(W*H) >= this (W, H: image). 0.1 keeps small objects, too.",
    )
    size_max: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Filter: keep boxes with sqrt(w*h)/sqrt(W*H) <= this (W, H: image).",
    )
    side_min_px: float | None = Field(
        default=None,
        gt=0,
        description="Filter and its fallbacks: keep boxes with both sides at least this long. "
        "SoCo's released code: 32.",
    )
    fallback_side_px: float = Field(
        default=32.0,
        ge=1,
        description="When neither the filter nor its aspect rule alone keeps a box: keep those with both "
        "sides at least this long, in px (made for photos of about 500 px; scale it with yours).",
    )
    nms_iou: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="After the filter: of boxes that overlap by more than this IoU keep the first in the engine's "
        "order (non-maximum suppression). AlignDet: 0.5.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="At the end: keep the first boxes in the engine's order, at most this many. DETReg: 30.",
    )
    random_boxes: int = Field(
        default=4,
        ge=1,
        description="Boxes an image (random and random_patches only). SoCo Table 5c: 1, 4, 8; UP-DETR: 10.",
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of the random engines, each image its own stream; and of random weights."
    )
    max_unreadable: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Stop with an error when more than this share of the images is unusable.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, Mapping) else None
        values = {**PRESETS[name].values, **values} if isinstance(name, str) and name in PRESETS else values
        if not isinstance(values, Mapping):
            return values
        if values.get("engine") == "attention" and isinstance(values.get("features_px"), int):
            values = {"long_side_px": values["features_px"], **values}
        ours = values.get("engine", "selective_search") == "selective_search"
        return {**SEARCH_DEFAULTS.get(values.get("mode", "fixed") if ours else "exact", PAPERS), **values}

    @model_validator(mode="after")
    def _fit_together(self) -> ProposalSettings:
        if self.size_min >= self.size_max:
            raise ValueError(f"size_min={self.size_min} must be below size_max={self.size_max}")
        if self.engine == "random" and self.aspect_max is None:
            raise ValueError("engine=random draws its boxes from the filter's range, so that aspect_max needs a number")
        return self


def _selective_search(settings: ProposalSettings) -> ProposalEngine:
    from headstart.proposals.selective_search import SelectiveSearch

    return SelectiveSearch(settings.scale, settings.sigma, settings.min_size, settings.mode)


def _opencv(settings: ProposalSettings) -> ProposalEngine:
    from headstart.proposals.opencv import OpenCVSelectiveSearch

    return OpenCVSelectiveSearch(settings.scale, settings.sigma, settings.min_size, settings.colour)


def _random(settings: ProposalSettings) -> ProposalEngine:
    from headstart.proposals.random_boxes import RandomBoxes

    assert settings.aspect_max is not None  # seen to by the settings
    return RandomBoxes(settings.random_boxes, settings.aspect_max, settings.size_min, settings.size_max)


def _random_patches(settings: ProposalSettings) -> ProposalEngine:
    from headstart.proposals.random_boxes import RandomPatches

    return RandomPatches(settings.random_boxes)


def _attention(settings: ProposalSettings) -> ProposalEngine:
    from headstart.proposals.attention import Attention

    return Attention(settings)


ENGINES: dict[str, Callable[[ProposalSettings], ProposalEngine]] = {
    "selective_search": _selective_search,
    "opencv": _opencv,
    "random": _random,
    "random_patches": _random_patches,
    "attention": _attention,
}


# Settings that only some engines read; the others are read whatever the engine.
READ_BY: dict[str, tuple[EngineName, ...]] = {
    "mode": ("selective_search",),
    "scale": ("selective_search", "opencv"),
    "sigma": ("selective_search", "opencv"),
    "min_size": ("selective_search", "opencv"),
    "colour": ("opencv",),
    "random_boxes": ("random", "random_patches"),
    "features_backbone": ("attention",),
    "features_weights": ("attention",),
    "features_px": ("attention",),
    "features_stride": ("attention",),
    "cut_centre": ("attention",),
    "cut_tau": ("attention",),
    "cut_eps": ("attention",),
    "cut_rounds": ("attention",),
    "seed": ("random", "random_patches", "attention"),
}


def make_engine(settings: ProposalSettings) -> ProposalEngine:
    """The engine that ``settings.engine`` names.

    Raises:
        SettingsError: it can't work on this machine, or as it is set; the message says what to do.
        WeightsError, RunError: the weights it needs can't be had.
    """
    return ENGINES[settings.engine](settings)
