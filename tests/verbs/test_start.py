"""Where weights come from: runs, other detectors, published backbones, the libraries."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torchvision
from safetensors.torch import save_file

import headstart
from headstart import detectors
from headstart.errors import RunError, SettingsError, WeightsError
from headstart.verbs.start import detector_of, load_start

SMALL = {"backbone": "resnet18", "fpn_channels": 8}
R_CNN = {"name": "faster_rcnn", "head_width": 16, **SMALL}


def build(**settings):
    return detectors.build(detectors.parse_settings(settings))


def same(detector, key: str, value: torch.Tensor) -> bool:
    return torch.equal(detector.module.state_dict()[key], value)


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_backbone_and_fpn_of_an_r_cnn_go_to_a_dense_detector(tmp_path, family):
    """SoCo's Table 7: C3..C5 of the pyramid find their places, P2's blocks are not used, and the report says so."""
    source = build(**R_CNN)
    file = tmp_path / "soco.safetensors"
    save_file({k: v.clone() for k, v in source.part_state(["backbone", "neck", "head"]).items()}, file)
    target = build(name=family, fpn_norm="bn", **SMALL)
    report = load_start(target, file)
    theirs = source.module.state_dict()
    assert same(target, "backbone.body.layer3.0.conv1.weight", theirs["backbone.body.layer3.0.conv1.weight"])
    for level in range(3):
        for block in ("inner", "layer"):
            for rest in ("0.weight", "1.running_mean"):
                key = f"backbone.fpn.{block}_blocks.{{}}.{rest}"
                assert same(target, key.format(level), theirs[key.format(level + 1)])
    assert report.moved == ["FPN blocks moved by -1: 4 levels up to C5 in the file, 3 here"]
    assert any("inner_blocks.0" in key for key in report.unexpected)
    assert any(key.startswith("roi_heads.box_head.") for key in report.unexpected)
    assert any(key.startswith("head.") for key in report.missing)
    assert not report.reshaped


def published(tmp_path) -> tuple:
    """A MoCo v2 file of a ResNet-18."""
    resnet = torchvision.models.resnet18(weights=None)
    own = resnet.state_dict()
    state = {f"module.encoder_q.{k}": v for k, v in own.items() if not k.startswith("fc.")}
    state |= {f"module.encoder_k.{k}": v + 1 for k, v in own.items() if not k.startswith("fc.")}
    state |= {"module.encoder_q.fc.0.weight": torch.ones(4, 4), "module.queue": torch.ones(4, 8)}
    file = tmp_path / "moco.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, file)
    return file, own


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet", "fcos", "cascade_rcnn"])
def test_a_published_backbone(tmp_path, name):
    file, own = published(tmp_path)
    detector = build(**({**R_CNN, "name": name} if "rcnn" in name else {"name": name, **SMALL}))
    report = load_start(detector, file)
    for key in ("conv1.weight", "layer4.1.bn2.running_var"):
        assert same(detector, f"backbone.body.{key}", own[key])
    assert "moco_v2" in report.source
    assert "module.queue" in report.unexpected
    assert len(report.matched) == len([k for k in own if not k.startswith("fc.")])
    assert not [key for key in report.missing if key.startswith("backbone.body.")]
    assert any("queue" in words or "key encoder" in words for words in report.moved)


def test_the_fifth_block_of_a_published_backbone_is_the_head_of_c4(tmp_path):
    file, own = published(tmp_path)
    detector = build(**R_CNN, neck="c4")
    report = load_start(detector, file)
    assert same(detector, "backbone.layer3.0.conv1.weight", own["layer3.0.conv1.weight"])
    assert same(detector, "roi_heads.box_head.0.1.conv2.weight", own["layer4.1.conv2.weight"])
    assert not report.reshaped
    assert not [key for key in report.missing if key.startswith(("backbone.", "roi_heads.box_head."))]


def test_both_backbones_of_a_composite_one(tmp_path):
    file, own = published(tmp_path)
    detector = build(**R_CNN, composite=2)
    report = load_start(detector, file)
    for part in ("assistant", "lead"):
        assert same(detector, f"backbone.body.{part}.layer2.0.conv1.weight", own["layer2.0.conv1.weight"])
    assert "copied to all 2 backbones of the composite one" in report.moved


def test_the_librarys_own_weights():
    resnet = torchvision.models.resnet18(weights=None)
    detector = build(**R_CNN)
    with patch("torchvision.models.get_model", return_value=resnet) as asked:
        report = load_start(detector, "imagenet")
    asked.assert_called_once_with("resnet18", weights="DEFAULT")
    assert same(detector, "backbone.body.layer1.0.conv1.weight", resnet.state_dict()["layer1.0.conv1.weight"])
    assert "fc.weight" in report.unexpected
    assert "imagenet" in report.source


def test_library_weights_that_can_not_be_had_say_why():
    detector = build(**R_CNN)
    wanted = r"resnet18: the library's pretrained weights can't be had .*no network"
    with (
        patch("torchvision.models.get_model", side_effect=OSError("no network")),
        pytest.raises(WeightsError, match=wanted),
    ):
        load_start(detector, "imagenet")


def test_library_weights_into_an_object_of_the_users(tiny):
    module = build(**R_CNN).module
    with pytest.raises(SettingsError, match="the backbone's name is not known"):
        load_start(detectors.wrap(module), "imagenet")


def test_what_is_none_of_these():
    with pytest.raises(RunError, match="no such run folder or weights file; expected one of these, or 'scratch' or"):
        detector_of("nowhere")


def test_fine_tuning_another_family_takes_over_what_both_have(tmp_path, scenes, tiny):
    """A SoCo run with 8 channels and batch norm in the FPN, fine-tuned as RetinaNet without naming any of it."""
    run = headstart.pretrain(
        "faster_rcnn",
        scenes / "unlabelled",
        "soco",
        out=tmp_path / "soco",
        max_steps=1,
        batch_size=2,
        device="cpu",
        settings={
            **{f"detector.{k}": v for k, v in tiny.items()},
            **{"method.view_px": 64, "method.hidden": 16, "method.dim": 8, "proposals.engine": "random"},
            "train.workers": 0,
        },
        show=False,
    )
    tuned = headstart.finetune(
        run.path,
        scenes / "train.json",
        detector="retinanet",
        out=tmp_path / "tuned",
        max_steps=1,
        batch_size=2,
        device="cpu",
        settings={"train.workers": 0},
        show=False,
    )
    settings = tuned.detector.settings
    assert (settings.name, settings.fpn_channels, settings.fpn_norm) == ("retinanet", 8, "bn")
    assert settings.short_side_px == 64
    assert any(key.startswith("backbone.fpn.inner_blocks.2.1.") for key in tuned.load_report.matched)
    assert not tuned.load_report.reshaped


def test_pretraining_goes_on_with_the_detector_of_its_start(tmp_path, scenes, tiny):
    """ADePT's second way: the RPN on a SoCo run, without naming the detector again; then another family on the same."""
    small = {"method.hidden": 16, "method.dim": 8, "proposals.engine": "random", "train.workers": 0}
    common = {"max_steps": 1, "batch_size": 2, "device": "cpu", "show": False}
    soco = headstart.pretrain(
        "faster_rcnn",
        scenes / "unlabelled",
        "soco",
        out=tmp_path / "soco",
        settings={**{f"detector.{k}": v for k, v in tiny.items()}, **small, "method.view_px": 64},
        **common,
    )
    rpn = headstart.pretrain(
        images=scenes / "unlabelled",
        method="adept",
        start=soco.path,
        out=tmp_path / "rpn",
        settings={**small, "method.view_px": 64, "method.training": "separate"},
        **common,
    )
    assert rpn.detector.settings == soco.detector.settings
    record = (rpn.path / "run.json").read_text()
    assert '"method": "soco"' in record
    report = load_start(detectors.build(rpn.detector.settings), rpn.path)
    assert "anchors of 6.85714, 13.7143" in report.notes[0]
    fcos = headstart.pretrain(
        "fcos", scenes / "unlabelled", "aligndet", start=soco.path, out=tmp_path / "fcos", settings=small, **common
    )
    assert (fcos.detector.settings.fpn_channels, fcos.detector.settings.fpn_norm) == (8, "bn")
    # A Faster R-CNN has no queries: the method's own family takes over what there is, the backbone.
    few = {"width": 64, "num_queries": 4, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 16}
    detreg = headstart.pretrain(
        images=scenes / "unlabelled",
        method="detreg",
        start=soco.path,
        out=tmp_path / "detreg",
        settings={"train.workers": 0, "method.crop_px": 16, **{f"detector.{k}": v for k, v in few.items()}},
        **common,
    )
    settings = detreg.detector.settings
    assert (settings.name, settings.backbone, settings.short_side_px) == ("deformable_detr", "resnet18", 64)


def test_frozen_parts_want_weights_that_fit(tmp_path, scenes, tiny):
    """A ResNet-18's file fits some keys of a ResNet-34; the rest of a frozen backbone would stay random."""
    file, _ = published(tmp_path)
    with pytest.raises(SettingsError, match=r"for 80 keys of backbone, and aligndet would .* another --backbone"):
        headstart.pretrain(
            "fcos",
            scenes / "unlabelled",
            "aligndet",
            backbone="resnet34",
            start=file,
            out=tmp_path / "run",
            settings={"detector.fpn_channels": 8},
            show=False,
        )
    with pytest.raises(SettingsError, match=r"for \d+ keys of neck, \d+ keys of head, and adept separate would"):
        headstart.pretrain(
            "faster_rcnn",
            scenes / "unlabelled",
            "adept",
            start=file,
            out=tmp_path / "run",
            settings={**{f"detector.{k}": v for k, v in tiny.items()}, "method.training": "separate"},
            show=False,
        )
    assert not (tmp_path / "run").exists()
