"""Two references: a plain, slow TIDE written here from the paper, and ``tidecv`` itself where it is importable.

``tidecv`` is no development dependency: it wants ``opencv-python``, which would overwrite the OpenCV we use. To run the
comparison, in an environment of its own: ``pip install . pytest pycocotools tidecv==1.0.1``, then
``pytest tests/test_tide.py -m slow``.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from headstart.tide import MAIN, MEANING, SPECIAL, analyse, verdicts

CLASSES = (5, 2, 9, 4)  # the last has no object
SIDE = 120


def rle(box: list[float]) -> dict[str, Any]:
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    x, y, w, h = box
    mask[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))] = 1
    encoded = coco_mask.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def random_case(
    seed: int, images: int = 20, tied: bool = False, federated: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every type of error, crowds, images without objects and without detections; boxes on whole pixels: IoUs tie."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []

    def found(image_id: int, category: int, box: list[float]) -> None:
        score = rng.choice([0.2, 0.5, 0.8]) if tied else rng.uniform(0.05, 1)
        detections.append(
            {
                "image_id": image_id,
                "category_id": category,
                "bbox": box,
                "score": float(score),
                "segmentation": rle(box),
            }
        )

    records = []
    for image_id in (int(i) for i in rng.permutation(100)[:images]):
        records.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": SIDE, "height": SIDE})
        for _ in range(rng.integers(0, 6)):
            w, h = (float(v) for v in rng.integers(6, 50, 2))
            x, y = float(rng.integers(0, SIDE - w)), float(rng.integers(0, SIDE - h))
            category = int(rng.choice(CLASSES[:3]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(not federated and rng.random() < 0.15),
                    "segmentation": rle([x, y, w, h]),
                }
            )
            for _ in range(rng.integers(0, 5)):
                far = rng.choice([0.03, 0.03, 0.3, 0.6])
                dx, dy, dw, dh = rng.normal(0, far, 4) * [w, h, w, h]
                left, top = (float(np.clip(round(v), 0, SIDE - 3)) for v in (x + dx, y + dy))
                box = [left, top, *(float(max(2, round(v))) for v in (w + dw, h + dh))]
                box[2:] = min(box[2], SIDE - left), min(box[3], SIDE - top)
                found(image_id, category if rng.random() < 0.7 else int(rng.choice(CLASSES)), box)
        for _ in range(rng.integers(0, 3)):
            found(
                image_id,
                int(rng.choice(CLASSES)),
                [float(v) for v in (*rng.integers(0, 60, 2), *rng.integers(4, 40, 2))],
            )
        if federated:
            records[-1]["neg_category_ids"] = [int(c) for c in CLASSES if rng.random() < 0.4]
            records[-1]["not_exhaustive_category_ids"] = [int(c) for c in CLASSES if rng.random() < 0.2]
    truth = {
        "images": records,
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in CLASSES],
    }
    return truth, detections


# -- a plain TIDE ---------------------------------------------------------------------------------------------------


def overlap(a: list[float], b: list[float], of_first: bool = False) -> float:
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / (a[2] * a[3] if of_first else a[2] * a[3] + b[2] * b[3] - both)


def average_precision(points: list[tuple[float, bool]], objects: int) -> float:
    if not objects:
        return 0.0
    curve, hits = [], 0
    for n, (_, correct) in enumerate(sorted(points, key=lambda point: -point[0]), 1):
        hits += correct
        curve.append((hits / objects, hits / n))
    return sum(max((p for r, p in curve if r >= step / 100), default=0.0) for step in range(101)) / 101


def mean_over_classes(points: list[tuple[int, float, bool]], objects: dict[int, int]) -> float:
    values = []
    for label in CLASSES:
        mine = [(score, correct) for of, score, correct in points if of == label]
        if mine or objects[label]:
            values.append(average_precision(mine, objects[label]))
    return sum(values) / len(values)


def plain_tide(truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, Any]:
    truth, detections = copy.deepcopy((truth, detections))
    objects = dict.fromkeys(CLASSES, 0)
    everything: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    for image in truth["images"]:
        here = [a for a in truth["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        crowds = [a for a in truth["annotations"] if a["image_id"] == image["id"] and a["iscrowd"]]
        mine = sorted((d for d in detections if d["image_id"] == image["id"]), key=lambda d: -d["score"])
        mine = mine[: 300 if "neg_category_ids" in image else 100]
        for target in here:
            objects[target["category_id"]] += 1
            target |= {"found": False, "wanted_by": None}
        for d in mine:
            label, best, of = d["category_id"], 0.0, None
            for target in here:
                iou = overlap(d["bbox"], target["bbox"])
                if target["category_id"] == label and not target["found"] and iou >= 0.5 and iou > best:
                    best, of = iou, target
            d["kind"] = "correct" if of else None
            if of:
                of["found"] = True
            known = {a["category_id"] for a in here}
            excuses = [c for c in crowds if c["category_id"] == label and overlap(d["bbox"], c["bbox"], True) > 0.5]
            if "neg_category_ids" in image:
                sure = (known | set(image["neg_category_ids"])) - set(image["not_exhaustive_category_ids"])
                excuses += [] if label in sure else ["not looked for"]  # type: ignore[list-item]
            d["ignored"] = bool(excuses) and not of
        for d in mine:
            if d["kind"]:
                continue
            near = [(overlap(d["bbox"], t["bbox"]), t) for t in here]
            same = [(iou if t["category_id"] == d["category_id"] else 0.0, t) for iou, t in near]
            other = [(iou if t["category_id"] != d["category_id"] else 0.0, t) for iou, t in near]
            top = lambda pairs: max(pairs, key=lambda pair: pair[0]) if pairs else (0.0, None)
            target = None
            if not here:
                d["kind"] = "Bkg"
            elif 0.1 <= top(same)[0] <= 0.5:
                d["kind"], target = "Loc", top(same)[1]
            elif top(other)[0] >= 0.5:
                d["kind"], target = "Cls", top(other)[1]
            elif any(iou >= 0.5 and t["found"] for iou, t in same):
                d["kind"] = "Dupe"
            elif top(near)[0] <= 0.1:
                d["kind"] = "Bkg"
            else:
                d["kind"] = "Both"
            d["fixed"] = None
            if target is not None and not target["found"] and target["wanted_by"] is None:
                target["wanted_by"] = d
                d["fixed"] = target["category_id"]
        everything += mine
        targets += here

    point = lambda d: (d["category_id"], d["score"], d["kind"] == "correct")
    counted = [d for d in everything if not d["ignored"]]
    wrong, right = [d for d in counted if d["kind"] != "correct"], [d for d in counted if d["kind"] == "correct"]
    ap = mean_over_classes([point(d) for d in counted], objects)
    less = lambda gone: {c: n - sum(t["category_id"] == c for t in gone) for c, n in objects.items()}
    missed = [t for t in targets if not t["found"] and t["wanted_by"] is None]
    unused = [t for t in targets if not t["found"]]
    gains = {}
    for kind in MAIN[:5]:
        points = []
        for d in everything:
            if d["kind"] == kind:
                points += [(d["fixed"], d["score"], True)] if d["fixed"] is not None else []
            elif d["kind"] != "correct" and not d["ignored"]:
                points.append(point(d))
        gains[kind] = max(0.0, mean_over_classes(points + [point(d) for d in right], objects) - ap)
    gains["Miss"] = max(0.0, mean_over_classes([point(d) for d in wrong + right], less(missed)) - ap)
    perfect = [(d["category_id"], float(d["kind"] == "correct"), d["kind"] == "correct") for d in counted]
    gains["FalsePos"] = mean_over_classes(perfect, objects) - ap
    gains["FalseNeg"] = mean_over_classes([point(d) for d in wrong + right], less(unused)) - ap
    counts = {kind: sum(d["kind"] == kind for d in everything) for kind in MAIN[:5]}
    counts |= {"Miss": len(missed), "FalsePos": len(wrong), "FalseNeg": len(unused)}
    one_by_one = {
        "detections": [d.get("kind") for d in detections],
        "ignored": [d.get("ignored", False) for d in detections],
        "objects": ["crowd" if t["iscrowd"] else plain_state(t) for t in truth["annotations"]],
    }
    return {"AP": ap, "dAP": gains, "counts": counts, "one by one": one_by_one}


def plain_state(target: dict[str, Any]) -> str:
    return "found" if target["found"] else "Miss" if target["wanted_by"] is None else "wrong"


# -- tidecv itself --------------------------------------------------------------------------------------------------


def of_tidecv(truth: dict[str, Any], detections: list[dict[str, Any]], iou_type: str) -> dict[str, Any]:
    from tidecv import TIDE, Data

    federated = "neg_category_ids" in truth["images"][0]
    objects, found = Data("truth", max_dets=300 if federated else 100), Data("found")
    for category in truth["categories"]:
        objects.add_class(category["id"], category["name"])
    for image in truth["images"]:
        objects.add_image(image["id"], image["file_name"])
    for a in truth["annotations"]:
        add = objects.add_ignore_region if a["iscrowd"] else objects.add_ground_truth
        add(a["image_id"], a["category_id"], a["bbox"], a["segmentation"])
    for image in truth["images"] if federated else []:
        present = {a["category_id"] for a in truth["annotations"] if a["image_id"] == image["id"]}
        sure = (present | set(image["neg_category_ids"])) - set(image["not_exhaustive_category_ids"])
        for category in set(CLASSES) - sure:
            objects.add_ignore_region(image["id"], category)
    for d in detections:
        found.add_detection(d["image_id"], d["category_id"], d["score"], d["bbox"], d["segmentation"])
    run = TIDE(mode=TIDE.BOX if iou_type == "bbox" else TIDE.MASK).evaluate(objects, found)
    gains = {**run.fix_main_errors(), **run.fix_special_errors()}
    counts = {error.short_name: n for error, n in run.count_errors().items()}
    return {
        "AP": run.ap / 100,
        "dAP": {error.short_name: value / 100 for error, value in gains.items()},
        "counts": {
            **counts,
            "FalsePos": sum(not p[1] for data in run.ap_data.objs.values() for p in data.data_points.values()),
            "FalseNeg": sum(len(objects) for objects in run.false_negatives.values()),
        },
    }


def assert_same(mine: dict[str, Any], reference: dict[str, Any]) -> None:
    assert mine["counts"] == reference["counts"]
    assert mine["AP"] == pytest.approx(reference["AP"], abs=1e-9)
    assert list(mine["dAP"]) == [*MAIN, *SPECIAL] == list(MEANING)
    assert mine["dAP"] == pytest.approx(reference["dAP"], abs=1e-9)


CASES = [{}, {"tied": True}, {"federated": True}]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_a_plain_tide(seed: int, case: dict[str, Any]) -> None:
    truth, detections = random_case(seed, **case)
    before = copy.deepcopy((truth, detections))
    errors = analyse(truth, detections)
    assert_same(errors.to_json(), plain_tide(truth, detections))
    assert min(errors.counts.values()) > 0  # a case in which every type occurs
    assert (truth, detections) == before


@pytest.mark.parametrize("case", CASES)
def test_verdicts_are_those_of_a_plain_tide_one_by_one(case: dict[str, Any]) -> None:
    """Detections are not in the order of their images or scores, and neither are annotations; some are past the 100."""
    truth, detections = random_case(7, images=12, **case)
    rng = np.random.default_rng(1)
    here = truth["images"][0]["id"]
    for score in rng.uniform(0, 1, 0 if case.get("tied") else 320):
        box = [float(v) for v in rng.integers(1, 60, 4)]
        detections.append({"image_id": here, "category_id": 5, "bbox": box, "score": float(score)})
    truth["annotations"] = [truth["annotations"][k] for k in rng.permutation(len(truth["annotations"]))]
    detections = [detections[k] for k in rng.permutation(len(detections))]
    if case.get("tied"):
        detections.sort(key=lambda d: -d["score"])  # which of equals comes first is the order they are given in
    told = verdicts(truth, detections)
    assert vars(told) == plain_tide(truth, detections)["one by one"]
    assert {"found", "wrong", "Miss"} <= set(told.objects)
    assert (None in told.detections) == (not case.get("tied"))

    counts = analyse(truth, detections).counts
    assert {name: told.detections.count(name) for name in MAIN[:5]} == {name: counts[name] for name in MAIN[:5]}
    assert told.objects.count("Miss") == counts["Miss"]
    assert told.objects.count("Miss") + told.objects.count("wrong") == counts["FalseNeg"]
    false = [k for k, of in zip(told.detections, told.ignored, strict=True) if k not in (None, "correct") and not of]
    assert len(false) == counts["FalsePos"]


def test_verdicts_of_a_case_made_by_hand() -> None:
    box = {"a": [0, 0, 20, 20], "b": [50, 0, 20, 20], "c": [0, 50, 20, 20], "d": [50, 50, 20, 20], "e": [90, 90, 9, 9]}
    truth = {
        "images": [{"id": 4, "width": SIDE, "height": SIDE}, {"id": 3, "width": SIDE, "height": SIDE}],
        "annotations": [
            {"image_id": 3, "category_id": 1, "bbox": box["a"], "iscrowd": 0},
            {"image_id": 4, "category_id": 1, "bbox": box["b"], "iscrowd": 0},
            {"image_id": 4, "category_id": 1, "bbox": box["a"], "iscrowd": 0},
            {"image_id": 4, "category_id": 2, "bbox": box["c"], "iscrowd": 0},
            {"image_id": 4, "category_id": 2, "bbox": box["d"], "iscrowd": 0},
            {"image_id": 4, "category_id": 1, "bbox": box["e"], "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    made = [
        (1, box["a"], 0.9, "Dupe"),
        (1, [0, 0, 20, 19], 0.95, "correct"),  # of the two that fit, the surer one
        (1, [60, 0, 20, 20], 0.8, "Loc"),
        (1, box["c"], 0.7, "Cls"),
        (1, [50, 60, 20, 20], 0.6, "Both"),
        (2, [90, 0, 20, 20], 0.5, "Bkg"),
        (1, [91, 91, 7, 7], 0.4, "Bkg"),  # in the crowd
    ]
    detections = [{"image_id": 4, "category_id": c, "bbox": b, "score": s} for c, b, s, _ in made]
    told = verdicts(truth, detections)
    assert told.detections == [kind for *_, kind in made]
    assert told.ignored == [False] * 6 + [True]
    assert told.objects == ["Miss", "wrong", "found", "wrong", "Miss", "crowd"]
    assert vars(verdicts(truth, [])) == {"detections": [], "ignored": [], "objects": ["Miss"] * 5 + ["crowd"]}


@pytest.mark.slow
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_tidecv(seed: int, case: dict[str, Any], iou_type: str) -> None:
    pytest.importorskip("tidecv")
    truth, detections = random_case(seed, images=5 + 10 * (seed % 3), **case)
    assert_same(analyse(truth, detections, iou_type).to_json(), of_tidecv(truth, detections, iou_type))
    assert_same(plain_tide(truth, detections), of_tidecv(truth, detections, "bbox"))


def test_masks_of_boxes_give_what_the_boxes_give() -> None:
    truth, detections = random_case(1)
    assert analyse(truth, detections, "segm") == analyse(truth, detections)


def test_only_the_surest_hundred_count() -> None:
    truth, detections = random_case(2, images=2)
    rng = np.random.default_rng(0)
    for _ in range(250):
        box = [float(v) for v in rng.integers(1, 60, 4)]
        detections.append(
            {"image_id": truth["images"][0]["id"], "category_id": 5, "bbox": box, "score": float(rng.uniform(0.3, 1))}
        )
    assert_same(analyse(truth, detections).to_json(), plain_tide(truth, detections))


def test_nothing_found_is_missed_and_nothing_to_find_is_background() -> None:
    truth, detections = random_case(3)
    objects = sum(not a["iscrowd"] for a in truth["annotations"])
    errors = analyse(truth, [])
    assert (errors.ap, errors.counts["Miss"], errors.counts["FalseNeg"]) == (0.0, objects, objects)
    errors = analyse({**truth, "annotations": []}, detections)
    assert (errors.ap, errors.counts["Bkg"], errors.gains["Bkg"]) == (0.0, len(detections), 0.0)
    nothing = analyse({**truth, "annotations": []}, [])
    assert nothing.ap is None
    assert set(nothing.gains.values()) == {None}
    json.dumps(nothing.to_json(), allow_nan=False)


def test_each_error_alone_gives_all_that_is_missing() -> None:
    """One object, one wrong detection: without that error the AP is 1."""
    image = {"id": 1, "file_name": "a.jpg", "width": SIDE, "height": SIDE}
    truth = {
        "images": [image],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [10, 10, 20, 20], "iscrowd": 0}],
        "categories": [{"id": 5, "name": "a"}, {"id": 2, "name": "b"}],
    }
    wrong = {"Loc": (5, [16, 10, 20, 30]), "Cls": (2, [10, 10, 20, 20])}
    for kind, (category, box) in wrong.items():
        errors = analyse(truth, [{"image_id": 1, "category_id": category, "bbox": box, "score": 0.9}])
        assert errors.ap == 0.0
        assert {name for name, value in errors.gains.items() if value} == {kind}
        assert errors.gains[kind] == 1.0
