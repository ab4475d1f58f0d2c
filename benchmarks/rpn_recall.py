"""What an RPN finds before any fine-tuning: labelled objects that one of its best boxes covers.

    HEADSTART_DATA=DATA python benchmarks/rpn_recall.py runs/few_labels/soco runs/few_labels/adept ...

For random weights and for each run: the share of the objects on the first ``--images`` of ``DATA/bccd/val.json``
(https://github.com/Shenggan/BCCD_Dataset) that one of the 100 best boxes covers at IoU 0.5, and at 0.7.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torchvision.ops import box_iou

from headstart import detectors
from headstart.datasets.detection import load_detection_data
from headstart.datasets.torch_dataset import DetectionDataset
from headstart.detectors.detector import Detector, as_float
from headstart.verbs.start import SCRATCH, detector_of, load_start

BOXES = 100
IOUS = (0.5, 0.7)


@torch.inference_mode()
def recall(detector: Detector, dataset: DetectionDataset, images: int) -> list[float]:
    module = detector.eval().module
    best = []
    for image, target in (dataset[i] for i in range(min(images, len(dataset)))):
        listed, (scaled,) = module.transform([as_float(image)], [{"boxes": target["boxes"]}])
        (boxes,), _ = module.rpn(listed, module.backbone(listed.tensors))
        best.append(box_iou(scaled["boxes"], boxes[:BOXES]).max(dim=1).values)
    covered = torch.cat(best)
    return [float((covered >= iou).float().mean()) for iou in IOUS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="pretrained R-CNN runs, all of one detector")
    parser.add_argument("--images", type=int, default=40)
    options = parser.parse_args()
    if "HEADSTART_DATA" not in os.environ:
        print("HEADSTART_DATA is not set: the folder that holds bccd/")
        return 2
    dataset = DetectionDataset(load_detection_data(Path(os.environ["HEADSTART_DATA"]) / "bccd" / "val.json"))
    print("| RPN of | covered at 0.5 | at 0.7 |\n|---|---|---|")
    for start in (SCRATCH, *options.runs):
        torch.manual_seed(0)
        detector = detectors.build(detectors.parse_settings(detector_of(options.runs[0])))
        if start != SCRATCH:
            load_start(detector, start)
        shares = " | ".join(f"{share:.2f}" for share in recall(detector, dataset, options.images))
        print(f"| {Path(start).name} | {shares} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
