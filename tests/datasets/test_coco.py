from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from headstart.datasets.detection import DetectionData, load_detection_data, masks_of
from headstart.datasets.torch_dataset import DetectionDataset
from headstart.errors import DataError

GOOD: dict[str, Any] = {
    "images": [
        {"id": 42, "file_name": "42.jpg", "width": 60, "height": 40},
        {"id": 7, "file_name": "sub/7.jpg", "width": 40, "height": 60},
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
    "annotations": [
        {"id": 17, "image_id": 42, "category_id": 9, "bbox": [10, 5, 20, 30], "area": 321.5, "iscrowd": 0},
        {"id": 18, "image_id": 42, "category_id": 4, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        {"id": 19, "image_id": 7, "category_id": 4, "bbox": [0.5, 1.5, 3, 4]},
    ],
}


def write(
    folder: Path,
    change: Callable[[dict[str, Any]], Any] | None = None,
    images: str = "",
    name: str = "train.json",
) -> Path:
    content = copy.deepcopy(GOOD)
    if change is not None:
        change(content)
    for image in GOOD["images"]:
        file = folder / images / image["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"])).save(file)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_reads_boxes_labels_and_crowds(tmp_path: Path) -> None:
    data = load_detection_data(write(tmp_path))
    assert [(c.id, c.name) for c in data.categories] == [(4, "cat"), (9, "dog")]
    assert [i.id for i in data.images] == [42, 7]
    assert data.images[1].path == tmp_path / "sub" / "7.jpg"
    first, second = data.annotations
    assert first.boxes.tolist() == [[10, 5, 30, 35], [0, 0, 60, 40]]
    assert first.boxes.dtype == np.float32
    assert first.labels.tolist() == [2, 1]
    assert first.labels.dtype == np.int64
    assert first.areas.tolist() == [321.5, 2400]
    assert first.iscrowd.tolist() == [False, True]
    assert second.boxes.tolist() == [[0.5, 1.5, 3.5, 5.5]]
    assert data.notes == []


def test_round_trip(tmp_path: Path) -> None:
    data = load_detection_data(write(tmp_path))
    (tmp_path / "again.json").write_text(json.dumps(data.to_coco()))
    again = load_detection_data(tmp_path / "again.json")
    assert again.to_coco()["annotations"] == data.to_coco()["annotations"]
    assert again.images == data.images


@pytest.mark.parametrize("images", ["", "images", "train", "train/images"])
def test_where_images_are_looked_for(tmp_path: Path, images: str) -> None:
    data = load_detection_data(write(tmp_path, images=images))
    assert [i.path for i in data.images] == [
        tmp_path / images / "42.jpg",
        tmp_path / images / "sub" / "7.jpg",
    ]


def test_the_callers_folder_comes_first(tmp_path: Path) -> None:
    path = write(tmp_path)
    write(tmp_path, images="elsewhere/photos")
    data = load_detection_data(path, tmp_path / "elsewhere" / "photos")
    assert data.images[0].path == tmp_path / "elsewhere" / "photos" / "42.jpg"
    with pytest.raises(DataError, match=r"nowhere: no such folder; expected the folder of the images of .*train"):
        load_detection_data(path, tmp_path / "nowhere")


