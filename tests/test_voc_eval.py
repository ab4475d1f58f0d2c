"""The reference is the development kit's procedure, on corners counted from 1 that include their pixels."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from headstart.voc_eval import score

CLASSES = {4: "cat", 1: "dog", 7: "sofa"}  # no sofa occurs


def random_case(seed: int, tied: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    images = [{"id": int(i), "file_name": f"{i}.jpg", "width": 200, "height": 200} for i in rng.permutation(50)[:14]]
    annotations, detections = [], []
    for image in images:
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = (float(v) for v in rng.integers(4, 60, 4))
            category = int(rng.choice([1, 4]))
            difficult = int(rng.random() < 0.25)
            annotations.append(
                {"id": 0, "image_id": image["id"], "category_id": category, "bbox": [x, y, w, h], "iscrowd": difficult}
            )
            for _ in range(rng.integers(0, 4)):
                dx, dy, dw, dh = (int(v) for v in rng.integers(-5, 6, 4))
                level = rng.choice([0.3, 0.6, 0.9]) if tied else rng.random()
                box = [x + dx, y + dy, max(1.0, w + dw), max(1.0, h + dh)]
                of = category if rng.random() < 0.8 else int(rng.choice(list(CLASSES)))
                detections.append({"image_id": image["id"], "category_id": of, "bbox": box, "score": float(level)})
    categories = [{"id": k, "name": name} for k, name in CLASSES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def plain_ap(truth: dict[str, Any], detections: list[dict[str, Any]], category: int, iou: float, eleven: bool) -> float:
    corners = lambda b: (b[0] + 1, b[1] + 1, b[0] + b[2], b[1] + b[3])
    objects = [a for a in truth["annotations"] if a["category_id"] == category]
    found: set[int] = set()
    correct = []
    for d in sorted((d for d in detections if d["category_id"] == category), key=lambda d: -d["score"]):
        best, of = -np.inf, -1
        for k, a in enumerate(objects):
            if a["image_id"] != d["image_id"]:
                continue
            g, b = corners(a["bbox"]), corners(d["bbox"])
            w, h = min(g[2], b[2]) - max(g[0], b[0]) + 1, min(g[3], b[3]) - max(g[1], b[1]) + 1
            if w > 0 and h > 0:
                size = lambda c: (c[2] - c[0] + 1) * (c[3] - c[1] + 1)
                overlap = w * h / (size(g) + size(b) - w * h)
                if overlap > best:
                    best, of = overlap, k
        if best >= iou:
            if not objects[of]["iscrowd"]:
                correct.append(of not in found)
                found.add(of)
        else:
            correct.append(False)
    n = sum(not a["iscrowd"] for a in objects)
    hits = np.cumsum(correct)
    recall, precision = hits / n, hits / np.arange(1, len(hits) + 1)
    if eleven:
        return sum(max(precision[recall >= t], default=0.0) for t in np.arange(0.0, 1.1, 0.1)) / 11
    recall, precision = np.array([0, *recall, 1]), np.array([0, *precision, 0])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(sum((recall[steps] - recall[steps - 1]) * precision[steps]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("eleven", [False, True])
def test_agrees_with_the_development_kit(seed: int, tied: bool, eleven: bool) -> None:
    truth, detections = random_case(seed, tied)
    before = copy.deepcopy((truth, detections))
    scores = score(truth, detections, eleven)
    assert (truth, detections) == before
    ious = np.arange(50, 100, 5) / 100
    expected = {c: [plain_ap(truth, detections, c, iou, eleven) for iou in ious] for c in (1, 4)}
    assert 0.1 < expected[4][0] < 1  # a case in which something can be told
    for category, values in expected.items():
        mine = scores.per_class["bbox"][CLASSES[category]]
        assert mine == pytest.approx({"AP": np.mean(values), "AP50": values[0]}, abs=1e-12)
    assert scores.per_class["bbox"]["sofa"] == {"AP": None, "AP50": None}
    means = np.mean(list(expected.values()), axis=0)
    overall = {"AP": means.mean(), "AP50": means[0], "AP75": means[5]}
    assert scores.metrics["bbox"] == pytest.approx(overall, abs=1e-12)
    assert scores.suite == ("voc07" if eleven else "voc")


def test_nothing_found_and_nothing_to_find() -> None:
    truth, detections = random_case(0)
    assert score(truth, []).metrics["bbox"]["AP50"] == 0.0
    assert set(score({**truth, "annotations": []}, detections).metrics["bbox"].values()) == {None}
    assert set(score({**truth, "annotations": [], "images": []}, []).metrics["bbox"].values()) == {None}


def test_only_difficult_objects_are_nothing_to_find() -> None:
    truth, detections = random_case(0)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 1
    assert score(truth, detections).metrics["bbox"]["AP50"] is None
