"""How boxes without classes cover labelled objects: JoinDet's priors after each refresh, beside Selective Search's.

    python benchmarks/priors_recall.py LABELS --run RUN [--photos FOLDER] [--images 500] [--engines NAME ...]
    python benchmarks/priors_recall.py LABELS --weights FILE --backbone resnet18

RUN is a run of ``headstart pretrain joindet`` whose photos are, some of them, those of LABELS (COCO JSON or VOC): they
are told by their file names. Each line: class-agnostic AP, AP50 and AR@100 (COCO's, IoU .5 to .95), on the same images,
and boxes an image. Selective Search, attention proposals, random boxes, and whatever else ``--engines`` names are made
anew, without a filter; their first box counts as the surest. ``attention`` cuts the features of ``--weights``, or of
the backbone that RUN ended with, which JoinDet leaves as it came. Without ``--run``: these engines alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from headstart import coco_eval
from headstart.datasets.detection import DetectionData, load_detection_data
from headstart.datasets.images import decode
from headstart.proposals import ProposalSettings
from headstart.proposals.finder import Finder

MOST = 100  # boxes an image that count
NO_FILTER = {"aspect_max": None, "size_min": 0.0, "size_max": 1.0}
Found = tuple[np.ndarray, np.ndarray]  # boxes (k, 4) xyxy px, scores (k,)


def some_of(data: DetectionData, known: set[str] | None, most: int) -> DetectionData:
    """At most ``most`` of the images whose names are ``known``, evenly out of all."""
    seen = [i for i, image in enumerate(data.images) if known is None or Path(image.file_name).name in known]
    chosen = sorted({seen[i] for i in np.linspace(0, len(seen) - 1, most).astype(int)}) if seen else []
    return data.subset([data.images[i].id for i in chosen])


def row(data: DetectionData, found: list[Found]) -> str:
    """AP, AP50, AR@100 and boxes an image, as cells of a table."""
    results = []
    for index, (boxes, scores) in enumerate(found):
        for (x0, y0, x1, y1), score in zip(boxes.tolist(), scores.tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            results.append({"image_id": data.coco_image_id(index), "bbox": box, "score": score})
    metrics = coco_eval.score_proposals(data.to_coco(), results).metrics["bbox"]
    values = [metrics[name] or 0.0 for name in ("AP", "AP50", "AR100")]
    per_image = len(results) / max(1, len(found))
    return " | ".join([*(f"{100 * value:.1f}" for value in values), f"{per_image:.1f}"])


def of_file(file: Path) -> dict[str, Found]:
    """File name -> its boxes."""
    table = pq.read_table(file, columns=["image", "boxes", "scores"]).to_pylist()
    return {
        Path(line["image"]).name: (
            np.array(line["boxes"] or [], np.float32).reshape(-1, 4),
            np.array(line["scores"] or [], np.float32),
        )
        for line in table
    }


def of_engine(settings: ProposalSettings, data: DetectionData) -> Iterator[Found]:
    find = Finder(settings)
    for image in data.images:
        pixels = decode(image.path, find.decode_px(image.width, image.height))
        boxes = find(pixels, image.width, image.height, image.file_name).boxes[:MOST]
        yield boxes, 1 - np.arange(len(boxes)) / MOST


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, help="COCO JSON or VOC")
    parser.add_argument("--run", type=Path, help="run folder with priors/")
    parser.add_argument("--weights", help="of attention: run folder, weights file, imagenet or random")
    parser.add_argument("--backbone", help="of attention: that of the run, if not set")
    parser.add_argument("--photos", type=Path, help="folder of the labelled images")
    parser.add_argument("--images", type=int, default=500, help="labelled images, at most")
    parser.add_argument("--engines", nargs="*", default=["selective_search", "attention", "random_patches"])
    options = parser.parse_args()
    files = sorted((options.run / "priors").glob("*.parquet")) if options.run else []
    if options.run and not files:
        print(f"{options.run}: no priors/*.parquet; expected a run whose method makes its own boxes")
        return 2
    known = set(of_file(files[0])) if files else None
    data = some_of(load_detection_data(options.labels, options.photos), known, options.images)
    if not data.images:
        print(f"{options.labels}: none of its images was among the photos of {options.run}")
        return 2
    objects = sum(len(annotations) for annotations in data.annotations)
    print(f"{len(data.images)} images, {objects} objects of {options.labels}\n")
    print(f"| boxes | AP | AP50 | AR@{MOST} | an image |\n|---|---|---|---|---|")
    for number, file in enumerate(files):
        found = of_file(file)
        cells = row(data, [found[Path(image.file_name).name] for image in data.images])
        print(f"| R_{number}, from step {int(file.stem)} | {cells} |", flush=True)
    weights = options.weights or options.run
    for name in options.engines:
        own = {"features_weights": str(weights), "features_backbone": options.backbone} if name == "attention" else {}
        if own and weights is None:
            continue
        settings = ProposalSettings.model_validate({"engine": name, "random_boxes": MOST, **NO_FILTER, **own})
        print(f"| {name} | {row(data, list(of_engine(settings, data)))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
