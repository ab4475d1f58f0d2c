"""How long a report of many photos takes to open in a browser, beside one of a dozen photos.

    python benchmarks/report.py [--images 200] [--repeats 5] [--keep FOLDER]

Makes scenes and three runs from them (a ground truth jittered and doubled: all types of error occur), writes both
reports, and opens them in headless Chromium in turns, each time in a fresh profile. Two times are taken in the page,
from the beginning of the navigation: until its load event, and until after that all of it is laid out. Printed are the
medians and the lowest, the ratio of both pages, and how far below a second the large one is. Other work on the machine
counts in these times; not so in the browser's CPU time, all processes together, beyond that of an empty page.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from headstart.datasets.detection import DetectionData, load_detection_data
from headstart.datasets.scenes import make_scenes
from headstart.verbs.evaluate import assess, write_evaluation
from headstart.verbs.report import report

FEW = 12
STARTS = {"scratch": 0.25, "soco": 0.15, "aligndet": 0.1}  # how far boxes are off
TARGET_S = 1.0
PROBE = """<script>addEventListener("load", () => {
  const loaded = performance.now();
  document.body.getBoundingClientRect();
  document.title = `TIMES ${loaded} ${performance.now()}`;
});</script></body>"""
EMPTY = "<!doctype html><title></title><body></body>"


def make_detections(truth: dict[str, Any], off: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    found = []
    classes = [category["id"] for category in truth["categories"]]
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        for _ in range(rng.integers(0, 4)):
            dx, dy, dw, dh = off * rng.normal(0, 1, 4) * [w, h, w, h]
            right = rng.random() > off
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"] if right else int(rng.choice(classes)),
                    "bbox": [float(v) for v in (x + dx, y + dy, max(4, w + dw), max(4, h + dh))],
                    "score": float(rng.uniform(0.2, 1)),
                }
            )
    return found


def make_run(folder: Path, data: DetectionData, start: str, off: float) -> Path:
    folder.mkdir(parents=True)
    record = {
        "kind": "finetune",
        "name": start,
        "status": "finished",
        "seed": 0,
        "config": {"detector": {"name": "faster_rcnn", "backbone": "resnet50"}},
        "data": {"val": str(data.source)},
        "start": {"method": start, "pretrain_steps": 1000 if start != "scratch" else 0},
        "labels": {"budget": "10%", "images": 100},
        "summary": {"steps": 500, "seconds": 100},
    }
    (folder / "run.json").write_text(json.dumps(record))
    steps = [{"step": step, "loss": 2.0 / step**0.3, "terms": {}} for step in range(10, 501, 10)]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in steps))
    found = make_detections(data.to_coco(), off, np.random.default_rng(1))
    write_evaluation(assess(data, found, "coco"), folder / "eval.json")
    return folder


def opened(chromium: str, html: str) -> tuple[float, float, float]:
    """Seconds until the load event, until all is laid out, and of CPU of the whole browser, its start included."""
    with tempfile.TemporaryDirectory() as profile:
        page = Path(profile) / "page.html"
        page.write_text(html.replace("</body>", PROBE), encoding="utf-8")
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        switches += [f"--user-data-dir={profile}/profile", "--window-size=1280,900", "--dump-dom"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [chromium, *switches, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r"<title>TIMES ([\d.]+) ([\d.]+)</title>", done.stdout)
    assert found is not None, done.stderr
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(found[1]) / 1000, float(found[2]) / 1000, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder that the reports are left in")
    options = parser.parse_args()
    chromium = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if chromium is None:
        raise SystemExit("no Chromium on this machine; expected chromium, chromium-browser or google-chrome")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        make_scenes(folder / "scenes", unlabelled=0, train=0, val=options.images, size_px=256)
        data = load_detection_data(folder / "scenes" / "val.json")
        runs = [make_run(folder / "runs" / start, data, start, off) for start, off in STARTS.items()]
        pages = {n: report(runs, folder / f"report_{n}.html", images=n) for n in (FEW, options.images)}
        html = {n: page.read_text(encoding="utf-8") for n, page in pages.items()}
        html[0] = EMPTY
        measured: dict[int, list[tuple[float, float, float]]] = {n: [] for n in html}
        for _ in range(options.repeats):
            for n, text in html.items():
                measured[n].append(opened(chromium, text))
    medians = {n: [statistics.median(values) for values in zip(*some, strict=True)] for n, some in measured.items()}
    table = Table("photos", "megabytes", "boxes", "load event, s", "laid out, s", "lowest, s", "CPU, s")
    for n in pages:
        load, laid_out, cpu = medians[n]
        values = (load, laid_out, min(t for _, t, _ in measured[n]), cpu - medians[0][2])
        size, boxes = f"{len(html[n]) / 1e6:.2f}", f"{html[n].count('<g data-c='):,}"
        table.add_row(str(n), size, boxes, *(f"{value:.2f}" for value in values))
    console = Console()
    console.print(table)
    many, few = medians[options.images], medians[FEW]
    console.print(f"{options.images} photos over {FEW}: {many[1] / few[1]:.2f}")
    console.print(
        f"a second over {options.images} photos: {TARGET_S / many[1]:.2f}; "
        f"over their CPU time: {TARGET_S / (many[2] - medians[0][2]):.2f}"
    )


if __name__ == "__main__":
    main()
