"""Our Selective Search against the Python package ``selectivesearch`` and against OpenCV's, in one run.

    python benchmarks/selective_search.py [--photos FOLDER] [--images 12] [--turns 3] [--quick]

Photographs: those of ``--photos``, else everyday ones that come with scikit-image and matplotlib, all brought to a
long side of 500 px. The engines take turns on every image, each on one thread; a ratio is the peer's time over ours
on the same image, and the table shows the geometric mean over the images of the medians over the turns. OpenCV's
"quality" mode takes one turn only: it needs seconds.

"matched" is the share of the peer's distinct boxes that have one of ours at IoU >= 0.95, and the other way round;
"same" the share of images where all boxes are equal and in the same order.

Then: all cores against one; processes of their own for peak memory, for the first call ever (an empty cache: it
compiles) and for later starts; long sides from 250 to 2000 px; and, where HEADSTART_DATA holds coco_mini, the share
of labelled objects found at IoU 0.7 after SoCo's filter, of the labelled objects that pass that filter themselves.

The bars of the project are printed beside the ratios. Use an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from headstart.datasets.images import IMAGE_SUFFIXES, decode
from headstart.proposals import PAPERS, ProposalSettings
from headstart.proposals.filters import select
from headstart.proposals.selective_search import prepare, selective_search

Engine = Callable[[np.ndarray], np.ndarray]
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
LONG_SIDE_PX = 500
console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)


def ours(mode: str, **parameters: float) -> Engine:
    return lambda image: selective_search(image, mode=mode, **parameters)


def package(image: np.ndarray) -> np.ndarray:
    import selectivesearch

    _, regions = selectivesearch.selective_search(image, **PAPERS)
    boxes = np.array([region["rect"] for region in regions], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def opencv(mode: str) -> Engine:
    switch = {"single": "SingleStrategy", "fast": "SelectiveSearchFast", "quality": "SelectiveSearchQuality"}[mode]

    def search(image: np.ndarray) -> np.ndarray:
        found = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        found.setBaseImage(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        getattr(found, f"switchTo{switch}")()
        boxes = found.process().astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        return boxes

    return search


def peers(quality: bool) -> dict[str, Engine]:
    found: dict[str, Engine] = {}
    try:
        import selectivesearch  # noqa: F401

        found["selectivesearch"] = package
    except ImportError:
        console.print("without selectivesearch: pip install selectivesearch==0.4")
    if hasattr(cv2, "ximgproc"):
        modes = ("single", "fast", "quality") if quality else ("single", "fast")
        found.update({f"opencv {mode}": opencv(mode) for mode in modes})
    else:
        console.print("without OpenCV: the installed wheel has no ximgproc")
    return found


def photographs(folder: str | None, count: int) -> list[np.ndarray]:
    if folder is not None:
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        paths = paths[:: max(1, len(paths) // count)][:count]
    else:
        import matplotlib
        import skimage

        paths = [Path(skimage.__file__).parent / "data" / name for name in PHOTOS]
        paths = [*paths, Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"][:count]
    return [resized(decode(path), LONG_SIDE_PX) for path in paths]


def resized(image: np.ndarray, long_side_px: int) -> np.ndarray:
    scale = long_side_px / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def seconds(engine: Engine, image: np.ndarray) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    boxes = engine(image)
    return time.perf_counter() - start, boxes


def covered(boxes: np.ndarray, by: np.ndarray, iou: float = 0.95) -> float:
    """The share of distinct ``boxes`` with one of ``by`` at ``iou``; boxes without area count when they are equal."""
    boxes, by = np.unique(boxes, axis=0).astype(float), np.unique(by, axis=0).astype(float)
    equal = (boxes[:, None] == by[None]).all(axis=2).any(axis=1)
    return float(((overlap(boxes, by) >= iou).any(axis=1) | equal).mean())


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    corner = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (corner[1] - corner[0]).clip(0).prod(axis=2)
    area = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    return shared / np.maximum(area[0][:, None] + area[1][None] - shared, 1e-9)


def geometric(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def compare(images: list[np.ndarray], turns: int, others: dict[str, Engine]) -> None:
    """The main table: one thread, engines in turns."""
    modes: dict[str, Engine] = {
        "ours exact": ours("exact", **PAPERS),
        "ours fixed": ours("fixed", **PAPERS),
        "ours diverse": ours("diverse", **PAPERS),
    }
    engines = {**modes, **others}
    times: dict[str, list[float]] = {name: [] for name in engines}
    boxes: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    for image in images:
        taken: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(turns):
            for name, engine in engines.items():
                if turn and name == "opencv quality":
                    continue
                spent, found = seconds(engine, image)
                taken[name].append(spent)
                if turn == 0:
                    boxes[name].append(found)
        for name in engines:
            times[name].append(statistics.median(taken[name]))
    table = Table(title=f"One thread, {len(images)} photographs, long side {LONG_SIDE_PX} px, 500 / 0.9 / 10")
    for column in ("engine", "ms/image", "boxes", "exact is faster by", "fixed", "diverse", "matched", "same", "bar"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    bars = {"selectivesearch": "60, aim 85", "opencv fast": "60, aim 85; diverse 9", "opencv single": "11"}
    for name in engines:
        faster = [
            f"{geometric([other / our for other, our in zip(times[name], times[mode], strict=True)]):.1f}x"
            for mode in modes
        ]
        matched = same = ""
        if name == "selectivesearch":
            pairs = list(zip(boxes["ours exact"], boxes[name], strict=True))
            there, back = (np.mean([covered(*pair[::step]) for pair in pairs]) for step in (1, -1))
            matched = f"{there:.2%} / {back:.2%}"
            same = f"{np.mean([np.array_equal(*pair) for pair in pairs]):.0%}"
        count = f"{np.mean([len(found) for found in boxes[name]]):.0f}"
        row = faster if name in others else ["", "", ""]
        table.add_row(
            name, f"{1e3 * np.mean(times[name]):.1f}", count, *row, matched, same, bars.get(name, "")
        )  # fmt: skip
    console.print(table)


def threads(images: list[np.ndarray], turns: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = images * max(4, 24 // len(images))
    table = Table(title="Threads of one process: images a second against one thread's")
    for column in ("threads", "exact", "faster", "bar"):
        table.add_column(column, justify="right")
    counts = sorted({1, 2, cores}) if cores > 1 else [1]
    spent: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(turns + 1):
        for count in counts:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(ours("exact", **PAPERS), images[:1] * count))  # memory is allocated
                start = time.perf_counter()
                list(pool.map(ours("exact", **PAPERS), work))
                spent[count].append(time.perf_counter() - start)
    for count in counts:
        faster = statistics.median(a / b for a, b in zip(spent[1], spent[count], strict=True))
        rate = len(work) / min(spent[count])
        table.add_row(str(count), f"{rate:.0f}/s", f"{faster:.2f}x", "1.8" if count == 2 else "")
    console.print(table)


_CHILD = """
import json, sys
import numpy as np
image = np.load(sys.argv[2])
sys.path.insert(0, {here!r})
import selective_search as benchmark
name = sys.argv[1]
engine = {{"ours": benchmark.ours("exact", **benchmark.PAPERS), "selectivesearch": benchmark.package}}.get(name)
engine = engine or benchmark.opencv(name.split()[-1])
def kib(key):  # getrusage would count the parent, from which this process was forked
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
engine(image[:8, :8].copy())  # what it imports, loads and compiles
before = kib("VmRSS")
for _ in range(2):
    engine(image)
