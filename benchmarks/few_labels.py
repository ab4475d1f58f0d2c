"""Few labels: every way of starting, on the same images, labels, seeds and schedule.

    HEADSTART_DATA=DATA python benchmarks/few_labels.py --out runs/few_labels [--unlabelled DATA/coco6k/images]
    python benchmarks/few_labels.py --data scenes --out runs/scenes --families deformable_detr --labels 25

Data: ``DATA/bccd`` (https://github.com/Shenggan/BCCD_Dataset, MIT) as COCO JSON: ``train.json``, ``val.json`` and
``images/``; or scenes that are generated, 1000 without labels. Pretraining sees the photos of ``train.json`` without
their labels (of scenes: the 1000), or all of ``--unlabelled``. Then every start is fine-tuned with 10 and 25 labelled
images of ``train.json``, three seeds each; a seed draws the images, and all starts see the same ones. Prints a Markdown
table of AP and AP50 on ``val.json``, mean ± standard deviation.

Runs that are finished are not repeated, a killed call goes on. Each uses one thread; ``--jobs`` of them work at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

METRICS = ("AP", "AP50")


@dataclass(frozen=True)
class Start:
    """How a detector begins: the run it is fine-tuned from, and how that is made."""

    title: str
    family: str
    recipe: str
    run: str = "scratch"
    method: str = ""
    after: str = ""  # the run it starts from itself
    steps: int = 500
    settings: dict[str, Any] = field(default_factory=dict)


STARTS = [
    Start("scratch", "faster_rcnn", "small_cpu"),
    Start("SoCo", "faster_rcnn", "small_cpu", "soco", "soco"),
    Start("ADePT, joint", "faster_rcnn", "small_cpu_adept", "adept", "adept"),
    Start(
        "ADePT, separate, on SoCo",
        "faster_rcnn",
        "small_cpu_adept",
        "adept-separate",
        "adept",
        after="soco",
        steps=600,
        settings={"method.training": "separate", "optim.lr": 0.002},  # the RPN alone bears more than SoCo's rate
    ),
    Start("AlignDet on SoCo", "faster_rcnn", "small_cpu_aligndet", "aligndet", "aligndet", "soco", 250),
    Start("scratch", "retinanet", "small_cpu_retinanet"),
    Start("SoCo's backbone and FPN", "retinanet", "small_cpu_retinanet", "soco"),
    Start("AlignDet on SoCo", "retinanet", "small_cpu_retinanet", "aligndet-retinanet", "aligndet", "soco", 250),
    Start("scratch", "fcos", "small_cpu_fcos"),
    Start("SoCo's backbone and FPN", "fcos", "small_cpu_fcos", "soco"),
    Start("AlignDet on SoCo", "fcos", "small_cpu_fcos", "aligndet-fcos", "aligndet", "soco", 250),
    Start("scratch", "deformable_detr", "small_cpu_deformable_detr"),
    Start("SoCo's backbone", "deformable_detr", "small_cpu_deformable_detr", "soco"),
    Start("DETReg on SoCo", "deformable_detr", "small_cpu_detreg", "detreg", "detreg", "soco", 300),
    Start("ProSeCo on SoCo", "deformable_detr", "small_cpu_deformable_detr", "proseco", "proseco", "soco", 300),
    Start("JoinDet on SoCo", "deformable_detr", "small_cpu_joindet", "joindet", "joindet", "soco", 300),
    Start(
        "AlignDet on SoCo",
        "deformable_detr",
        "small_cpu_aligndet_deformable_detr",
        "aligndet-deformable_detr",
        "aligndet",
        "soco",
        300,
    ),
]
SCENES_PX = {"detector.short_side_px": 64, "detector.long_side_px": 64}  # as large as they are drawn
SCENES = {"soco": {"method.view_px": 64}, "joindet": {"method.update_epochs": 1}}  # five times as many as blood cells


def pretrain(start: Start, photos: Path, out: Path, boxes: Path, sizes: dict[str, int]) -> str:
    import torch

    import headstart

    torch.set_num_threads(1)
    run = out / start.run
    own = SCENES.get(start.method, {}) if sizes else {}
    if finished(run):
        return start.run
    headstart.pretrain(
        start.family,
        photos,
        start.method,
        out=run,
        start=out / start.after if start.after else None,
        proposals=boxes,
        recipe=start.recipe,
        max_steps=start.steps,
        settings={"train.workers": 1, **sizes, **own, **start.settings},
        resume=(run / "run.json").exists(),
        show=False,
    )
    return start.run


def finetune(
    start: Start, data: Path, out: Path, labels: int, seed: int, steps: int, sizes: dict[str, int]
) -> tuple[Path, dict[str, float]]:
    import torch

    import headstart

    torch.set_num_threads(1)
    run = tuned_folder(start, out, labels, seed, steps)
    if not finished(run):
        headstart.finetune(
            start.run if start.run == "scratch" else out / start.run,
            data / "train.json",
            data / "val.json",
            labels=labels,
            out=run,
            detector=start.family,
            recipe=start.recipe,
            max_steps=steps,
            seed=seed,
            settings={"train.workers": 0, **sizes},
            resume=(run / "run.json").exists(),
            show=False,
        )
    return run, scores(run)


def tuned_folder(start: Start, out: Path, labels: int, seed: int, steps: int) -> Path:
    return out / f"{start.family}-{start.run}-{labels}-{steps}-seed{seed}"


def finished(run: Path) -> bool:
    try:
        return json.loads((run / "run.json").read_text())["status"] == "finished"
    except FileNotFoundError:
        return False


def scores(run: Path) -> dict[str, float]:
    return json.loads((run / "eval.json").read_text())["metrics"]["bbox"]


def photos_of(data: Path, out: Path) -> Path:
    """The images of ``train.json`` alone, as links."""
    folder = out / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    for image in json.loads((data / "train.json").read_text())["images"]:
        name = Path(image["file_name"]).name
        if not (folder / name).exists():
            os.symlink((data / "images" / name).resolve(), folder / name)
    return folder


def scenes(folder: Path) -> Path:
    import headstart.datasets.scenes

    if not (folder / "val.json").exists():
        headstart.datasets.scenes.make_scenes(folder, unlabelled=1000, train=64, val=100, size_px=64)
    return folder


def table(starts: list[Start], out: Path, budgets: list[int], seeds: list[int], steps: int) -> str:
    lines = ["| detector | labelled images | start | AP | AP50 |", "|---|---|---|---|---|"]
    for family in dict.fromkeys(start.family for start in starts):
        for labels in budgets:
            for start in (start for start in starts if start.family == family):
                found = [scores(tuned_folder(start, out, labels, seed, steps)) for seed in seeds]
                cells = []
                for metric in METRICS:
                    values = [100 * f[metric] for f in found]
                    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                    each = ", ".join(f"{value:.1f}" for value in values)
                    cells.append(f"{statistics.mean(values):.1f}{spread} ({each})")
                lines.append(f"| {family} | {labels} | {start.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", choices=["bccd", "scenes"], default="bccd")
    parser.add_argument("--unlabelled", type=Path, help="other photos to pretrain on (default: those of train.json)")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps (default: 150)")
    parser.add_argument(
        "--families",
        nargs="+",
        default=["faster_rcnn", "retinanet", "fcos"],
        choices=list(dict.fromkeys(s.family for s in STARTS)),
    )
    parser.add_argument("--pretrain-steps", type=int, help="steps of pretraining (default: each start's own)")
    parser.add_argument(
        "--only", nargs="+", choices=list(dict.fromkeys(s.run for s in STARTS)), help="these starts alone"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    options = parser.parse_args()
    out, sizes = options.out, {}
    if options.data == "scenes":
        data, sizes = scenes(out / "scenes"), SCENES_PX
        photos = options.unlabelled or data / "unlabelled"
    elif "HEADSTART_DATA" in os.environ:
        data = Path(os.environ["HEADSTART_DATA"]) / "bccd"
        photos = options.unlabelled or photos_of(data, out)
    else:
        print("HEADSTART_DATA is not set: the folder that holds bccd/")
        return 2
    starts = [s for s in STARTS if s.family in options.families and (not options.only or s.run in options.only)]
    made = [replace(s, steps=options.pretrain_steps or s.steps) for s in STARTS if s.method]

    import headstart

    boxes = out / "boxes.parquet"
    headstart.propose(photos, boxes, settings=small_boxes())
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        needed = {start.run: start for start in made}
        wanted = {start.run for start in starts} | {needed[s.run].after for s in starts if s.run in needed}
        for after in (False, True):  # first what starts from nothing
            making = [
                pool.submit(pretrain, start, photos, out, boxes, sizes)
                for run, start in needed.items()
                if run in wanted and bool(start.after) == after
            ]
            for done in as_completed(making):
                print(f"pretrained: {done.result()}", flush=True)
        tuning = [
            pool.submit(finetune, start, data, out, labels, seed, options.steps, sizes)
            for seed in options.seeds
            for labels in options.labels
            for start in starts
        ]
        for count, one in enumerate(as_completed(tuning), 1):
            run, found = one.result()
            print(f"{count}/{len(tuning)} {run.name}: AP {100 * found['AP']:.1f}", flush=True)
    print(table(starts, out, options.labels, options.seeds, options.steps))
    return 0


def small_boxes() -> Any:
    from headstart.proposals import ProposalSettings

    return ProposalSettings(size_min=0.1)


if __name__ == "__main__":
    sys.exit(main())
