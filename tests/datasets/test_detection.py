from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO

from headstart.datasets.detection import (
    Annotations,
    Category,
    DetectionData,
    ImageRecord,
    load_detection_data,
    masks_of,
)
from headstart.errors import DataError


def annotations(
    boxes: list[list[float]],
    labels: list[int],
    crowd: list[bool] | None = None,
    segmentations: list[object] | None = None,
) -> Annotations:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return Annotations(
        boxes=array,
        labels=np.array(labels, np.int64),
        areas=((array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])).astype(np.float32),
        iscrowd=np.array(crowd or [False] * len(labels), bool),
        segmentations=segmentations or [None] * len(labels),
    )


def data(ids: tuple[int | str, ...] = (7, 3, 9)) -> DetectionData:
    categories = [Category(2, "cat"), Category(5, "dog")]
    images = [ImageRecord(i, Path(f"/x/{i}.jpg"), f"{i}.jpg", 60, 40) for i in ids]
    objects = [
        annotations([[1, 2, 11, 22], [0, 0, 60, 40]], [1, 2], crowd=[False, True]),
        annotations([], []),
        annotations([[5.5, 6.5, 7.5, 9.5]], [2]),
    ]
    return DetectionData(Path("some/train.json"), categories, images, objects)


def test_to_coco_is_what_pycocotools_reads() -> None:
    coco = COCO()
    coco.dataset = data().to_coco()
    coco.createIndex()
    assert coco.getImgIds() == [7, 3, 9]
    assert sorted(coco.anns) == [1, 2, 3]
    assert coco.anns[1]["bbox"] == [1, 2, 10, 20]
    assert coco.anns[1]["category_id"] == 2
    assert coco.anns[2]["iscrowd"] == 1
    assert coco.anns[3]["bbox"] == [5.5, 6.5, 2, 3]
    assert coco.anns[3]["image_id"] == 9
    assert coco.anns[3]["area"] == 6
    assert "segmentation" not in coco.anns[3]


def test_text_ids_become_positions() -> None:
    named = data(("a", "b", "c"))
    assert [named.coco_image_id(i) for i in range(3)] == [1, 2, 3]
    assert [image["id"] for image in named.to_coco()["images"]] == [1, 2, 3]
    assert named.to_coco()["annotations"][-1]["image_id"] == 3
    mixed = data(("a", 1, 2))  # keeping 1 and 2 would clash with the position of "a"
    assert [mixed.coco_image_id(i) for i in range(3)] == [1, 2, 3]
    assert [data().coco_image_id(i) for i in range(3)] == [7, 3, 9]


def test_class_counts_leave_crowds_out() -> None:
    assert data().class_counts() == {"cat": 1, "dog": 1}


def test_subset_keeps_order_and_categories() -> None:
    part = data().subset([9, 7])
    assert [image.id for image in part.images] == [9, 7]
    assert part.annotations[0].labels.tolist() == [2]
    assert part.categories == data().categories
    with pytest.raises(DataError, match=r"some/train\.json: has no image with id 4, 5"):
        data().subset([7, 4, 5])
    with pytest.raises(DataError, match="image id 7 chosen twice"):
        data().subset([7, 3, 7])


def test_with_categories_matches_by_name() -> None:
    moved = data().with_categories([Category(1, "bird"), Category(2, "dog"), Category(3, "cat")])
    assert moved.annotations[0].labels.tolist() == [3, 2]
    assert moved.annotations[2].labels.tolist() == [2]
    assert moved.class_counts() == {"bird": 0, "dog": 1, "cat": 1}
    assert data().annotations[0].labels.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"train\.json: has objects of category dog; expected only cat, bird"):
        data().with_categories([Category(1, "cat"), Category(2, "bird")])


# ---- masks -----------------------------------------------------------------------------------------------

POLYGONS = [[[10.2, 5.5, 40, 7, 35.5, 38, 12, 30], [50, 50, 60, 50, 60, 60]], [[0, 0, 80, 0, 80, 64]]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools.*")
def test_masks_agree_with_pycocotools() -> None:
    generator = np.random.default_rng(0)
    bits = (generator.random((64, 80)) > 0.5).astype(np.uint8)
    compressed = reference_masks.encode(np.asfortranarray(bits))
    compressed["counts"] = compressed["counts"].decode()
    uncompressed = {"size": [64, 80], "counts": [100, 20, 30, 64 * 80 - 150]}
    objects = annotations([[0, 0, 9, 9]] * 4, [1] * 4, segmentations=[*POLYGONS, compressed, uncompressed])
    masks = masks_of(objects, 64, 80)
    assert masks.shape == (4, 64, 80)
    assert masks.dtype == np.uint8
    for mask, polygons in zip(masks, POLYGONS, strict=False):
        merged = reference_masks.merge(reference_masks.frPyObjects(polygons, 64, 80))
        assert np.array_equal(mask, reference_masks.decode(merged))
    assert np.array_equal(masks[2], bits)
    flat = np.repeat([0, 1, 0, 0], [100, 20, 30, 64 * 80 - 150])  # column by column
    flat[120:150], flat[150:] = 0, 1
    assert np.array_equal(masks[3], flat.reshape(80, 64).T)


def test_no_objects_no_masks() -> None:
    assert masks_of(annotations([], []), 8, 9).shape == (0, 8, 9)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "object 0 has no segmentation"),
        ({"size": [64, 80], "counts": "%%"}, "object 0: the segmentation can't be decoded"),
        ({"size": [64, 80], "counts": [1, 2]}, r"object 0: the segmentation can't be decoded \(.*5120"),
    ],
)
def test_masks_that_can_not_be_decoded(segmentation: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        masks_of(annotations([[0, 0, 9, 9]], [1], segmentations=[segmentation]), 64, 80)


def test_has_masks() -> None:
    assert not data().has_masks
    whole = data()
    whole.annotations[0].segmentations = [[[0, 0, 9, 0, 9, 9]], None]  # the second is a crowd
    assert not whole.has_masks
    whole.annotations[2].segmentations = [[[0, 0, 9, 0, 9, 9]]]
    assert whole.has_masks
    whole.annotations = [annotations([], [])] * 3
    assert not whole.has_masks


def test_unknown_kinds_of_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file or folder; expected a COCO \.json file or"):
        load_detection_data(tmp_path / "none.json")
    (tmp_path / "a.csv").write_text("x,y")
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of annotations; expected a COCO \.json file, a"):
        load_detection_data(tmp_path / "a.csv")
