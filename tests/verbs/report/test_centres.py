from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from reading import Page
from run_folders import SIZE, make_finetuning, make_ground_truth

from headstart.verbs.report import centres, report


def test_numbers_against_a_plain_count(tmp_path: Path) -> None:
    truth_file = make_ground_truth(tmp_path / "data", 6)
    run = make_finetuning(tmp_path / "run", truth_file, quality=0.3)
    truth, found = (json.loads(f.read_text()) for f in (truth_file, run / "detections.json"))
    inside, surest, middle = [], [], []
    for image in truth["images"]:
        objects = [a["bbox"] for a in truth["annotations"] if a["image_id"] == image["id"]]
        mine = sorted((d for d in found if d["image_id"] == image["id"]), key=lambda d: -d["score"])
        for rank, d in enumerate(mine):
            x, y = d["bbox"][0] + d["bbox"][2] / 2, d["bbox"][1] + d["bbox"][3] / 2
            hit = any(a <= x <= a + w and b <= y <= b + h for a, b, w, h in objects)
            inside.append(hit)
            surest += [hit] if rank < len(objects) else []
            middle.append(abs(x / SIZE[0] - 0.5) <= 1 / 6 and abs(y / SIZE[1] - 0.5) <= 1 / 6)
    page = Page(report(run, tmp_path / "r.html", images=3))
    row = page.words().split("In the middle ninth, %", 1)[1]
    expected = [f"{len(found) / 6:.1f}", *(f"{100 * np.mean(v):.1f}" for v in (inside, surest, middle))]
    assert re.search(r"\s*".join(map(re.escape, ["scratch", *expected])), row)
    labels = [svg.get("aria-label") or "" for svg in page.all("svg")]
    assert any(label.startswith(f"scratch: centres of {len(found)} boxes, on average at") for label in labels)
    assert sum("centres inside an object" in label for label in labels) == 3
    assert "#centres" in [a["href"] for a in page.all("a")]


def test_shades_hold_every_cell_once_the_fullest_darkest() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.05, 1.05, (400, 2)) ** 2  # some beyond the edge
    counts = np.zeros((centres.CELLS, centres.CELLS), int)
    for x, y in points:
        counts[min(int(y * 16), 15), min(int(x * 16), 15)] += 1
    seen = {}
    for opacity, path in centres.shades(points):
        for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path):
            seen[int(y), int(x)] = opacity
    assert set(seen) == set(zip(*np.nonzero(counts), strict=True))
    assert seen[np.unravel_index(counts.argmax(), counts.shape)] == 1
    order = sorted(seen, key=lambda cell: counts[cell])
    assert [seen[cell] for cell in order] == sorted(seen.values())
    assert centres.shades(np.zeros((0, 2))) == []


def test_the_share_that_objects_cover() -> None:
    half, quarter = np.array([[0, 0, 0.5, 1.0]]), np.array([[0, 0, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]])
    assert centres.covered_share([half, quarter, np.zeros((0, 4))]) == pytest.approx((0.5 + 0.25) / 3)
    points = np.array([[0.1, 0.9], [0.5, 0.5], [0.6, 0.1]])
    assert centres.within(points, half).tolist() == [True, True, False]
    assert centres.within(points, np.zeros((0, 4))).tolist() == [False] * 3
