"""Two processes with half the batch each are one process with all of it: loss, batch norm, weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
import headstart

if __name__ == "__main__":
    scenes, out, proposals = sys.argv[1:]
    settings = dict(%(settings)r)
    headstart.pretrain("faster_rcnn", scenes, out=out, proposals=proposals, backbone="resnet18", max_steps=3,
                       batch_size=4, settings=settings, show=False)
"""


def launch(arguments: list[str], processes: int) -> None:
    command = [sys.executable, *arguments]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
        command = [sys.executable, *torchrun, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def torchrun(tmp_path: Path, code: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    launch([str(script)], 2)


def run(tmp_path: Path, scenes: Path, name: str, settings: dict, processes: int) -> tuple[list[dict], dict]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT % {"settings": settings})
    arguments = [str(script), str(scenes / "unlabelled"), str(tmp_path / name), str(tmp_path / "p.parquet")]
    launch(arguments, processes)
    log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    return log, load_file(tmp_path / name / "detector.safetensors")


def test_two_processes_equal_one(tmp_path, scenes, tiny):
    settings = {f"detector.{k}": v for k, v in tiny.items() if k != "backbone"} | {
        "method.view_px": 64,
        "method.hidden": 32,
        "method.dim": 16,
        "optim.optimizer": "sgd",
        "optim.lr": 1e-6,  # a tiny batch norm network amplifies rounding: larger steps compare chaos
        "train.amp": "off",
        "train.log_every": 1,
        "train.workers": 0,
        "proposals.scale": 100,
        "proposals.size_min": 0.1,
    }
    alone, weights = run(tmp_path, scenes, "one", settings, 1)
    together, weights2 = run(tmp_path, scenes, "two", settings, 2)
    assert [line["step"] for line in alone] == [line["step"] for line in together] == [1, 2, 3]
    for a, b in zip(alone, together, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=5e-3)
    assert alone[0]["loss"] == pytest.approx(together[0]["loss"], abs=5e-5)
    assert alone[2]["loss"] < alone[0]["loss"]
    for name, value in weights.items():
        torch.testing.assert_close(weights2[name].float(), value.float(), atol=2e-3, rtol=1e-2)


def test_gradients_of_two_processes_equal_one_in_double(tmp_path):
    """Every gradient of SoCo, through the student's synchronised batch norms, to ten digits."""
    torchrun(
        tmp_path,
        """
import numpy as np, torch, torch.distributed as dist
from dataclasses import replace
from torch.nn.parallel import DistributedDataParallel
from headstart import detectors
from headstart.detectors.rcnn import RCNNSettings
from headstart.distributed import synchronised_batch_norm
from headstart.methods.method import collate_views
from headstart.methods.soco import SoCo, SoCoSettings
from headstart.verbs.pretrain import Pretraining

class Batch:
    def __init__(self, views):
        self.views = views

def build():
    torch.manual_seed(0)
    detector = detectors.build(RCNNSettings(backbone="resnet18", fpn_channels=8, head_width=16))
    method = SoCo(SoCoSettings(view_px=64, hidden=32, dim=16, tau=0.9))
    method.settle(detector, 10)
    return Pretraining(method, detector).double().train()

dist.init_process_group("gloo")
rank = dist.get_rank()
shared, alone = build(), build()
boxes = np.array([[4, 4, 40, 36], [20, 10, 60, 55], [0, 0, 64, 60], [30, 30, 60, 58]], np.float32)
photos = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(4)]
views = collate_views([alone.method.views(p, boxes, np.random.default_rng(i)) for i, p in enumerate(photos)])
views = [replace(v, images=v.images.double() / 255, boxes=v.boxes.double()) for v in views]
alone(Batch(views))["align"].backward()
mine = slice(2 * rank, 2 * rank + 2)
with synchronised_batch_norm(shared, torch.device("cpu")):
    wrapped = DistributedDataParallel(shared)
    half = Batch([replace(v, **{k: t[mine] for k, t in vars(v).items()}) for v in views])
    wrapped(half)["align"].backward()
expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
largest = max(float(grad.norm()) for grad in expected.values())
compared = 0
for name, parameter in shared.named_parameters():
    # Biases before a batch norm have no gradient but rounding.
    if name in expected and float(expected[name].norm()) > 1e-6 * largest:
        error = float((parameter.grad - expected[name]).norm() / expected[name].norm())
        assert error < 1e-9, (name, error)
        compared += 1
assert compared > 80, compared
dist.destroy_process_group()
""",
    )


def test_synchronised_batch_norm_equals_the_whole_batch(tmp_path):
    """Outputs, running statistics and gradients, for 1-D, 2-D inputs and ranks with different counts.

    timm's batch norms carry an activation, which has to stay.
    """
    torchrun(
        tmp_path,
        """
import torch, torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from headstart.distributed import synchronised_batch_norm
from headstart.errors import TrainingError
dist.init_process_group("gloo")
rank = dist.get_rank()
for shape, kind in (((6, 3), nn.BatchNorm1d), ((6, 3, 4, 4), nn.BatchNorm2d), ((6, 3, 4, 4), BatchNormAct2d)):
    torch.manual_seed(0)
    x = torch.randn(shape) * 3 + 100
    w = torch.randn(shape)
    whole, ours = kind(3), kind(3)
    xs = x.clone().requires_grad_()
    (whole(xs) * w).sum().backward()
    mine = slice(0, 2) if rank == 0 else slice(2, 6)
    part = x[mine].clone().requires_grad_()
    with synchronised_batch_norm(ours, torch.device("cpu")):
        out = ours(part)
        (out * w[mine]).sum().backward()
    assert type(ours) is kind
    torch.testing.assert_close(out, whole(x)[mine], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.grad, xs.grad[mine], atol=1e-4, rtol=1e-3)
    for p, q in zip(ours.parameters(), whole.parameters()):
        grad = p.grad.clone()
        dist.all_reduce(grad)
        torch.testing.assert_close(grad, q.grad, atol=1e-3, rtol=1e-3)
    fresh = kind(3)
    fresh(x)
    torch.testing.assert_close(ours.running_mean, fresh.running_mean)
    torch.testing.assert_close(ours.running_var, fresh.running_var, atol=1e-4, rtol=1e-4)
    assert int(ours.num_batches_tracked) == 1
    assert (out >= 0).all() == (kind is BatchNormAct2d)

class Odd(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2

try:
    with synchronised_batch_norm(Odd(3), torch.device("cpu")):
        raise AssertionError("taken for a plain one")
except TrainingError as error:
    assert "Odd" in str(error)
dist.destroy_process_group()
""",
    )


def test_rows_of_all_processes_and_their_gradients(tmp_path):
    """Different numbers of rows, none included; what each process does with all rows comes back to their owners."""
    torchrun(
        tmp_path,
        """
import torch, torch.distributed as dist
from headstart.distributed import gather_rows
dist.init_process_group("gloo")
rank = dist.get_rank()
for counts in ((2, 3), (0, 4), (1, 0), (0, 0)):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 3)
    mine = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
    part = x[mine].clone().requires_grad_()
    rows = gather_rows(part)
    assert torch.equal(rows, x)
    weight = torch.arange(1.0, 1 + x.numel()).view_as(x)
    (rows * weight * (rank + 1)).sum().backward()  # 1 from the first process, 2 from the second
    torch.testing.assert_close(part.grad, 3 * weight[mine])
numbers = gather_rows(torch.full((rank + 1,), rank))
assert numbers.tolist() == [0, 1, 1]
dist.destroy_process_group()
""",
    )


def test_contrast_of_two_processes_equals_one(tmp_path):
    """AlignDet's InfoNCE: mean over processes of loss and gradient are those of one process with all predictions."""
    torchrun(
        tmp_path,
        """
import torch, torch.distributed as dist, torch.nn.functional as F
from headstart.methods.aligndet import info_nce
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
z1, z2 = (F.normalize(torch.randn(n, 5, dtype=torch.float64), dim=1) for n in (9, 8))
image1, image2 = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
box1, box2 = torch.tensor([0, 0, 1, 0, 2, 0, 1, 0, 0]), torch.tensor([0, 1, 0, 0, 2, 1, 0, 5])
p1, p2 = image1 * 2**32 + box1, image2 * 2**32 + box2
everything = z1.clone().requires_grad_()
whole = expected = None
# One process: outside of the group, as far as the loss can tell.
import headstart.distributed as d
gather_rows, d.gather_rows = d.gather_rows, lambda rows: rows
mean, d.mean = d.mean, lambda values: values
r, w, d.rank, d.world = d.rank, d.world, lambda: 0, lambda: 1
whole = info_nce(everything, z2, p1, p2, 0.5)
whole.backward()
d.gather_rows, d.mean, d.rank, d.world = gather_rows, mean, r, w
mine1, mine2 = (image1 // 2 == rank), (image2 // 2 == rank)
# Each process counts its own images from 0.
q1, q2 = (image1 % 2 * 2**32 + box1)[mine1], (image2 % 2 * 2**32 + box2)[mine2]
part = z1[mine1].clone().requires_grad_()
loss = info_nce(part, z2[mine2], q1, q2, 0.5)
(loss / 2).backward()  # DistributedDataParallel's mean
total = loss.detach().clone()
dist.all_reduce(total)
torch.testing.assert_close(total / 2, whole.detach())
torch.testing.assert_close(part.grad, everything.grad[mine1])
dist.destroy_process_group()
""",
    )


@pytest.mark.parametrize("method", ["adept", "aligndet"])
def test_other_methods_run_in_two_processes(tmp_path, scenes, tiny, method):
    """Every parameter that learns gets a gradient on both, or DistributedDataParallel would stop."""
    own = {"view_px": 64} if method == "adept" else {"K": 4}
    settings = {f"detector.{k}": v for k, v in tiny.items() if k != "backbone"}
    settings |= {f"method.{k}": v for k, v in {"hidden": 16, "dim": 8, **own}.items()}
    settings |= {"train.amp": "off", "train.log_every": 1, "train.workers": 0, "proposals.engine": "random"}
    script = tmp_path / "train.py"
    script.write_text(
        SCRIPT.replace("scenes, out=out", f'scenes, "{method}", start="scratch", out=out') % {"settings": settings}
    )
    launch([str(script), str(scenes / "unlabelled"), str(tmp_path / "two"), str(tmp_path / "p.parquet")], 2)
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]


