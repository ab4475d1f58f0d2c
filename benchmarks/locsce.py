"""LocSCE in blocks of rows over LocSCE with whole matrices: seconds, and memory beyond the inputs.

    python benchmarks/locsce.py [--device cuda] [--rounds 3] [--images 8 64]

Forward and backward, 300 objects an image, D = 256, the paper's temperatures, IoU threshold and weights. Whole
matrices means autograd on the equations as one would write them, with no matrix made twice: similarities of each
teacher object to all teacher and all student objects, softmax, cross-entropy. Both sides get the same float32 inputs.

On CPU each side has processes of its own. Memory is the peak of the resident set (Linux) over what it was with the
inputs, after a first small call; seconds are CPU seconds of all threads, the least of the rounds; the sides take turns.
On CUDA memory is what torch's allocator had at most beyond the inputs, and seconds are by the device's clock.

"error" is the distance of the gradient to a dense one in float64, over that one's length; it is worked out with up to
16 images, where float64 is affordable.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from headstart import boxes as geometry
from headstart.losses import loc_sce

OBJECTS, WIDTH = 300, 256
PAPER = {"tau": 0.1, "tau_t": 0.07, "lambda_sce": 0.5, "delta": 0.5}
MEMORY_TARGET, TIME_TARGET, ERROR_TARGET, TARGET_IMAGES = 0.05, 1.0, 1e-5, 64
EXACT_IMAGES = 16
Inputs = dict[str, Tensor]


def inputs(images: int, device: str) -> Inputs:
    g = torch.Generator().manual_seed(0)
    students, teachers = (F.normalize(torch.randn(images, OBJECTS, WIDTH, generator=g), dim=-1) for _ in range(2))
    corner, side = (torch.rand(images, OBJECTS, 2, generator=g) for _ in range(2))
    drawn = {
        "students": students,
        "teachers": teachers,
        "matching": torch.stack([torch.randperm(OBJECTS, generator=g) for _ in range(images)]),
        "boxes": torch.cat([corner, corner + side], dim=-1),
    }
    return {name: value.to(device) for name, value in drawn.items()}


def whole(
    students: Tensor,
    teachers: Tensor,
    matching: Tensor,
    boxes: Tensor,
    *,
    tau: float,
    tau_t: float,
    lambda_sce: float,
    delta: float,
) -> Tensor:
    images, objects, width = teachers.shape
    z = teachers.flatten(0, 1)
    z_hat = students.gather(1, matching[..., None].expand(-1, -1, width)).flatten(0, 1)
    wanted = (z / tau_t @ z.T).fill_diagonal_(-torch.inf).softmax(dim=1).mul_(1 - lambda_sce)
    positive = (geometry.iou(boxes, boxes) >= delta) | torch.eye(objects, dtype=torch.bool, device=z.device)
    each = torch.arange(images, device=z.device)
    wanted.view(images, objects, images, objects)[each, :, each] += lambda_sce * positive
    return F.cross_entropy(z / tau @ z_hat.T, wanted)


SIDES: dict[str, Callable[..., Tensor]] = {"blocks": loc_sce, "whole": whole}


def step(side: str, given: Inputs) -> Tensor:
    """The students' gradient."""
    students = given["students"].detach().requires_grad_()
    SIDES[side](**given | {"students": students}, **PAPER).backward()
    assert students.grad is not None
    return students.grad


def measure_cpu(side: str, images: int) -> dict[str, float]:
    """In this process, which is thrown away afterwards."""
    step(side, inputs(1, "cpu"))
    given = inputs(images, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    start = time.process_time()
    step(side, given)
    return {"seconds": time.process_time() - start, "bytes": resident("VmHWM") - before}


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_cuda(side: str, images: int, device: str) -> dict[str, float]:
    step(side, inputs(1, device))
    given = inputs(images, device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(side, given)
    end.record()
    torch.cuda.synchronize()
    return {"seconds": start.elapsed_time(end) / 1000, "bytes": torch.cuda.max_memory_allocated() - before}


def in_a_process(side: str, images: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), "--measure", side, str(images)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def error(images: int, device: str) -> float:
    given = inputs(images, device)
    exact = {name: v.double() if v.is_floating_point() else v for name, v in given.items()}
    expected = step("whole", exact)
    return float((step("blocks", given).double() - expected).norm() / expected.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts (default: 3)")
    parser.add_argument("--images", type=int, nargs="+", default=[4, 16, 64], help="of 300 objects (default: 4 16 64)")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, images = options.measure
        print(json.dumps(measure_cpu(side, int(images))))
        return 0
    table = Table("objects", "s blocks", "s whole", "time ratio", "MiB blocks", "MiB whole", "memory ratio", "error")
    met = True
    for images in options.images:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side, of_side in found.items():
                cpu = options.device == "cpu"
                of_side.append(in_a_process(side, images) if cpu else measure_cuda(side, images, options.device))
        seconds = {side: min(m["seconds"] for m in of_side) for side, of_side in found.items()}
        memory = {side: max(m["bytes"] for m in of_side) for side, of_side in found.items()}
        off = error(images, options.device) if images <= EXACT_IMAGES else None
        time_ratio, memory_ratio = (of["blocks"] / of["whole"] for of in (seconds, memory))
        table.add_row(
            f"{images} x {OBJECTS}",
            *(f"{seconds[side]:.3f}" for side in SIDES),
            f"{time_ratio:.2f}",
            *(f"{memory[side] / 2**20:.0f}" for side in SIDES),
            f"{memory_ratio:.3f}",
            "" if off is None else f"{off:.1e}",
        )
        met &= off is None or off <= ERROR_TARGET
        if images >= TARGET_IMAGES:
            met &= time_ratio <= TIME_TARGET and memory_ratio <= MEMORY_TARGET
    Console(width=110).print(table)
    print(f"wanted from {TARGET_IMAGES} images on: time at most {TIME_TARGET}, memory at most {MEMORY_TARGET}")
    print(f"wanted of every gradient: an error of at most {ERROR_TARGET:g}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
