from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headstart.datasets.detection import Annotations, Category, DetectionData, load_detection_data
from headstart.errors import DataError
from headstart.verbs.evaluate import in_order_of


def entry(number: int, folder: str, **lists: Any) -> dict[str, Any]:
    """An image as lvis_v1_val.json has it."""
    return {
        "id": number,
        "license": 1,
        "coco_url": f"http://images.cocodataset.org/{folder}/{number:012d}.jpg",
        "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
        "date_captured": "2013-11-15 02:41:42",
        "width": 60,
        "height": 40,
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
        **lists,
    }


def category(number: int, name: str, frequency: str) -> dict[str, Any]:
    return {
        "id": number,
        "name": name,
        "synset": f"{name}.n.01",
        "synonyms": [name],
        "def": f"a {name}",
        "frequency": frequency,
        "image_count": 1,
        "instance_count": 1,
    }


def lvis(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, place: str = "annotations") -> Path:
    """Two images, one of train2017 and one of val2017, as in LVIS's validation set."""
    square = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0, 1.0, 9.0]]
    content = {
        "info": {"description": "LVIS", "version": "v1"},
        "licenses": [],
        "categories": [category(2, "yak", "r"), category(5, "cup", "c"), category(9, "car", "f")],
        "images": [
            entry(397133, "val2017", neg_category_ids=[9, 2]),
            entry(37777, "train2017", neg_category_ids=[2], not_exhaustive_category_ids=[9]),
        ],
        "annotations": [
            {"id": 7, "image_id": 397133, "category_id": 5, "area": 64.0, "bbox": [1, 1, 8, 8], "segmentation": square},
            {"id": 8, "image_id": 37777, "category_id": 9, "area": 64.0, "bbox": [1, 1, 8, 8], "segmentation": square},
        ],
    }
    if change is not None:
        change(content)
    for image in content["images"]:
        file = folder / "/".join(image["coco_url"].split("/")[-2:])
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(file)
    path = folder / place / "lvis_v1_val.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("place", ["", "annotations"])
def test_images_named_by_url_alone(tmp_path: Path, place: str) -> None:
    data = load_detection_data(lvis(tmp_path, place=place))
    assert [i.file_name for i in data.images] == ["val2017/000000397133.jpg", "train2017/000000037777.jpg"]
    assert data.images[1].path == tmp_path / "train2017" / "000000037777.jpg"
    assert data.has_masks
    assert [a.ids.tolist() for a in data.annotations] == [[7], [8]]


def test_what_was_looked_for_is_kept(tmp_path: Path) -> None:
    data = load_detection_data(lvis(tmp_path))
    assert data.is_federated
    assert [c.frequency for c in data.categories] == ["r", "c", "f"]
    first, second = data.annotations
    assert first.negative.tolist() == [3, 1]
    assert first.not_exhaustive.tolist() == []
    assert second.not_exhaustive.tolist() == [3]
    kept = first.keep(np.array([False]))
    assert (len(kept), kept.negative.tolist()) == (0, [3, 1])


def test_round_trip_and_other_orders_of_classes(tmp_path: Path) -> None:
    path = lvis(tmp_path)
    data = load_detection_data(path)
    given = json.loads(path.read_text())
    for moved in (
        data,
        in_order_of(data, ["plate", "car", "cup", "yak"]),
        data.subset([37777, 397133]).subset([37777]),
    ):
        coco = moved.to_coco()
        frequency = {c["name"]: c.get("frequency") for c in coco["categories"]}
        assert frequency == {"yak": "r", "cup": "c", "car": "f"} | ({"plate": "r"} if "plate" in frequency else {})
        for image in coco["images"]:
            original = next(i for i in given["images"] if i["id"] == image["id"])
            for key in ("neg_category_ids", "not_exhaustive_category_ids"):
                assert image[key] == original[key]
    fewer = DetectionData(
        data.source,
        data.categories,
        data.images[:1],
        [Annotations(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool), [])],
    )
    fewer.annotations[0].negative = np.array([3, 1])
    assert fewer.with_categories([Category(1, "yak")]).annotations[0].negative.tolist() == [1]


def test_coco_is_not_federated(tmp_path: Path) -> None:
    def plain(content: dict[str, Any]) -> None:
        for image in content["images"]:
            del image["neg_category_ids"], image["not_exhaustive_category_ids"]

    data = load_detection_data(lvis(tmp_path, plain))
    assert not data.is_federated
    assert "neg_category_ids" not in data.to_coco()["images"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(neg_category_ids=[3]), r'"neg_category_ids" \[3\]; expected a list of'),
        (lambda c: c["images"][0].update(not_exhaustive_category_ids=9), r'"not_exhaustive_category_ids" 9; expected'),
        (lambda c: c["images"][0].update(coco_url="a.jpg"), r'image at index 0 has no "file_name"'),
    ],
)
def test_structural_problems(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_detection_data(lvis(tmp_path, change))
