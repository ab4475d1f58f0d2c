"""The reference in these tests is pycocotools, run on copies of the same inputs."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from headstart.coco_eval import METRICS, Scores, score
from headstart.errors import DataError

SIZE = 160
NAMES = ["red cell", "Plättchen", "[bold]7"]


def rectangle(x: float, y: float, w: float, h: float) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))] = 1
    return mask


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": [SIZE, SIZE], "counts": counts if flat[0] == 0 else [0, *counts]}


def random_case(seed: int, images: int = 8, tied: bool = False, crowds: bool = True) -> tuple[dict, list[dict]]:
    """Boxes of all COCO sizes, jittered detections, misses, false alarms; ids neither dense nor sorted."""
    rng = np.random.default_rng(seed)
    ids = [int(i) for i in rng.permutation(1000)[:images]]
    categories = [{"id": 10 * k + 3, "name": name} for k, name in enumerate(NAMES)]
    annotations, detections = [], []
    for image_id in ids:
        for _ in range(rng.integers(0, 9)):
            w, h = np.exp(rng.uniform(np.log(6), np.log(130), 2))
            x, y = rng.uniform(0, SIZE - w), rng.uniform(0, SIZE - h)
            category = int(rng.choice([3, 13]))  # the third class never occurs
            crowd = bool(crowds and rng.random() < 0.2)
            mask = rectangle(x, y, w, h)
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": float(mask.sum()),
                    "iscrowd": int(crowd),
                    "segmentation": uncompressed(mask) if crowd else polygon,
                }
            )
            for _ in range(rng.integers(0, 3)):
                dx, dy, dw, dh = rng.normal(0, 0.08, 4) * [w, h, w, h]
                box = [max(0, x + dx), max(0, y + dy), max(2, w + dw), max(2, h + dh)]
                wrong = rng.random() < 0.1
                level = rng.choice([0.3, 0.6, 0.9]) if tied else rng.random()
                detections.append(
                    {
                        "image_id": image_id,
                        "category_id": 23 if wrong else category,
                        "bbox": [float(v) for v in box],
                        "score": float(level),
                        "segmentation": rle(rectangle(*box)),
                    }
                )
    truth = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": SIZE, "height": SIZE} for i in ids],
        "annotations": annotations,
        "categories": categories,
    }
    return truth, detections


def reference(truth: dict, detections: list[dict], iou_type: str) -> tuple[dict, dict]:
    truth, detections = copy.deepcopy(truth), copy.deepcopy(detections)
    if iou_type == "segm":
        for detection in detections:
            del detection["bbox"]  # see the note in coco_eval
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = truth
        api.createIndex()
        evaluation = COCOeval(api, api.loadRes(detections) if detections else COCO(), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    by_class = {}
    for k, category in enumerate(sorted(truth["categories"], key=lambda c: c["id"])):
        by_class[category["name"]] = {
            "AP": precision[:, :, k].mean() if (precision[:, :, k] > -1).any() else -1,
            "AP50": precision[0, :, k].mean() if (precision[0, :, k] > -1).any() else -1,
        }
    return dict(zip(METRICS, evaluation.stats, strict=False)), by_class


def assert_same(scores: Scores, truth: dict, detections: list[dict], iou_type: str) -> None:
    overall, by_class = reference(truth, detections, iou_type)
    plain = lambda value: -1.0 if value is None else value
    for name in METRICS:
        assert plain(scores.metrics[iou_type][name]) == pytest.approx(overall[name], abs=1e-6), name
    assert list(scores.per_class[iou_type]) == list(by_class)
    for name, expected in by_class.items():
        for metric, value in expected.items():
            assert plain(scores.per_class[iou_type][name][metric]) == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [False, True])
def test_agrees_with_pycocotools(seed: int, tied: bool) -> None:
    truth, detections = random_case(seed, tied=tied)
    scores = score(truth, detections)
    assert 0 < scores.metrics["bbox"]["AP"] < 1  # a case in which something can be told
    for iou_type in ("bbox", "segm"):
        assert_same(scores, truth, detections, iou_type)


def test_more_than_a_hundred_detections_in_an_image() -> None:
    truth, detections = random_case(3, images=2)
    noise = np.random.default_rng(0)
    for _ in range(250):
        x, y, w, h = noise.uniform(1, 70, 4)
        detections.append(
            {
                "image_id": truth["images"][0]["id"],
                "category_id": 3,
                "bbox": [x, y, w, h],
                "score": float(noise.uniform(0.2, 1)),
                "segmentation": rle(rectangle(x, y, w, h)),
            }
        )
    scores = score(truth, detections)
    for iou_type in ("bbox", "segm"):
        assert_same(scores, truth, detections, iou_type)


def test_no_detections() -> None:
    truth, _ = random_case(0)
    scores = score(truth, [])
    for iou_type in ("bbox", "segm"):
        assert scores.metrics[iou_type]["AP"] == 0.0
        assert scores.metrics[iou_type]["AR100"] == 0.0
        assert scores.per_class[iou_type]["red cell"]["AP"] == 0.0
        assert scores.per_class[iou_type]["[bold]7"]["AP"] is None


def test_no_ground_truth_is_undefined_not_zero() -> None:
    truth, detections = random_case(0)
    scores = score({**truth, "annotations": []}, detections)
    assert set(scores.metrics["bbox"].values()) == {None}
    assert set(scores.metrics["segm"].values()) == {None}
    assert scores.per_class["bbox"]["red cell"] == {"AP": None, "AP50": None}


@pytest.mark.parametrize("without", ["images", "categories"])
def test_an_empty_data_set(without: str) -> None:
    truth, _ = random_case(0)
    scores = score({**truth, "annotations": [], without: []}, [])
    assert set(scores.metrics["bbox"].values()) == {None}


def test_perfect_detections_score_one() -> None:
    truth, _ = random_case(1, crowds=False)
    perfect = []
    for a in truth["annotations"]:
        (mask,) = coco_mask.frPyObjects(a["segmentation"], SIZE, SIZE)
        mask["counts"] = mask["counts"].decode()
        perfect.append({**a, "segmentation": mask, "score": 1.0})
    scores = score(truth, perfect)
    assert scores.metrics["bbox"]["AP"] == pytest.approx(1.0)
    assert scores.metrics["segm"]["AP"] == pytest.approx(1.0)


def test_arguments_are_left_alone_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    truth, detections = random_case(2)
    before = copy.deepcopy((truth, detections))
    score(truth, detections)
    assert (truth, detections) == before
    assert capfd.readouterr() == ("", "")


def test_annotation_ids_do_not_matter() -> None:
    truth, detections = random_case(4)
    expected = score(truth, detections)
    for annotation in truth["annotations"]:
        annotation["id"] -= 1  # 0 is a special value inside the evaluator
    assert score(truth, detections) == expected


def test_a_crowd_without_a_mask_is_its_box() -> None:
    truth, detections = random_case(5)
    with_boxes = copy.deepcopy(truth)
    for plain, boxed in zip(truth["annotations"], with_boxes["annotations"], strict=True):
        if plain["iscrowd"]:
            x, y, w, h = plain["bbox"]
            boxed["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            plain["segmentation"] = None
    assert any(a["iscrowd"] for a in truth["annotations"])
    assert score(truth, detections) == score(with_boxes, detections)


def test_json_and_tables() -> None:
    truth, detections = random_case(2)
    scores = score(truth, detections)
    assert json.loads(json.dumps(scores.to_json(), allow_nan=False))["metrics"]["bbox"] == scores.metrics["bbox"]
    console = Console(width=120, file=io.StringIO())
    console.print(*scores.tables())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{100 * scores.metrics['bbox']['AP']:.1f}" in text
    assert "[bold]7" in text
    assert "–" in text


def test_two_classes_of_one_name_both_show() -> None:
    truth, detections = random_case(2)
    truth["categories"][1]["name"] = truth["categories"][0]["name"]
    assert list(score(truth, detections).per_class["bbox"])[:2] == ["red cell (id 3)", "red cell (id 13)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": [[1, 1, 9, 1, 9, 9]]}, "in compressed RLE"),
        ({"image_id": -5}, "detection 1: image_id -5 is not in the ground truth"),
        ({"category_id": 99}, "detection 1: category_id 99"),
        ({"score": float("nan")}, "score is nan"),
        ({"segmentation": None}, "masks can't be scored"),
    ],
)
def test_detections_that_cannot_be_scored(change: dict, message: str) -> None:
    truth, detections = random_case(0)
    detections[1].update(change)
    with pytest.raises(DataError, match=message):
        score(truth, detections)


def test_boxes_alone_need_no_masks() -> None:
    truth, detections = random_case(0)
    expected = score(truth, detections, ("bbox",))
    for item in truth["annotations"] + detections:
        del item["segmentation"]
    assert score(truth, detections, ("bbox",)) == expected
    assert list(expected.metrics) == ["bbox"]
    with pytest.raises(DataError, match=r'annotation 0 .image .* has no "segmentation", so'):
        score(truth, detections)
