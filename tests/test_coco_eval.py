"""The reference in these tests is pycocotools, run on copies of the same inputs.

For LVIS it is a plain evaluator written here, and ``lvis`` itself where it is importable (it is no development
dependency): ``pip install lvis``, then ``pytest tests/test_coco_eval.py -m slow``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from headstart.coco_eval import LVIS_METRICS, METRICS, PROPOSAL_METRICS, Scores, score, score_lvis, score_proposals
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


def test_flags_and_sizes_that_pycocotools_ignores_or_looks_at() -> None:
    """ "ignore" is overruled by "iscrowd"; areas on the very limits of the sizes; a box in which nothing is found."""
    truth, detections = random_case(7)
    for k, annotation in enumerate(truth["annotations"]):
        annotation["ignore"] = k % 2
        annotation["area"] = [32.0**2, 96.0**2, annotation["area"]][k % 3]
    detections = [d for d in detections if d["image_id"] != truth["images"][0]["id"]]
    for iou_type in ("bbox", "segm"):
        assert_same(score(truth, detections), truth, detections, iou_type)


def test_ties_across_images_ids_of_zero_and_nothing_in_a_row() -> None:
    """One score for all; ids 0; images without objects, without detections, without either; a box without area."""
    truth, detections = random_case(9, images=6)
    for detection in detections:
        detection["score"] = 0.5
    first = truth["images"][0]["id"]
    for entry in (*truth["annotations"], *detections):
        if entry["image_id"] == first:
            entry["image_id"] = 0
        if entry["category_id"] == 3:
            entry["category_id"] = 0
    truth["images"][0]["id"], truth["categories"][0]["id"] = 0, 0
    bare, missed = truth["images"][1]["id"], truth["images"][2]["id"]
    truth["images"].append({**truth["images"][1], "id": 2000})
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] != bare]
    detections = [d for d in detections if d["image_id"] != missed]
    flat = {"bbox": [5.0, 5.0, 0.0, 4.0], "segmentation": rle(rectangle(5, 5, 0, 0)), "score": 0.5}
    detections.append({"image_id": 0, "category_id": 13, **flat})
    scores = score(truth, detections)
    for iou_type in ("bbox", "segm"):
        assert_same(scores, truth, detections, iou_type)


def test_only_crowds() -> None:
    """Nothing can be found, and what lies in them does not count: undefined."""
    truth, detections = random_case(10)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 1
    scores = score(truth, detections)
    for iou_type in ("bbox", "segm"):
        assert_same(scores, truth, detections, iou_type)
    assert scores.metrics["bbox"]["AP"] is None


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


# -- whatever the class ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tied", [False, True])
def test_proposals_agree_with_pycocotools_without_classes(seed: int, tied: bool) -> None:
    truth, detections = random_case(seed, images=4, tied=tied)
    rng = np.random.default_rng(seed)
    for _ in range(1100):  # more than count
        x, y, w, h = (float(v) for v in rng.uniform(1, 70, 4))
        image_id = truth["images"][int(rng.integers(2))]["id"]
        detections.append({"image_id": image_id, "category_id": 3, "bbox": [x, y, w, h], "score": float(rng.random())})
    for entries in (truth["annotations"], detections):  # pycocotools' order where they tie
        entries.sort(key=lambda entry: entry["category_id"])
    mine = score_proposals(truth, [{k: v for k, v in d.items() if k != "category_id"} for d in detections])
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = copy.deepcopy(truth)
        api.createIndex()
        found = [{k: d[k] for k in ("image_id", "category_id", "bbox", "score")} for d in copy.deepcopy(detections)]
        evaluation = COCOeval(api, api.loadRes(found), "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [1, 10, 100, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"][..., 2], evaluation.eval["recall"]
    expected = {"AP": precision[:, :, 0, 0], "AP50": precision[0, :, 0, 0], "AP75": precision[5, :, 0, 0]}
    expected |= {f"AR{k}": recall[:, 0, 0, m] for m, k in enumerate((1, 10, 100, 1000))}
    expected |= {f"AR{size}": recall[:, 0, a, 2] for a, size in enumerate("sml", 1)}
    assert list(mine.metrics["bbox"]) == list(PROPOSAL_METRICS)
    for name, values in expected.items():
        value = values.mean() if (values > -1).any() else None
        assert mine.metrics["bbox"][name] == (None if value is None else pytest.approx(value, abs=1e-6)), name
    assert mine.metrics["bbox"]["AR1000"] > mine.metrics["bbox"]["AR100"] > mine.metrics["bbox"]["AR1"]
    assert mine.per_class == {}
    assert len(mine.tables()) == 1


# -- LVIS -----------------------------------------------------------------------------------------------------------


def federated_case(seed: int) -> tuple[dict, list[dict]]:
    truth, detections = random_case(seed, images=10, crowds=False)
    rng = np.random.default_rng(seed)
    for image in truth["images"]:
        image["neg_category_ids"] = [c for c in (3, 13, 23) if rng.random() < 0.4]
        image["not_exhaustive_category_ids"] = [c for c in (3, 13, 23) if rng.random() < 0.3]
    for category, frequency in zip(truth["categories"], "rfc", strict=True):
        category["frequency"] = frequency
    for _ in range(320):  # more than count, in one image
        x, y, w, h = (float(v) for v in rng.uniform(1, 70, 4))
        box = {"bbox": [x, y, w, h], "segmentation": rle(rectangle(x, y, w, h))}
        image_id = truth["images"][0]["id"]
        detections.append({"image_id": image_id, "category_id": 3, "score": float(rng.uniform(0.2, 1)), **box})
    return truth, detections


def plain_lvis(truth: dict, detections: list[dict]) -> dict[str, float | None]:
    """AP by the rules of LVIS, boxes of all sizes, one class, threshold and detection at a time."""
    ap: dict[int, dict[float, float]] = {}
    kept = []
    for image in truth["images"]:
        here = sorted((d for d in detections if d["image_id"] == image["id"]), key=lambda d: -d["score"])[:300]
        known = {a["category_id"] for a in truth["annotations"] if a["image_id"] == image["id"]}
        kept += [(d, image) for d in here if d["category_id"] in known | set(image["neg_category_ids"])]
    for category in (c["id"] for c in truth["categories"]):
        objects = [a for a in truth["annotations"] if a["category_id"] == category]
        mine = sorted((pair for pair in kept if pair[0]["category_id"] == category), key=lambda pair: -pair[0]["score"])
        for threshold in np.linspace(0.5, 0.95, 10) if objects else []:
            taken: set[int] = set()
            correct = []
            for d, image in mine:
                best, of = threshold, None
                for a in objects:
                    iou = coco_mask.iou(np.array([d["bbox"]]), np.array([a["bbox"]]), [0])[0, 0]
                    if a["image_id"] == d["image_id"] and a["id"] not in taken and iou >= best:
                        best, of = iou, a["id"]
                if of is not None:
                    taken.add(of)
                if of is not None or category not in image["not_exhaustive_category_ids"]:
                    correct.append(of is not None)
            hits = np.cumsum(correct)
            recall, precision = hits / len(objects), hits / np.arange(1, len(hits) + 1)
            steps = [max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)]
            ap.setdefault(category, {})[round(threshold, 2)] = float(np.mean(steps))
    mean = lambda values: float(np.mean(values)) if len(values) else None
    group = {c["frequency"]: c["id"] for c in truth["categories"]}
    return {
        "AP": mean([v for by_iou in ap.values() for v in by_iou.values()]),
        "AP50": mean([by_iou[0.5] for by_iou in ap.values()]),
        "AP75": mean([by_iou[0.75] for by_iou in ap.values()]),
        **{f"AP{f}": mean(list(ap.get(c, {}).values())) for f, c in group.items()},
    }


@pytest.mark.parametrize("seed", range(2))
def test_lvis_agrees_with_a_plain_evaluator(seed: int) -> None:
    truth, detections = federated_case(seed)
    scores = score_lvis(truth, detections, ("bbox",))
    assert list(scores.metrics["bbox"]) == list(LVIS_METRICS)
    for name, value in plain_lvis(truth, detections).items():
        assert scores.metrics["bbox"][name] == (None if value is None else pytest.approx(value, abs=1e-6)), name
    assert scores.metrics["bbox"]["APc"] is None  # of a class without objects
    assert scores.metrics["bbox"]["AP"] > score(truth, detections, ("bbox",)).metrics["bbox"]["AP"]


@pytest.mark.slow
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(5))
def test_lvis_agrees_with_lvis(seed: int, iou_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvis = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # which numpy had when lvis was written
    truth, detections = federated_case(seed)
    (tmp_path / "lvis.json").write_text(json.dumps(truth))
    found = [{k: v for k, v in d.items() if iou_type == "bbox" or k != "bbox"} for d in copy.deepcopy(detections)]
    api = lvis.LVIS(str(tmp_path / "lvis.json"))
    reference = lvis.LVISEval(api, lvis.LVISResults(api, found), iou_type)
    reference.run()
    mine = score_lvis(truth, detections, (iou_type,)).metrics[iou_type]
    for name, value in mine.items():
        expected = reference.get_results()[name.replace("AR300", "AR@300")]
        assert (-1.0 if value is None else value) == pytest.approx(expected, abs=1e-6), name


@pytest.mark.parametrize(
    ("place", "key", "message"),
    [
        ("images", "neg_category_ids", '"neg_category_ids" None; expected a list of category ids'),
        ("categories", "frequency", '"frequency" None; expected r, c or f'),
    ],
)
def test_lvis_needs_its_fields(place: str, key: str, message: str) -> None:
    truth, detections = federated_case(0)
    del truth[place][1][key]
    with pytest.raises(DataError, match=message):
        score_lvis(truth, detections)
