"""What fine-tuning freezes, and what it does to images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import headstart
from headstart import detectors
from headstart.detectors.rcnn import RCNNSettings
from headstart.errors import RunError, SettingsError
from headstart.optim import OptimSettings
from headstart.verbs.finetune import Supervised, TuneSettings, config_type, jitter_scale, settle


def supervised(tiny, **tune) -> Supervised:
    return Supervised(detectors.build(RCNNSettings(**tiny)), TuneSettings(**tune)).train()


def learning(model) -> set[str]:
    return {name for name, p in model.detector.module.named_parameters() if p.requires_grad}


class Advises(detectors.family("fcos")):
    """A detector that is tuned with AdamW, as transformers are."""

    def tuning(self) -> OptimSettings:
        return OptimSettings(
            optimizer="adamw", base_lr=2e-4, base_batch=32, weight_decay=1e-3, clip=0.1, lr_scale={"backbone": 0.1}
        )


def test_the_detector_advises_how_it_is_tuned():
    def chosen(kind, **optim):
        config = config_type("fcos")(optim={"schedule": "steps", **optim}, train={"batch_size": 16, "max_steps": 10})
        settle(
            config,
            kind.build(detectors.settings_type("fcos")(name="fcos", backbone="resnet18")),
            100,
            torch.device("cpu"),
        )
        o = config.optim
        return o.optimizer, o.lr, o.weight_decay, o.clip, o.lr_scale

    plain = detectors.family("fcos")
    assert chosen(plain) == ("sgd", 0.02, 1e-4, None, {})
    assert chosen(plain, optimizer="adamw") == ("adamw", 1e-4, 1e-4, None, {})
    assert chosen(Advises) == ("adamw", 1e-4, 1e-3, 0.1, {"backbone": 0.1})
    assert chosen(Advises, optimizer="adamw", clip=0, lr_scale={}) == ("adamw", 1e-4, 1e-3, 0, {})
    with pytest.raises(SettingsError, match=r"optim\.optimizer=sgd: needs its learning rate too"):
        chosen(Advises, optimizer="sgd")


@pytest.mark.parametrize("stages", [1, 3])
def test_frozen_stages_are_stem_and_first_layers(tiny, stages):
    model = supervised(tiny, frozen_stages=stages)
    frozen = ("backbone.body.conv1.", "backbone.body.bn1.", *(f"backbone.body.layer{i + 1}." for i in range(stages)))
    for name, parameter in model.detector.module.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen)), name
    body = model.detector.module.backbone.body
    assert not body.bn1.training
    assert not body.layer1[0].bn1.training
    assert body.layer4[0].bn1.training


def test_more_stages_than_there_are(tiny):
    with pytest.raises(SettingsError, match=r"tune.frozen_stages=5: the backbone has 4"):
        supervised(tiny, frozen_stages=5)


def test_fixed_norm_keeps_statistics_and_learns_scale(tiny):
    model = supervised(tiny, backbone_norm="fixed")
    assert learning(model) == {name for name, _ in model.detector.module.named_parameters()}
    body = model.detector.module.backbone.body
    assert not body.layer3[0].bn1.training
    assert model.detector.module.backbone.fpn.training
    before = body.bn1.running_mean.clone()
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    model.detector.loss([image], [target])
    assert torch.equal(body.bn1.running_mean, before)


def test_only_some_parts(tiny):
    model = supervised(tiny, only=["classifier", "regressor"])
    assert all(name.startswith("roi_heads.box_predictor.") for name in learning(model))
    assert len(learning(model)) == 4
    with pytest.raises(SettingsError, match=r"tune.only: no part predictor; this detector has backbone, neck, rpn"):
        supervised(tiny, only=["predictor"])


def test_a_detector_object_comes_back_as_trainable_as_it_was(tiny, scenes, tmp_path):
    module = detectors.build(RCNNSettings(**tiny, num_classes=6)).module
    headstart.finetune(
        module,
        scenes / "train.json",
        out=tmp_path / "run",
        max_steps=1,
        batch_size=2,
        device="cpu",
        settings={"tune.frozen_stages": 2, "train.workers": 0},
        show=False,
    )
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("seed", range(8))
def test_scale_jitter_moves_boxes_and_masks_with_the_pixels(seed):
    """A bright rectangle is still where its box says, whatever scale and cut were drawn."""
    height, width, canvas = 60, 90, 64
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 20, 50, 50], [80.0, 2, 88, 8]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for box, mask in zip(boxes.int().tolist(), masks, strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
        image[:, box[1] : box[3], box[0] : box[2]] = 255
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "image_id": 7}
    new, moved = jitter_scale(image, target, np.random.default_rng(seed), (0.3, 2.0), canvas)
    assert new.shape == (3, canvas, canvas)
    assert moved["masks"].shape == (len(moved["boxes"]), canvas, canvas)
    assert len(moved["labels"]) == len(moved["boxes"])
    bright = new[0] > 200
    for box, mask in zip(moved["boxes"], moved["masks"], strict=True):
        ys, xs = mask.nonzero(as_tuple=True)
        around = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (around - box).abs().max() <= 1.5
        if len(ys) > 16:  # smoothing dims what is smaller
            assert bright[ys, xs].float().mean() > 0.6


def test_scale_one_on_a_canvas_of_its_size_changes_nothing():
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[3.0, 4, 20, 30]]), "labels": torch.tensor([1])}
    new, moved = jitter_scale(image, target, np.random.default_rng(0), (1.0, 1.0), 40)
    assert torch.equal(new, image)
    assert torch.equal(moved["boxes"], target["boxes"])


def validated(out, scenes, resume=False, **settings):
    return headstart.finetune(
        "scratch",
        scenes / "train.json",
        scenes / "val.json",
        detector="fcos",
        backbone="resnet18",
        out=out,
        batch_size=4,
        device="cpu",
        settings={
            **{"detector.fpn_channels": 8, "detector.short_side_px": 64, "detector.long_side_px": 96},
            **{"optim.schedule": "constant", "optim.warmup_steps": 0, "optim.lr": 0.01},
            **{"train.workers": 0, "train.amp": "off", "train.max_steps": 8, "train.checkpoint_every": 3},
            **settings,
        },
        resume=resume,
        show=False,
    )


def test_validation_keeps_the_best_weights_and_ends_the_run(scenes, tmp_path, monkeypatch):
    """AP is .1, .3, .2, .2 after steps 2, 4, 6, 8: stopped at 8, and kept are the weights of step 4. A run killed on
    the way and resumed ends the same."""
    from headstart.verbs import finetune as module

    plain = validated(tmp_path / "plain", scenes, **{"train.max_steps": 4})
    real, asked = module.run_detector, []

    def scripted(detector, data, *rest):
        evaluation = real(detector, data, *rest)
        asked.append(detector)
        aps = {"bbox": {"AP": scripted.aps.pop(0), "AP50": None}}
        monkeypatch.setattr(type(evaluation), "metrics", aps)
        return evaluation

    monkeypatch.setattr(module, "run_detector", scripted)
    tune = {"tune.validate_epochs": 1, "tune.patience": 2, "train.max_steps": 20}
    scripted.aps = [0.1, 0.3, 0.2, 0.2, 0.3]
    done = validated(tmp_path / "whole", scenes, **tune)
    assert (done.summary.steps, done.summary.finished, done.best_step) == (8, True, 4)
    for key, value in plain.detector.module.state_dict().items():
        torch.testing.assert_close(done.detector.module.state_dict()[key], value, rtol=0, atol=0)
    kept = load_file(tmp_path / "whole" / "detector.safetensors")
    assert all(torch.equal(value, kept[key]) for key, value in plain.detector.module.state_dict().items())
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["summary"]["best"] == {"step": 4, "AP": 0.3}
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [(x["step"], x["validation"]["AP"]) for x in lines if "validation" in x] == [
        (2, 0.1),
        (4, 0.3),
        (6, 0.2),
        (8, 0.2),
    ]
    page = headstart.report([tmp_path / "whole"], tmp_path / "r.html").read_text()
    assert "AP on the validation images with" in page
    assert "Best values: scratch 30" in page

    class Killed(Exception):
        pass

    def killed(detector, data, *rest):
        if len(scripted.aps) == 1:
            raise Killed
        return scripted(detector, data, *rest)

    monkeypatch.setattr(module, "run_detector", killed)
    scripted.aps = [0.1, 0.3, 0]
    with pytest.raises(Killed):
        validated(tmp_path / "cut", scenes, **tune)
    monkeypatch.setattr(module, "run_detector", scripted)
    scripted.aps = [0.2, 0.2, 0.3]
    again = validated(tmp_path / "cut", scenes, resume=True, **tune)
    assert (again.summary.steps, again.best_step) == (8, 4)
    same = load_file(tmp_path / "cut" / "detector.safetensors")
    assert all(torch.equal(value, kept[key]) for key, value in same.items())
    (tmp_path / "cut" / "best_000004.safetensors").unlink()
    with pytest.raises(RunError, match=r"best_000004\.safetensors: is gone"):
        validated(tmp_path / "cut", scenes, resume=True, **tune)


def test_validation_needs_labels_and_patience_validation(scenes, tmp_path):
    with pytest.raises(SettingsError, match=r"tune\.validate_epochs: needs labels to evaluate on \(--val\)"):
        headstart.finetune(
            "scratch", scenes / "train.json", out=tmp_path / "x", settings={"tune.validate_epochs": 1}, show=False
        )
    with pytest.raises(SettingsError, match=r"patience: needs tune\.validate_epochs"):
        validated(tmp_path / "x", scenes, **{"tune.patience": 1})
