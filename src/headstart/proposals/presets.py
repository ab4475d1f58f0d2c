"""Proposals as a paper makes them: named bundles of settings, ``ProposalSettings(preset="detreg")``.

A preset gives defaults; whatever is set beside it wins. What a preset does not name keeps its own default; in
particular photos above ``long_side_px`` are shrunk, which no paper does (all their photos are smaller or near it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PresetName = Literal["soco", "soco_code", "adept", "aligndet", "aligndet_code", "proseco", "detreg", "updetr"]


@dataclass(frozen=True)
class Preset:
    summary: str
    values: Mapping[str, Any] = field(default_factory=dict)


# Of all presets but DETReg's, whose authors took OpenCV's.
_SEARCH = {"engine": "selective_search", "mode": "exact"}
# OpenCV's "fast" mode searches six segmentations (two colour spaces, k = 150, 300, 450); this is the first of them.
_OPENCV_FAST = {"engine": "opencv", "colour": "hsv", "scale": 150.0, "sigma": 0.8, "min_size": 100}
_SEGMENTS = {"scale": 500.0, "sigma": 0.9, "min_size": 10}
_SEGMENTS_CODE = {"scale": 300.0, "sigma": 0.9, "min_size": 100}
_SOCO = {"aspect_max": 3.0, "size_min": 0.3, "size_max": 0.8}
_NO_FILTER = {"aspect_max": None, "size_min": 0.0, "size_max": 1.0}

PRESETS: dict[str, Preset] = {
    "soco": Preset("SoCo, section 3.2 and appendix A", {**_SEARCH, **_SEGMENTS, **_SOCO}),
    "soco_code": Preset(
        "SoCo's released code: other segments, and no box below 32 px, not even as a fallback",
        {**_SEARCH, **_SEGMENTS_CODE, **_SOCO, "side_min_px": 32.0},
    ),
    "adept": Preset("ADePT, section 4.1.1: as SoCo", {**_SEARCH, **_SEGMENTS, **_SOCO}),
    "aligndet": Preset(
        "AlignDet, supplement D.1: SoCo's filter, then NMS",
        {**_SEARCH, **_SEGMENTS, **_SOCO, "nms_iou": 0.5},
    ),
    "aligndet_code": Preset(
        "AlignDet's released file ratio3size0008@0.5: SoCo's released code, any size up to 0.8, then NMS",
        {**_SEARCH, **_SEGMENTS_CODE, **_SOCO, "size_min": 0.0, "side_min_px": 32.0, "nms_iou": 0.5},
    ),
    "proseco": Preset(
        "ProSeCo, section 3: all boxes of Selective Search, of which training draws 30",
        {**_SEARCH, **_NO_FILTER},
    ),
    "detreg": Preset(
        "DETReg: the first 30 boxes of the image squashed to 128 x 128 px, found while training",
        {**_OPENCV_FAST, **_NO_FILTER, "squash_px": 128, "top_k": 30},
    ),
    "updetr": Preset(
        "UP-DETR: 10 random patches; drawn once an image, where the paper draws new ones each time",
        {"engine": "random_patches", "random_boxes": 10, **_NO_FILTER},
    ),
}
