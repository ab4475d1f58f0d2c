"""The whole path on generated images, through the public command line; ``make demo`` calls this.

scenes -> proposals -> SoCo pretraining -> fine-tuning with few labels, from the pretrained weights and from scratch,
with the same schedule, plus the control that sceptics ask for: scratch with a longer schedule -> one report.

Every command is printed as it runs; each can be repeated by hand. What is in the folder already is kept, so an
interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RECIPE = HERE / "demo.yaml"
LABELS = "25"
SEEDS = (0, 1, 2)
STEPS = 160
LONGER = 2  # times as many steps for the control
console = Console(highlight=False)


def headstart(*arguments: object, threads: int | None = None, quiet: bool = False) -> None:
    words = [str(a) for a in arguments]
    console.print(f"[bold]$ headstart {shlex.join(words)}[/bold]", soft_wrap=True)
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run([sys.executable, "-m", "headstart", *words], env=environment, capture_output=quiet, text=True)
    if done.returncode:
        console.print((done.stdout or "") + (done.stderr or ""), markup=False)
        raise SystemExit(done.returncode)


def finished(run: Path) -> bool:
    record = run / "run.json"
    return record.is_file() and json.loads(record.read_text())["status"] == "finished"


def finetune(start: Path | str, name: str, steps: int, seed: int, data: Path, runs: Path) -> None:
    out = runs / f"{name}-seed{seed}"
    if finished(out) and (out / "eval.json").is_file():
        return
    headstart(
        *("finetune", start, "--recipe", RECIPE, "--train", data / "train.json", "--val", data / "val.json"),
        *("--labels", LABELS, "--seed", seed, "--max-steps", steps, "--out", out, "--resume"),
        threads=1,
        quiet=True,
    )
    console.print(f"  {out.name}: AP {100 * box_metric(out, 'AP'):.1f} %", soft_wrap=True)


def box_metric(run: Path, name: str) -> float:
    return json.loads((run / "eval.json").read_text())["metrics"]["bbox"][name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--fresh", action="store_true", help="start over")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    data, runs = options.out / "scenes", options.out / "runs"
    start = time.monotonic()

    if not (data / "val.json").is_file():
        headstart("scenes", data, "--unlabelled", 1000, "--train", 64, "--val", 100, "--size", 64)
    pretrained = runs / "soco"
    if not finished(pretrained):
        headstart(*("pretrain", "soco", data / "unlabelled", "--recipe", RECIPE, "--out", pretrained, "--resume"))
    # Two at a time with one thread each: on two cores that is faster than one after the other with two.
    arms = [
        (pretrained, "soco", STEPS),
        ("scratch", "scratch", STEPS),
        ("scratch", "scratch-longer", LONGER * STEPS),
    ]
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        jobs = [
            pool.submit(finetune, origin, name, steps, seed, data, runs)
            for origin, name, steps in sorted(arms, key=lambda arm: -arm[2])
            for seed in SEEDS
        ]
        for job in jobs:
            job.result()
    report = options.out / "report.html"
    headstart("report", *sorted(runs.iterdir()), "--out", report)

    table = Table(title=f"{LABELS} labelled images, {len(SEEDS)} seeds, COCO metrics in %", title_justify="left")
    for column in ("start", "steps", "AP", "", "AP50", ""):
        table.add_column(column, justify="left" if column == "start" else "right")
    for _, name, steps in arms:
        cells = []
        for metric in ("AP", "AP50"):
            values = [100 * box_metric(runs / f"{name}-seed{seed}", metric) for seed in SEEDS]
            cells += [f"{statistics.mean(values):.1f}", f"± {statistics.stdev(values):.1f}"]
        table.add_row(name, str(steps), *cells)
    console.print(table)
    console.print("mean ± standard deviation over seeds; each seed draws its own labelled images")
    console.print(f"\nReport: {report.resolve()}   ({time.monotonic() - start:.0f} s)", soft_wrap=True)


if __name__ == "__main__":
    main()
