"""Batch norm's statistics, taken again over plain images."""

from __future__ import annotations

import torch

import headstart
from headstart import detectors
from headstart.detectors.norm_statistics import recompute_statistics
from headstart.detectors.rcnn import RCNNSettings

PARTS = ["backbone", "neck", "head"]


def batches(count: int = 3):
    g = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[[4.0, 4, 40, 40], [10.0, 0, 60, 50]]]).repeat(2, 1, 1)
    sizes = torch.tensor([[64, 64], [64, 64]])
    return [(torch.randint(0, 256, (2, 3, 64, 64), generator=g, dtype=torch.uint8), boxes, sizes) for _ in range(count)]


def test_they_are_the_mean_over_batches(tiny):
    detector = detectors.build(RCNNSettings(**tiny)).train()
    own = detector.module.backbone.body.bn1
    momentum = own.momentum
    seen = []
    hook = own.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    before = {k: v.clone() for k, v in detector.module.state_dict().items()}
    assert recompute_statistics(detector, PARTS, batches()) > 20
    hook.remove()
    values = [x.transpose(0, 1).flatten(1) for x in seen]
    assert len(values) == 3
    torch.testing.assert_close(own.running_mean, torch.stack([v.mean(1) for v in values]).mean(0))
    torch.testing.assert_close(own.running_var, torch.stack([v.var(1) for v in values]).mean(0))
    assert own.momentum == momentum
    for key, value in detector.module.state_dict().items():
        if "running_" not in key and "num_batches" not in key:
            assert torch.equal(value, before[key]), key
    head = "roi_heads.box_head.0.1.running_mean"
    assert not torch.equal(detector.module.state_dict()[head], before[head])


def test_modes_and_other_parts_stay(tiny):
    detector = detectors.build(RCNNSettings(**tiny))
    detector.train()
    detector.module.backbone.body.layer1.eval()
    modes = [m.training for m in detector.modules()]
    head = detector.module.roi_heads.box_head[0][1].running_mean.clone()
    recompute_statistics(detector, ["backbone"], batches())
    assert [m.training for m in detector.modules()] == modes
    assert torch.equal(detector.module.roi_heads.box_head[0][1].running_mean, head)


def test_without_images_nothing_changes(tiny):
    detector = detectors.build(RCNNSettings(**tiny))
    detector.module.backbone.body.bn1.running_mean.fill_(3)
    before = {k: v.clone() for k, v in detector.module.state_dict().items()}
    recompute_statistics(detector, PARTS, [])
    assert all(torch.equal(v, before[k]) for k, v in detector.module.state_dict().items())


def test_a_soco_run_leaves_statistics_of_plain_images(tiny, scenes, tmp_path):
    counted = {}
    for images in (0, 12):
        run = headstart.pretrain(
            "faster_rcnn",
            scenes / "unlabelled",
            "soco",
            out=tmp_path / str(images),
            proposals=tmp_path / "boxes.parquet",
            max_steps=2,
            batch_size=4,
            device="cpu",
            settings={
                **{f"detector.{k}": v for k, v in tiny.items()},
                **{"method.view_px": 64, "method.hidden": 16, "method.dim": 8, "method.precise_bn": images},
                **{"train.workers": 0, "train.amp": "off", "proposals.engine": "random"},
            },
            show=False,
        )
        norm = run.detector.module.backbone.body.bn1
        counted[images] = int(norm.num_batches_tracked)
        assert norm.training
    assert counted == {0: 6, 12: 1}  # three views in each of two steps; one batch of twelve plain images
