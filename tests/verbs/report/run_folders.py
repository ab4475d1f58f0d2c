"""Run folders like those the library writes, made up: photos, logs, scores, detections, proposals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from headstart.coco_eval import score
from headstart.proposals.store import Row, schema_for, table_of, write_rows
from headstart.tide import analyse

CLASSES = ["disc", "<script>alert(1)</script>", "bar & $tripe$"]
SIZE = (200, 150)


def make_photos(folder: Path, count: int, seed: int = 0) -> list[list[tuple[int, list[float]]]]:
    """Photos of discs, squares and bars; returns (class 0..2, [x, y, width, height]) of each object."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for i in range(count):
        noise = rng.normal(0, 12, (SIZE[1] // 4, SIZE[0] // 4, 1)) + rng.uniform(70, 190, 3)
        image = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        mine = []
        for _ in range(rng.integers(2, 6) if i % 5 else 14):
            kind = int(rng.integers(3))
            w, h = rng.uniform(16, 60, 2) if kind == 2 else np.repeat(rng.uniform(16, 60), 2)
            x, y = rng.uniform(0, SIZE[0] - w - 1), rng.uniform(0, SIZE[1] - h - 1)
            color = tuple(int(v) for v in rng.integers(0, 256, 3))
            shape = draw.ellipse if kind == 0 else draw.rectangle
            shape([x, y, x + w, y + h], fill=color)
            mine.append((kind, [float(v) for v in (x, y, w, h)]))
        image.save(folder / f"photo {i:03d}.jpg", quality=85)
        objects.append(mine)
    return objects


def make_ground_truth(folder: Path, count: int = 16, classes: list[str] = CLASSES) -> Path:
    objects = make_photos(folder / "images", count)
    annotations = [
        {
            "image_id": i + 1,
            "category_id": 10 * (kind + 1),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [[box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3]]],
        }
        for i, mine in enumerate(objects)
        for kind, box in mine
    ]
    for k, annotation in enumerate(annotations):
        annotation["id"] = k + 1
    truth = {
        "images": [
            {"id": i + 1, "file_name": f"photo {i:03d}.jpg", "width": SIZE[0], "height": SIZE[1]} for i in range(count)
        ],
        "annotations": annotations,
        "categories": [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(classes)],
    }
    (folder / "val.json").write_text(json.dumps(truth))
    return folder / "val.json"


def make_detections(truth: dict[str, Any], quality: float, seed: int) -> list[dict[str, Any]]:
    """The better the quality (0..1), the closer the boxes, the fewer the misses and false alarms."""
    rng = np.random.default_rng(seed)
    found = []
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        if rng.random() < quality:
            dx, dy, dw, dh = rng.normal(0, 0.16 * (1 - quality), 4) * [w, h, w, h]
            category = annotation["category_id"] if rng.random() < 0.5 + quality / 2 else 10
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": category,
                    "bbox": [float(v) for v in (x + dx, y + dy, max(3, w + dw), max(3, h + dh))],
                    "score": float(np.clip(rng.normal(quality, 0.25), 0.02, 0.99)),
                }
            )
        if rng.random() < 0.5 * (1 - quality):
            box = [*rng.uniform(0, 100, 2), *rng.uniform(10, 50, 2)]
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(rng.choice([10, 20, 30])),
                    "bbox": [float(v) for v in box],
                    "score": float(rng.uniform(0.02, 0.6)),
                }
            )
    return found


def write_log(folder: Path, steps: int, start: float, end: float, terms: list[str], seed: int, watch: bool) -> None:
    rng = np.random.default_rng(seed)
    with open(folder / "log.jsonl", "w") as log:
        for step in range(10, steps + 1, 10):
            level = end + (start - end) * math.exp(-4 * step / steps)
            parts = {term: level / len(terms) * float(rng.lognormal(0, 0.12)) for term in terms}
            entry: dict[str, Any] = {
                "step": step,
                "loss": sum(parts.values()),
                "terms": parts,
                "lr": 0.01,
                "images_per_s": 52.1,
                "seconds": step * 0.3,
            }
            if watch:
                done = step / steps
                entry["watch"] = {
                    "embedding_std": 0.3 + 0.5 * done + float(rng.normal(0, 0.02)),
                    "level_share": [0.35 - 0.1 * done, 0.4, 0.2 + 0.05 * done, 0.05 + 0.05 * done],
                }
            log.write(json.dumps(entry) + "\n")


DETECTOR = {"name": "faster_rcnn", "backbone": "resnet18", "fpn_channels": 64, "num_classes": None}


def run_record(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "created": "2025-03-01T10:00:00",
        "status": "finished",
        "headstart": "0.1.0",
        "versions": {"python": "3.11.7", "torch": "2.12.0", "torchvision": "0.27.0", "numpy": "2.1.0"},
        "git": "0123abc",
        "hardware": {"device": "cpu", "cpu": "Example CPU @ 2.0 GHz", "cores": 2},
        "seed": 0,
        "config": {"detector": DETECTOR},
        "data": {},
        **more,
    }