def test_size_from_the_image_when_the_file_has_none(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["images"][0]["width"]
        content["images"][1]["height"] = None

    data = load_detection_data(write(tmp_path, change))
    assert [(i.width, i.height) for i in data.images] == [(60, 40), (40, 60)]


# ---- structural problems: each names the file, the place and what was expected ----------------------------


def images(content: dict[str, Any]) -> Any:
    return content["images"]


def categories(content: dict[str, Any]) -> Any:
    return content["categories"]


def notes(content: dict[str, Any]) -> Any:
    return content["annotations"]


BOX = r"expected \[x, y, width, height\] in pixels"
BROKEN: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("no images", lambda c: c.pop("images"), r'has no "images"; expected a COCO object with "images"'),
    ("no annotations", lambda c: c.pop("annotations"), r'has no "annotations"; expected a COCO object'),
    ("no categories", lambda c: c.pop("categories"), r'has no "categories"; expected a COCO object'),
    ("images not a list", lambda c: c.update(images={}), r'"images" is not a list of objects; expected'),
    ("images of text", lambda c: c.update(images=["a"]), r'"images" is not a list of objects; expected'),
    ("images empty", lambda c: c.update(images=[]), r'"images" is empty; expected at least one image'),
    ("categories empty", lambda c: c.update(categories=[]), r'"categories" is empty; expected at least one'),
    (
        "category without name",
        lambda c: categories(c)[1].pop("name"),
        r"category at index 1 is \{'id': 4\}; expected \{\"id\": 1, \"name\": \"cat\"\}",
    ),
    ("category twice", lambda c: categories(c)[1].update(id=9), r"category id 9 is given twice \(dog, cat\)"),
    (
        "image twice",
        lambda c: images(c)[1].update(id=42),
        r"image id 42 is given twice \(42\.jpg, sub/7\.jpg\)",
    ),
    (
        "no file name",
        lambda c: images(c)[1].pop("file_name"),
        r'image at index 1 has no "file_name"; expected',
    ),
    (
        "no image id",
        lambda c: images(c)[1].pop("id"),
        r'index 1 \(sub/7\.jpg\) has "id" None; expected a number',
    ),
    (
        "size zero",
        lambda c: images(c)[0].update(width=0),
        r"image 42\.jpg is 0 x 40; expected width and height",
    ),
    ("size text", lambda c: images(c)[0].update(width="60"), r"image 42\.jpg is '60' x 40; expected width"),
    ("no bbox", lambda c: notes(c)[0].pop("bbox"), rf'annotation 17 \(image 42\.jpg\) has no "bbox"; {BOX}'),
    ("bbox of three", lambda c: notes(c)[0].update(bbox=[1, 2, 3]), rf'17 .* has "bbox" \[1, 2, 3\]; {BOX}'),
    ("bbox of text", lambda c: notes(c)[0].update(bbox=[1, 2, "3", 4]), rf"17 \(image 42\.jpg\) .*; {BOX}"),
    ("bbox null", lambda c: notes(c)[0].update(bbox=None), rf'17 \(image 42\.jpg\) has "bbox" None; {BOX}'),
    (
        "NaN",
        lambda c: notes(c)[2].update(bbox=[1, 2, float("nan"), 4]),
        rf"annotation 19 \(image .*nan.*{BOX}",
    ),
    ("infinite", lambda c: notes(c)[2].update(bbox=[1, 2, float("inf"), 4]), rf"annotation 19 .*inf.*{BOX}"),
    (
        "area NaN",
        lambda c: notes(c)[0].update(area=float("nan")),
        r'17 .* has "area" nan; expected square pixels',
    ),
    (
        "unknown category",
        lambda c: notes(c)[1].update(category_id=77),
        r"annotation 18 \(image 42\.jpg\) is of category_id 77; expected one of \[4, 9\]",
    ),
    ("no category", lambda c: notes(c)[1].pop("category_id"), r'18 .* has no "category_id"; expected one of'),
    (
        "unknown image",
        lambda c: notes(c)[1].update(image_id=5),
        r'annotation 18 is of image_id 5; expected the "id" of an entry of "images"',
    ),
    (
        "no image of it",
        lambda c: notes(c)[1].pop("image_id"),
        r'annotation 18 has no "image_id"; expected the "id"',
    ),
    (
        "no ids at all",
        lambda c: (notes(c)[1].pop("id"), notes(c)[1].pop("bbox")),
        r'annotation at index 1 \(image 42\.jpg\) has no "bbox"',
    ),
    (
        "mask of another size",
        lambda c: notes(c)[0].update(segmentation={"size": [60, 40], "counts": [2400]}),
        r"17 .* of size \[60, 40\]; expected \[height, width\] of the image, \[40, 60\]",
    ),
    (
        "mask without counts",
        lambda c: notes(c)[0].update(segmentation={"size": [40, 60]}),
        r"17 .* \"segmentation\" with keys \['size'\]; expected polygons",
    ),
    (
        "mask as text",
        lambda c: notes(c)[0].update(segmentation="abc"),
        r'17 .* "segmentation" of another kind; exp',
    ),
    (
        "odd polygon",
        lambda c: notes(c)[0].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        r"17 .* odd or non-finite",
    ),
    (
        "NaN polygon",
        lambda c: notes(c)[0].update(segmentation=[[1, 2, 3, 4, 5, float("nan")]]),
        r"17 .* odd or non-finite coordinate; expected polygons",
    ),
]


