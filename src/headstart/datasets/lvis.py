"""What LVIS v1 has beyond COCO (https://www.lvisdataset.org/dataset): it is read with COCO's reader.

- Images are named by ``coco_url`` alone, ``http://images.cocodataset.org/train2017/000000391895.jpg``; the last two
  parts are the file's place below COCO's folder. The validation set has images of both train2017 and val2017.
- It is federated: of each image only some classes are known to be absent (``neg_category_ids``), and of some classes
  not every object has a box (``not_exhaustive_category_ids``).
- Categories say how often they are in the training set, in the number of images: ``frequency`` "r" (1 to 10),
  "c" (11 to 100), or "f".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headstart.errors import DataError

FREQUENCIES = ("r", "c", "f")
LVIS_DETECTIONS = 300  # of an image, that count
FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


def file_name(image: Mapping[str, Any]) -> Any:
    """``file_name`` of an entry of "images", or where it has none the last two parts of its ``coco_url``."""
    url = image.get("coco_url")
    if "file_name" not in image and isinstance(url, str) and url.count("/") >= 2:
        return "/".join(url.split("/")[-2:])
    return image.get("file_name")


def federated(
    path: Path, image: Mapping[str, Any], label_of: Mapping[int, int]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Labels of an image's negative and not exhaustive classes; None where every class was looked for.

    Raises:
        DataError: one of the two lists is something else, or names an unknown category.
    """
    if not any(key in image for key in FEDERATED):
        return None, None
    labels = []
    for key in FEDERATED:
        ids = image.get(key, [])
        if not isinstance(ids, list) or not all(isinstance(i, int) and i in label_of for i in ids):
            raise DataError(
                f'{path}: image {file_name(image)} has "{key}" {ids!r}; expected a list of category ids, '
                'all of them in "categories"'
            )
        labels.append(np.array([label_of[i] for i in ids], np.int64))
    return labels[0], labels[1]


def frequency(category: Mapping[str, Any]) -> str | None:
    """ "r", "c" or "f"; None of a category that says nothing of the kind."""
    value = category.get("frequency")
    return value if value in FREQUENCIES else None
