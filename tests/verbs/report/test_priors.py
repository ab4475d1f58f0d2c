"""Boxes that a run made itself, as ``headstart.verbs.refresh`` leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from reading import Page
from run_folders import SIZE, make_ground_truth, make_pretraining

from headstart.proposals.store import Row, schema_for, table_of, write_rows
from headstart.verbs.refresh import SCORES
from headstart.verbs.report import priors, report


def write_priors(run: Path, names: list[str], step: int, boxes: list[np.ndarray], scores: list[np.ndarray]) -> None:
    schema = schema_for({"settings": {"engine": "joindet"}, "engine": "joindet"})
    rows = [Row(n, 1000, *SIZE, boxes=b.astype(np.float32), n_raw=len(b)) for n, b in zip(names, boxes, strict=True)]
    rows.append(Row("broken.jpg", 0, error="zero bytes"))
    lists = pa.array([*map(list, scores), []], SCORES.type)
    table = table_of(rows, schema).append_column(SCORES, lists)
    write_rows(run / "priors" / f"{step:06d}.parquet", iter([table]), schema.append(SCORES))


def test_priors_from_refresh_to_refresh(tmp_path: Path) -> None:
    make_ground_truth(tmp_path / "data", 5)
    photos = tmp_path / "data" / "images"
    run = make_pretraining(tmp_path / "own boxes", photos, proposals=False)
    record = json.loads((run / "run.json").read_text())
    record["data"]["proposals"] = None
    (run / "run.json").write_text(json.dumps(record))
    names = sorted(p.name for p in photos.iterdir())
    rng = np.random.default_rng(0)
    means, sizes = [], []
    for step in range(0, 80, 10):
        low = [rng.uniform(0, 40, (step // 10 * (i != 1) + 6 * (i == 0), 2)) for i in range(5)]
        boxes = [np.concatenate([a, a + 20 + step], axis=1) for a in low]
        scores = [rng.uniform(0, 1, len(a)) for a in low]
        write_priors(run, names, step, boxes, scores)
        means.append(np.mean([len(b) for b in boxes]))
        sizes.append((20 + step) / np.sqrt(SIZE[0] * SIZE[1]))
    page = Page(report(run, tmp_path / "r.html", images=2))
    labels = [svg.get("aria-label") or "" for svg in page.all("svg")]
    curve = next(label for label in labels if label.startswith("Boxes an image by refresh"))
    assert all(f"{mean:.3g} from step {10 * k:g}" in curve for k, mean in enumerate(means))
    curve = next(label for label in labels if label.startswith("Size of boxes by refresh"))
    assert all(f"{size:.3g} from step {10 * k:g}" in curve for k, size in enumerate(sizes))
    shown = [label for label in labels if "from step" in label and label.startswith("photo")]
    assert len(shown) == 2 * priors.COLUMNS
    assert any(", from step 0: " in label for label in shown)
    last = [label for label in shown if "from step 70" in label]
    assert last == ["photo 001.jpg, from step 70: 0 of 0 boxes", "photo 003.jpg, from step 70: 7 of 7 boxes"]
    assert "8 times" in page.words()
    assert "headstart propose" not in page.words()


def test_only_the_surest_are_drawn_and_damage_is_named(tmp_path: Path) -> None:
    make_ground_truth(tmp_path / "data", 1)
    photos = tmp_path / "data" / "images"
    run = make_pretraining(tmp_path / "run", photos)
    boxes = np.array([[i, i, i + 30, i + 30] for i in range(14)], float)
    write_priors(run, ["photo 000.jpg"], 0, [boxes], [np.linspace(0, 1, 14)])
    (run / "priors" / "000010.parquet").write_bytes(b"PAR1")
    page = Page(report(run, tmp_path / "r.html"))
    assert "photo 000.jpg, from step 0: 10 of 14 boxes" in [svg.get("aria-label") for svg in page.all("svg")]
    assert ">1.00 </tspan>" in page.source
    assert ">0.23 </tspan>" not in page.source
    assert "000010.parquet: truncated, damaged" in page.words()