@pytest.mark.parametrize(("change", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_structural_problems(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(DataError, match=r"train\.json: " + f"(.*){message}"):
        load_detection_data(write(tmp_path, change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', r"train\.json: not JSON \(line 1, column 13: .*\); expected a COCO object with"),
        ("[]", r"train\.json: holds a list; expected a COCO object"),
        ("3", r"train\.json: holds a number; expected a COCO object"),
        ("", r"train\.json: not JSON"),
    ],
)
def test_not_coco_at_all(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_detection_data(tmp_path / "train.json")


# ---- what can't be used is left out, counted and named ----------------------------------------------------


def with_box(tmp_path: Path, *boxes: list[float]) -> DetectionData:
    def change(content: dict[str, Any]) -> None:
        content["annotations"] = [
            {"id": 100 + k, "image_id": 42, "category_id": 4, "bbox": box} for k, box in enumerate(boxes)
        ]

    return load_detection_data(write(tmp_path, change))


def test_boxes_without_size(tmp_path: Path) -> None:
    data = with_box(tmp_path, [1, 1, 0, 5], [1, 1, 5, -2], [1, 1, 5, 5])
    assert data.annotations[0].boxes.tolist() == [[1, 1, 6, 6]]
    assert data.notes == [
        "train.json: boxes of zero or negative size left out: 2 "
        "(annotation 100 (image 42.jpg), annotation 101 (image 42.jpg))"
    ]


def test_boxes_outside(tmp_path: Path) -> None:
    data = with_box(tmp_path, [70, 1, 5, 5], [1, -20, 5, 20], [1, 1, 5, 5])
    assert len(data.annotations[0]) == 1
    assert data.notes == [
        "train.json: boxes outside their image left out: 2 "
        "(annotation 100 (image 42.jpg), annotation 101 (image 42.jpg))"
    ]


def test_boxes_over_the_edge(tmp_path: Path) -> None:
    data = with_box(tmp_path, [-5, 1, 10, 5], [50, 30, 30, 30], [59, 0, 1.7, 5])
    assert data.annotations[0].boxes.tolist() == [[0, 1, 5, 6], [50, 30, 60, 40], [59, 0, 60, 5]]
    assert data.annotations[0].areas.tolist() == [25, 100, 5]
    # The third reaches over by less than a pixel: cut, but not worth a note.
    assert data.notes == [
        "train.json: boxes cut at the edge of their image: 2 "
        "(annotation 100 (image 42.jpg), annotation 101 (image 42.jpg))"
    ]


def test_many_cases_are_counted_and_the_first_named(tmp_path: Path) -> None:
    (note,) = with_box(tmp_path, *[[1, 1, 0, 0]] * 9).notes
    assert note.startswith("train.json: boxes of zero or negative size left out: 9 (annotation 100 ")
    assert note.endswith("annotation 104 (image 42.jpg) and 4 more)")


def test_outlines_of_two_points(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
        content["annotations"][2]["segmentation"] = [[1, 2, 3, 4], [0, 0, 9, 0, 9, 9]]

    data = load_detection_data(write(tmp_path, change))
    assert len(data.annotations[0]) == 1
    assert data.annotations[1].segmentations == [[[0, 0, 9, 0, 9, 9]]]
    assert "objects with an outline of fewer than 3 points left out: 1 (annotation 17" in data.notes[0]
    assert data.has_masks


def twenty(tmp_path: Path, missing: int) -> Path:
    def change(content: dict[str, Any]) -> None:
        content["images"] = [
            {"id": k, "file_name": f"{k}.jpg" if k >= missing else f"gone{k}.jpg", "width": 60, "height": 40}
            for k in range(20)
        ]
        content["annotations"] = [{"id": k, "image_id": k, "category_id": 4, "bbox": [1, 1, 5, 5]} for k in range(20)]

    path = write(tmp_path, change)
    for k in range(20):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{k}.jpg")
    return path


def test_a_few_missing_images_are_left_out_with_their_objects(tmp_path: Path) -> None:
    data = load_detection_data(twenty(tmp_path, 2))
    assert [i.id for i in data.images] == list(range(2, 20))
    assert sum(data.class_counts().values()) == 18
    assert data.notes == [
        "train.json: images are missing, they and their objects were left out: 2 (gone0.jpg, gone1.jpg)"
    ]


@pytest.mark.parametrize("missing", [3, 20])
def test_many_missing_images_stop(tmp_path: Path, missing: int) -> None:
    message = rf"train\.json: {missing} of 20 images are missing or can't be read \(gone0\.jpg, gone1\.jpg, .*"
    message += rf"looked in {tmp_path}, {tmp_path}/images, .*--images DIR"
    with pytest.raises(DataError, match=message):
        load_detection_data(twenty(tmp_path, missing))


def test_unreadable_images_of_unknown_size_are_left_out(tmp_path: Path) -> None:
    path = twenty(tmp_path, 0)
    content = json.loads(path.read_text())
    del content["images"][3]["width"]
    path.write_text(json.dumps(content))
    (tmp_path / "3.jpg").write_bytes(b"")
    data = load_detection_data(path)
    assert len(data) == 19
    assert "images can't be read, they and their objects were left out: 1 (" in data.notes[0]
    assert "3.jpg: empty file" in data.notes[0]


def test_categories_that_share_a_name_stay_apart(tmp_path: Path) -> None:
    data = load_detection_data(write(tmp_path, lambda c: c["categories"][1].update(name="dog")))
    assert [c.name for c in data.categories] == ["dog (id 4)", "dog (id 9)"]
    assert data.class_counts() == {"dog (id 4)": 1, "dog (id 9)": 1}
    assert "shared a name" in data.notes[0]


# ---- real data ---------------------------------------------------------------------------------------------

REAL = Path(os.environ.get("HEADSTART_DATA", "/nonexistent"))


@pytest.mark.parametrize("name", ["bccd/train.json", "bccd/val.json", "coco_mini/train.json", "coco_mini/val.json"])
def test_real_files_as_pycocotools_reads_them(name: str) -> None:
    path = REAL / name
    if not path.is_file():
        pytest.skip("HEADSTART_DATA does not hold it")
    data = load_detection_data(path)
    coco = COCO(str(path))
    assert data.notes == []
    assert [c.id for c in data.categories] == sorted(coco.getCatIds())
    assert {i.id for i in data.images} == set(coco.getImgIds())
    for image, objects in zip(data.images, data.annotations, strict=True):
        expected = coco.loadAnns(coco.getAnnIds(image.id))
        assert objects.iscrowd.tolist() == [bool(a["iscrowd"]) for a in expected]
        assert [data.categories[k - 1].id for k in objects.labels] == [a["category_id"] for a in expected]
        corners = [
            [a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in expected
        ]
        np.testing.assert_allclose(objects.boxes, np.reshape(corners, (-1, 4)), atol=1.0)
    samples = DetectionDataset(data)
    for index in range(0, len(samples), 20):
        pixels, target = samples[index]
        record = data.images[index]
        assert tuple(pixels.shape) == (3, record.height, record.width)
        assert len(target["boxes"]) == (~data.annotations[index].iscrowd).sum()


def test_crowds_of_real_files() -> None:
    path = REAL / "coco_mini" / "train.json"
    if not path.is_file():
        pytest.skip("HEADSTART_DATA does not hold it")
    data = load_detection_data(path)
    crowds = sum(int(a.iscrowd.sum()) for a in data.annotations)
    assert crowds > 0
    assert sum(a["iscrowd"] for a in data.to_coco()["annotations"]) == crowds
    assert sum(data.class_counts().values()) == sum(len(a) for a in data.annotations) - crowds


def test_scenes_are_read_with_masks(tmp_path: Path) -> None:
    from headstart.datasets import scenes

    scenes.make_scenes(tmp_path, unlabelled=0, train=0, val=3, progress=False)
    data = load_detection_data(tmp_path / "val.json")
    assert data.has_masks
    for index, objects in enumerate(data.annotations):
        drawn = scenes.draw_scene("val", index)
        assert np.array_equal(masks_of(objects, 96, 96), drawn.masks)
        assert objects.labels.tolist() == drawn.labels.tolist()
