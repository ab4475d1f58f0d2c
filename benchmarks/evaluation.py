"""The time that other COCO evaluators take over ours, and ``tidecv`` over our error types.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--images 5000] [--pairs 5] [--masks]

All get the same generated ground truth and detections, by default as many as COCO's validation images have: 80
classes, 7 objects an image, 100 detections, ties and crowds among them. CPU seconds of the whole call count, since
other programs may want the cores too; with the others that is building their index, loading the results, evaluate,
accumulate and summarize. hotcoco does the matching in ours: what it takes when called directly shows what lies above
it. Ours and hotcoco take turns ``--pairs`` times, the slow ones run once. ``tidecv`` runs where it is importable. Also
printed: the largest difference of our metrics to those of pycocotools.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from faster_coco_eval.core import mask as rle_mask
from hotcoco import COCO as HotCOCO
from hotcoco import COCOeval as HotCOCOeval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.table import Table

from headstart import coco_eval, tide

CLASSES, OBJECTS, DETECTIONS = 80, 7, 100
WIDTH, HEIGHT = 640, 480


def made_up(images: int, masks: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(0)

    def box() -> list[float]:
        w, h = np.exp(rng.uniform(np.log(8), np.log(300), 2))
        return [float(v) for v in (rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h), w, h)]

    def region(of: list[float]) -> dict[str, Any]:
        x, y, w, h = of
        (mask,) = rle_mask.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], HEIGHT, WIDTH)
        return {"size": [int(v) for v in mask["size"]], "counts": mask["counts"]}

    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        here = [(box(), int(rng.integers(1, CLASSES + 1))) for _ in range(rng.poisson(OBJECTS))]
        for one, category in here:
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": one}
            annotations.append({**annotation, "area": one[2] * one[3], "iscrowd": int(rng.random() < 0.02)})
        for k in range(DETECTIONS):
            if here and k < 3 * len(here):
                one, category = here[k % len(here)]
                far = rng.normal(0, rng.choice([0.03, 0.2]), 4) * [one[2], one[3], one[2], one[3]]
                x, y, w, h = (float(v) for v in np.array(one) + far)
                one = [max(0.0, x), max(0.0, y), max(1.0, w), max(1.0, h)]
            else:
                one, category = box(), int(rng.integers(1, CLASSES + 1))
            score = round(float(rng.random()), 3)
            detections.append({"image_id": image, "category_id": category, "bbox": one, "score": score})
    if masks:
        for entry in (*annotations, *detections):
            entry["segmentation"] = region(entry["bbox"])
    records = [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(1, images + 1)]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)]
    return {"images": records, "annotations": annotations, "categories": categories}, detections


def reference(coco: Any, evaluator: Any, truth: dict[str, Any], detections: list[dict[str, Any]], kind: str) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        if coco is HotCOCO:
            api = coco(truth)
        else:
            api = coco()
            api.dataset = truth
            api.createIndex()
        evaluation = evaluator(api, api.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def by_tidecv(truth: dict[str, Any], detections: list[dict[str, Any]], kind: str) -> Any:
    from tidecv import TIDE, Data

    objects, found = Data("truth"), Data("found")
    for a in truth["annotations"]:
        add = objects.add_ignore_region if a["iscrowd"] else objects.add_ground_truth
        add(a["image_id"], a["category_id"], a["bbox"], a.get("segmentation"))
    for d in detections:
        found.add_detection(d["image_id"], d["category_id"], d["score"], d["bbox"], d.get("segmentation"))
    run = TIDE(mode=TIDE.BOX if kind == "bbox" else TIDE.MASK).evaluate(objects, found)
    return run.fix_main_errors(), run.fix_special_errors()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--masks", action="store_true")
    options = parser.parse_args()
    truth, detections = made_up(options.images, options.masks)
    kind = "segm" if options.masks else "bbox"
    copied = lambda: copy.deepcopy((truth, detections))  # the others write into what they are given
    times: dict[str, list[float]] = {}
    stats: dict[str, Any] = {}
    others = {
        "pycocotools": (COCO, COCOeval),
        "faster-coco-eval": (FasterCOCO, COCOeval_faster),
        "hotcoco": (HotCOCO, HotCOCOeval),
    }
    for k in range(options.pairs):
        for name, tools in others.items():
            if k and name != "hotcoco":
                continue
            given = copied()
            if options.masks:
                for detection in given[1]:
                    del detection["bbox"]
            spent, stats[name] = seconds(lambda tools=tools, given=given: reference(*tools, *given, kind))
            times.setdefault(name, []).append(spent)
        spent, stats["ours"] = seconds(lambda: coco_eval.score(truth, detections, (kind,)))
        times.setdefault("ours", []).append(spent)
    times["error types"] = [seconds(lambda: tide.analyse(truth, detections, kind))[0]]
    if importlib.util.find_spec("tidecv"):
        given = copied()
        times["error types by tidecv"] = [seconds(lambda: by_tidecv(*given, kind))[0]]

    table = Table(title=f"{options.images} images, {len(detections):,} detections, {kind}", title_justify="left")
    table.add_column("")
    for column in ("CPU seconds", "over ours"):
        table.add_column(column, justify="right")
    for name, spent in times.items():
        own = times["error types" if name.startswith("error types") else "ours"]
        ratio = statistics.median(a / b for a, b in zip(spent, own, strict=False))
        table.add_row(name, f"{statistics.median(spent):.2f}", f"{ratio:.2f}")
    console = Console()
    console.print(table)
    mine = stats["ours"].metrics[kind]
    apart = max(abs((mine[n] or 0) - s) for n, s in zip(coco_eval.METRICS, stats["pycocotools"], strict=False))
    console.print(f"Largest difference between the metrics: {apart:.1e}")


if __name__ == "__main__":
    main()