def make_pretraining(folder: Path, photos: Path, steps: int = 600, proposals: bool = True) -> Path:
    folder.mkdir(parents=True)
    names = sorted(p.name for p in photos.iterdir())
    record = run_record(
        "pretrain",
        folder.name,
        command=["headstart", "pretrain", "soco", str(photos), "--out", str(folder)],
        method="soco",
        config={"detector": DETECTOR, "method": {"K": 4, "tau": 0.99}, "optim": {"lr": 0.03}},
        data={"images": str(photos), "n_images": len(names), "fingerprint": "ab12"},
        summary={"steps": steps, "seconds": steps * 0.4},
    )
    (folder / "run.json").write_text(json.dumps(record))
    write_log(folder, steps, 7.5, 1.4, ["align"], seed=1, watch=True)
    if proposals:
        rng = np.random.default_rng(5)
        rows = []
        for name in names:
            low = rng.uniform(0, 0.5, (int(rng.integers(4, 60)), 2)) * SIZE
            boxes = np.concatenate([low, low + rng.uniform(0.3, 0.5, low.shape) * SIZE], axis=1)
            rows.append(Row(name, 1000, *SIZE, boxes=boxes.astype(np.float32), n_raw=200))
        rows.append(Row("broken.jpg", 0, error="zero bytes"))
        schema = schema_for({"settings": {"engine": "opencv"}, "engine": "opencv"})
        write_rows(folder / "proposals.parquet", iter([table_of(rows, schema)]), schema)
    return folder


def make_finetuning(
    folder: Path,
    truth_file: Path,
    *,
    method: str = "scratch",
    pretrain_steps: int = 0,
    source: str = "scratch",
    steps: int = 300,
    budget: str = "10",
    images: int = 10,
    seed: int = 0,
    quality: float = 0.6,
    evaluated: bool = True,
    config: dict[str, Any] | None = None,
    ids: list[str] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    command = ["headstart", "finetune", source, "--train", "train data/train.json", "--labels", budget]
    record = run_record(
        "finetune",
        folder.name,
        seed=seed,
        command=[*command, "--seed", str(seed), "--max-steps", str(steps), "--out", str(folder)],
        config={"detector": DETECTOR, "optim": {"lr": 0.01}, "max_steps": steps, **(config or {})},
        data={"train": "train data/train.json", "val": str(truth_file), "n_images": images},
        start={"from": source, "method": method, "pretrain_steps": pretrain_steps},
        labels={"budget": budget, "images": images, "ids_file": "labels.json"},
        summary={"steps": steps, "seconds": steps * 0.25},
    )
    (folder / "run.json").write_text(json.dumps(record))
    named = ids or [f"{seed}-{i}" for i in range(images)]
    (folder / "labels.json").write_text(json.dumps({"images": [{"id": i, "file_name": f"{i}.jpg"} for i in named]}))
    write_log(folder, steps, 2.2, 0.9 - 0.5 * quality, ["box", "class"], seed, watch=False)
    if evaluated:
        truth = json.loads(truth_file.read_text())
        detections = make_detections(truth, quality, 100 + seed + 10 * steps)
        scores = score(truth, detections, ("bbox",)).to_json()
        scores |= {"data": str(truth_file), "detections": "detections.json"}
        scores["errors"] = {"bbox": analyse(truth, detections).to_json()}
        (folder / "eval.json").write_text(json.dumps(scores))
        (folder / "detections.json").write_text(json.dumps(detections))
    return folder


def make_study(
    root: Path, budgets: tuple[int, ...] = (10,), seeds: tuple[int, ...] = (0, 1, 2), gain: float = 0.12
) -> list[Path]:
    """A pretraining run, and for each budget and seed: scratch, scratch for longer, and pretrained."""
    truth_file = make_ground_truth(root / "data")
    pretrained = make_pretraining(root / "runs" / "soco", root / "data" / "images")
    runs = [pretrained]
    for budget in budgets:
        base = 0.45 + 0.1 * math.log10(budget / 10 + 1)
        share = {"budget": str(budget), "images": budget}
        for seed in seeds:
            for name, quality, more in (
                ("scratch", base, {}),
                ("scratch-long", base + 0.5 * gain, {"steps": 900}),
                (
                    "tuned",
                    base + gain,
                    {"method": "soco", "pretrain_steps": 600, "source": str(pretrained)},
                ),
            ):
                runs.append(
                    make_finetuning(
                        root / "runs" / f"{name}-{budget}-seed{seed}",
                        truth_file,
                        seed=seed,
                        quality=quality,
                        **share,
                        **more,
                    )
                )
    return runs
