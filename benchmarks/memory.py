"""Memory that `headstart propose` and training need for ten times the images, over that for the images.

    python benchmarks/memory.py [--images 100000]

No image is read: names are made up, and rows of 20 boxes, as Selective Search leaves after the filter. Each number
of images has a process of its own; what is shown is its private memory (Linux: mapped files, whose pages all processes
share and the system can take back, do not count) above that of a process that has only imported the library:

    list     the names are found, sorted and shared          state    it is known of each image where its row is
    join     all rows are written in order, at the peak      store    a data worker has opened the file and used it
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from headstart.datasets import image_set
from headstart.datasets.image_set import ImageSet
from headstart.proposals.parts import Rows
from headstart.proposals.store import ProposalFile, ProposalStore, Row, schema_for, table_of, write_rows

STEPS = ("list", "state", "join", "store")
TIMES = 10
TARGET = 3.0  # ratio at the peak; ten would be memory that grows with the images
BOXES, PART = 20, 2048
SCHEMA = schema_for({"settings": {}, "engine_version": "1"})


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


class Peak:
    """Of private memory, looked at every 10 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes, private_bytes())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def names(count: int) -> Iterator[str]:
    return (f"train/{i // 1000:05d}/image_{i:09d}.jpg" for i in range(count))


def listed(folder: Path, count: int) -> ImageSet:
    image_set._files = lambda _: names(count)  # type: ignore[assignment]
    found = ImageSet(folder)
    found.share(folder / "images.arrow")
    return found


def write_parts(folder: Path, count: int) -> None:
    boxes = np.random.default_rng(0).uniform(0, 500, (BOXES, 4)).astype(np.float32)
    every = names(count)
    for first in range(0, count, PART):
        rows = [Row(next(every), -1, 500, 500, boxes, 200) for _ in range(min(PART, count - first))]
        write_rows(folder / f"part-{first:09d}", iter([table_of(rows, SCHEMA)]), SCHEMA)


def state(folder: Path, count: int) -> Rows:
    rows = Rows(listed(folder, count))
    for part in sorted(folder.glob("part-*")):
        rows.add(ProposalFile(part), check=slice(0))
    assert not len(rows.pending())
    return rows


def measure(step: str, folder: Path, count: int) -> int:
    """Bytes; the steps of one folder are measured in their order."""
    start = private_bytes()
    if step == "join":
        rows = state(folder, count)
        with Peak() as peak:
            write_rows(folder / "out.parquet", rows.in_order(SCHEMA), SCHEMA)
        return peak.bytes - start
    if step == "list":
        kept: object = listed(folder, count)
        write_parts(folder, count)
    elif step == "state":
        kept = state(folder, count)
    else:
        ProposalStore(folder / "out.parquet", folder)  # the first one writes what all map
        start = private_bytes()
        kept = store = ProposalStore(folder / "out.parquet", folder)
        for i in np.random.default_rng(0).integers(0, count, 10_000):
            assert store.images[i]
            assert len(store.boxes(i)) == BOXES
    used = private_bytes() - start
    del kept
    return used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="the smaller number (default: 100000)")
    parser.add_argument("--measure", nargs=3, metavar=("STEP", "FOLDER", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        step, folder, count = options.measure
        print(measure(step, Path(folder), int(count)))
        return 0
    counts = (options.images, TIMES * options.images)
    used: dict[tuple[str, int], int] = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            for step in STEPS:
                command = [sys.executable, __file__, "--measure", step, folder, str(count)]
                used[step, count] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    table = Table("step", *(f"MiB for {count:,}" for count in counts), "bytes an image more", "ratio")
    for step in STEPS:
        small, large = (used[step, count] for count in counts)
        more = (large - small) / (counts[1] - counts[0])
        table.add_row(step, f"{small / 2**20:.0f}", f"{large / 2**20:.0f}", f"{more:.0f}", f"{large / small:.2f}")
    Console(width=100).print(table)
    small, large = (max(used[step, count] for step in STEPS) for count in counts)
    print(f"peak ratio {large / small:.2f} for {TIMES} times the images; wanted: at most {TARGET}")
    return 0 if large <= TARGET * small else 1


if __name__ == "__main__":
    sys.exit(main())