print(json.dumps([before, kib("VmHWM")]))
"""

_START = """
import sys, time
import numpy as np
image = np.load(sys.argv[1])
begin = time.perf_counter()
from headstart.proposals.selective_search import selective_search
imported = time.perf_counter()
selective_search(image, mode="exact")
first = time.perf_counter()
selective_search(image, mode="exact")
print(imported - begin, first - imported, time.perf_counter() - first)
"""


def processes(image: np.ndarray, others: dict[str, Engine]) -> None:
    """Peak memory of each engine, and what the first call costs, in fresh processes."""
    here = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/image.npy"
        np.save(file, image)

        def child(code: str, *arguments: str, **environment: str) -> str:
            command = [sys.executable, "-c", code, *arguments]
            done = subprocess.run(
                command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
            )
            return done.stdout.strip().splitlines()[-1]

        cold = [float(x) for x in child(_START, file, NUMBA_CACHE_DIR=f"{folder}/cache").split()]
        starts = [[float(x) for x in child(_START, file).split()] for _ in range(5)]
        warm = [statistics.median(column) for column in zip(*starts, strict=True)]
        table = Table(title="Start of a process, s")
        for column in ("", "import", "first call", "a later call", "bar"):
            table.add_column(column, justify="right" if column else "left")
        table.add_row("first ever: compiles", *(f"{x:.3f}" for x in cold), "15")
        table.add_row("later: loads what was compiled", *(f"{x:.3f}" for x in warm), "0.5")
        console.print(table)
        table = Table(title=f"Peak memory of a process, {image.shape[1]} x {image.shape[0]} px, MiB")
        table.add_column("engine")
        table.add_column("peak", justify="right")
        table.add_column("of it by searching", justify="right")
        for name in ["ours", *(name for name in others if name != "opencv quality")]:
            before, after = json.loads(child(_CHILD.format(here=here), name, file))
            table.add_row(name, f"{after / 1024:.0f}", f"{(after - before) / 1024:.0f}")
        console.print(table)


def sizes(images: list[np.ndarray], others: dict[str, Engine], quick: bool) -> None:
    """How time grows with the image, from few photographs, enlarged where need be."""
    chosen = {name: others[name] for name in ("selectivesearch", "opencv single", "opencv fast") if name in others}
    table = Table(title=f"Long sides, {len(images)} photographs: ms an image, and the peers' times over exact")
    for column in ("long side", "exact", "fixed", "diverse", *chosen):
        table.add_column(column, justify="right")
    for side in (250, 500, 1000) if quick else (250, 500, 1000, 2000):
        spent: dict[str, list[float]] = {}
        for image in images:
            scaled = resized(image, side)
            modes = {mode: ours(mode, **PAPERS) for mode in ("exact", "fixed", "diverse")}
            for name, engine in {**modes, **chosen}.items():
                if name in modes:
                    engine(scaled)
                spent.setdefault(name, []).append(seconds(engine, scaled)[0])
        row = [f"{1e3 * np.mean(spent[mode]):.1f}" for mode in ("exact", "fixed", "diverse")]
        for name in chosen:
            row.append(f"{geometric([a / b for a, b in zip(spent[name], spent['exact'], strict=True)]):.0f}x")
        table.add_row(f"{side} px", *row)
    console.print(table)


def recall(folder: Path, count: int | None, others: dict[str, Engine]) -> None:
    """Labelled objects found, before and after SoCo's filter."""
    data = [json.loads((folder / f"{split}.json").read_text()) for split in ("train", "val")]
    labelled: dict[str, list[list[float]]] = {}
    for split in data:
        names = {image["id"]: image["file_name"] for image in split["images"]}
        for box in split["annotations"]:
            if not box.get("iscrowd"):
                labelled.setdefault(names[box["image_id"]], []).append(box["bbox"])
    names = sorted(labelled)
    names = names[:: max(1, len(names) // count)][:count] if count else names
    settings = ProposalSettings()
    engines: dict[str, Engine] = {
        "ours exact": ours("exact"),
        "ours fixed": ours("fixed"),
        "ours diverse": ours("diverse"),
    }
    engines["ours fixed, 500/0.9/10"] = ours("fixed", **PAPERS)
    engines.update({name: others[name] for name in ("opencv single", "opencv fast") if name in others})
    found: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    kept: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    n_boxes: dict[str, list[tuple[int, int]]] = {name: [] for name in engines}
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for name in names:
        image = decode(folder / "images" / name)
        height, width = image.shape[:2]
        objects = np.array(labelled[name])
        objects[:, 2:] += objects[:, :2]
        objects_kept, fallback = select(objects, width, height, settings)
        for engine in engines:
            taken, boxes = seconds(engines[engine], image)
            spent[engine].append(taken)
            filtered, fell_back = select(boxes, width, height, settings)
            filtered = filtered if not fell_back else np.zeros((0, 4))
            n_boxes[engine].append((len(boxes), len(filtered)))
            found[engine].append(overlap(boxes.astype(float), objects).max(axis=0))
            if not fallback:
                none = np.zeros((1, len(objects_kept)))
                overlaps = overlap(filtered.astype(float), objects_kept.astype(float))
                kept[engine].append(np.concatenate([none, overlaps]).max(axis=0))
    table = Table(title=f"Labelled objects of coco_mini found, {len(names)} images, defaults of each engine")
    for column in (
        "engine",
        "boxes",
        "all at .5",
        "all at .7",
        "after the filter",
        "at .5",
        "at .7",
        "ms",
        "fast / it",
    ):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for engine in engines:
        before, after = np.mean(n_boxes[engine], axis=0)
        every, some = np.concatenate(found[engine]), np.concatenate(kept[engine])
        ratio = ""
        if "opencv fast" in spent:
            ratio = f"{geometric([a / b for a, b in zip(spent['opencv fast'], spent[engine], strict=True)]):.1f}x"
        table.add_row(
            engine,
            f"{before:.0f}",
            *(f"{(every >= iou).mean():.3f}" for iou in (0.5, 0.7)),
            f"{after:.0f}",
            *(f"{(some >= iou).mean():.3f}" for iou in (0.5, 0.7)),
            f"{1e3 * np.mean(spent[engine]):.1f}",
            ratio,
        )
    console.print(table)
    console.print(
        "bar: diverse finds at least opencv fast's share at .7 after the filter, in at most a ninth of its time"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder of photographs")
    parser.add_argument("--images", type=int, default=12, help="photographs at most")
    parser.add_argument("--turns", type=int, default=3, help="times every engine sees every image")
    parser.add_argument(
        "--quick", action="store_true", help="without OpenCV's quality mode and 2000 px; recall on 60 images"
    )
    options = parser.parse_args()
    cv2.setNumThreads(1)
    prepare()
    images = photographs(options.photos, options.images)
    others = peers(quality=not options.quick)
    compare(images, options.turns, others)
    threads(images, options.turns)
    if Path("/proc/self/status").exists():
        processes(images[0], others)
    sizes(images[:2], others, options.quick)
    data = Path(os.environ.get("HEADSTART_DATA", "")) / "coco_mini"
    if "HEADSTART_DATA" in os.environ and data.is_dir():
        recall(data, 60 if options.quick else None, others)
    else:
        console.print("without recall: HEADSTART_DATA names no folder with coco_mini")


if __name__ == "__main__":
    main()