def test_validation_in_two_processes_keeps_the_best_and_stops_both(tmp_path, scenes):
    """The first evaluates while the second waits; both stop, and both end with the best weights."""
    script = tmp_path / "tune.py"
    script.write_text(
        f"""
import sys, torch
torch.set_num_threads(1)
import headstart
from headstart.verbs import finetune as module

if __name__ == "__main__":
    real, aps = module.run_detector, [0.1, 0.3, 0.2, 0.2, 0.1]
    def scripted(detector, *rest):
        evaluation = real(detector, *rest)
        type(evaluation).metrics = {{"bbox": {{"AP": aps.pop(0)}}}}
        return evaluation
    module.run_detector = scripted
    done = headstart.finetune(
        "scratch", {str(scenes / "train.json")!r}, {str(scenes / "val.json")!r}, out={str(tmp_path / "run")!r},
        detector="fcos", backbone="resnet18", batch_size=4, max_steps=9, device="cpu", show=False,
        settings={{"detector.fpn_channels": 8, "detector.short_side_px": 64, "detector.long_side_px": 96,
                   "train.workers": 0, "train.amp": "off", "tune.validate_epochs": 0.5, "tune.patience": 2}})
    assert (done.summary.steps, done.summary.finished, done.best_step) == (4, True, 2), done.summary
    total = sum(float(p.double().sum()) for p in done.detector.parameters())
    with open({str(tmp_path)!r} + "/sum" + __import__("os").environ["RANK"], "w") as file:
        file.write(repr(total))
"""
    )
    launch([str(script)], 2)
    assert (tmp_path / "sum0").read_text() == (tmp_path / "sum1").read_text()


def test_aligndet_with_queries_in_two_processes(tmp_path, scenes):
    """Pseudo classes are made by the first; every parameter that learns gets a gradient on both."""
    small = {"num_queries": 8, "width": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 24}
    settings = {f"detector.{k}": v for k, v in {**small, "short_side_px": 64, "long_side_px": 96}.items()}
    settings |= {"method.hidden": 16, "method.dim": 8, "method.K": 4, "method.clusters": 4, "method.crop_px": 32}
    settings |= {"train.amp": "off", "train.log_every": 1, "train.workers": 0, "proposals.engine": "random"}
    code = SCRIPT.replace("scenes, out=out", 'scenes, "aligndet", start="scratch", out=out') % {"settings": settings}
    script = tmp_path / "train.py"
    script.write_text(code.replace('"faster_rcnn"', '"deformable_detr"').replace('"resnet18"', '"test_resnet"'))
    launch([str(script), str(scenes / "unlabelled"), str(tmp_path / "two"), str(tmp_path / "p.parquet")], 2)
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    assert {"contrast", "class", "l1", "giou"} <= set(log[0]["terms"])
    assert (tmp_path / "two" / "pseudo_classes" / "labels.npy").is_file()
