"""Forward and backward of our DETR and Deformable DETR over those of the transformers library.

    OMP_NUM_THREADS=1 python benchmarks/detr.py [--size small r50] [--pairs 8] [--device cuda] [--bf16]

Both are built with the same sizes and random weights and see the same images, of two sizes in a batch, padded. Timed is
one step in training mode: class logits and boxes of the last decoder layer, the sum of their squares, gradients of
everything but the backbone's first stage and its batch norm, which are frozen there. The two take turns, and which of
them goes first changes with each pair; the ratio is the median of the pairs'. On the CPU, CPU seconds of all threads
count, since other programs may want the cores too.

Ours computes the boxes and classes of all decoder layers, theirs those of Deformable DETR; for its DETR that is an
option that feeds a layer the normalised output of the one before, so it is left off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DetrConfig, DetrForObjectDetection

from headstart import detectors
from headstart.detectors.detector import Detector

SIZES = {  # backbone, width, layers of encoder and decoder, feed-forward, queries, images, their height and width
    "small": ("resnet18", 64, 2, 3, 256, 50, 4, (192, 256)),
    "r50": ("resnet50", 256, 6, 6, 1024, 300, 2, (448, 512)),
    "full": ("resnet50", 256, 6, 6, 1024, 300, 4, (800, 1088)),
}
KINDS = {
    "detr": ("detr", {}),
    "deformable": ("deformable_detr", {"levels": 4}),
    "deformable, one map": ("deformable_detr", {"levels": 1}),
    "deformable, refine": ("deformable_detr", {"levels": 4, "refine": True}),
    "deformable, two-stage": ("deformable_detr", {"levels": 4, "refine": True, "two_stage": True}),
}


def ours(family: str, options: dict, size: tuple) -> Detector:
    backbone, width, encoder, decoder, feedforward, queries, *_ = size
    shape = {"width": width, "encoder_layers": encoder, "decoder_layers": decoder, "feedforward": feedforward}
    values = {"name": family, "backbone": backbone, "num_queries": queries, "num_classes": 80, **shape, **options}
    detector = detectors.build(detectors.parse_settings(values))
    for layers in detector.stages()[:2]:
        for layer in layers:
            layer.requires_grad_(False)
    detector.train()
    for module in detector.module.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return detector


def theirs(family: str, options: dict, size: tuple) -> nn.Module:
    backbone, width, encoder, decoder, feedforward, queries, *_ = size
    levels = options.get("levels", 1)
    maps = {"out_indices": [4] if levels == 1 else [2, 3, 4], "features_only": True, "use_pretrained_backbone": False}
    values = {
        "backbone_config": {"model_type": "timm_backbone", "backbone": backbone, "num_channels": 3, **maps},
        "d_model": width,
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "encoder_ffn_dim": feedforward,
        "decoder_ffn_dim": feedforward,
        "num_queries": queries,
        "num_labels": 80,
        "attention_dropout": 0.1,
    }
    if family == "detr":
        return DetrForObjectDetection(DetrConfig(**values)).train()
    stages = {"with_box_refine": options.get("refine", False), "two_stage": options.get("two_stage", False)}
    config = DeformableDetrConfig(**values, **stages, two_stage_num_proposals=queries, num_feature_levels=levels)
    return DeformableDetrForObjectDetection(config).train()


def seconds(step: Callable[[], Tensor], parameters: list[nn.Parameter], device: str, bf16: bool) -> float:
    for parameter in parameters:
        parameter.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss = step()
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def compare(kind: str, size: str, pairs: int, device: str, bf16: bool) -> tuple[float, float, float]:
    """Median seconds of ours and of theirs, and the median ratio of a pair."""
    family, options = KINDS[kind]
    *_, batch, (height, width) = SIZES[size]
    own, other = ours(family, options, SIZES[size]).to(device), theirs(family, options, SIZES[size]).to(device)
    images = torch.randn(batch, 3, height, width, device=device)
    sizes = torch.tensor([[height, width] if i % 2 else [height * 3 // 4, width * 7 // 8] for i in range(batch)])
    mask = torch.zeros(batch, height, width, dtype=torch.int64)
    for of_image, (h, w) in zip(mask, sizes.tolist(), strict=True):
        of_image[:h, :w] = 1
    sizes, mask = sizes.to(device), mask.to(device)

    def our_step() -> Tensor:
        answers = own.module.answer(images, sizes)
        return own.module.logits(answers.hidden)[-1].float().square().sum() + answers.boxes[-1].square().sum()

    def their_step() -> Tensor:
        found = other(pixel_values=images, pixel_mask=mask)
        return found.logits.float().square().sum() + found.pred_boxes.float().square().sum()

    both = [(our_step, list(own.parameters())), (their_step, list(other.parameters()))]
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs + 2):  # two to warm up
        for i in (0, 1) if pair % 2 else (1, 0):
            taken = seconds(*both[i], device, bf16)
            if pair >= 2:
                times[i].append(taken)
    a, b = times
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table("detector", "size", "ours, ms", "transformers, ms", "ratio", title=f"Forward and backward, {where}")
    for size in args.size:
        for kind in args.kinds:
            a, b, ratio = compare(kind, size, args.pairs, args.device, args.bf16)
            table.add_row(kind, size, f"{1000 * a:.0f}", f"{1000 * b:.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
