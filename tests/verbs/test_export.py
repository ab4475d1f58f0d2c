"""Export: from run folders to files that other libraries load."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import headstart
from headstart import cli, detectors
from headstart.detectors.formats import detectron2
from headstart.detectors.weights import read_metadata, read_state, save_detector
from headstart.errors import RunError, SettingsError, WeightsError

CLASSES = ["screw", "nut"]


@pytest.fixture(scope="module")
def settings(tiny):
    return detectors.parse_settings({"name": "mask_rcnn", "num_classes": len(CLASSES), **tiny})


@pytest.fixture(scope="module")
def detector(settings):
    torch.manual_seed(0)
    return detectors.build(settings)


def make_run(folder, detector, settings, parts=None, described=None):
    """A run folder with what export reads: the record and the weights."""
    folder.mkdir(parents=True)
    kind = "pretrain" if parts else "finetune"
    record = {"kind": kind, "config": {"detector": described or settings.model_dump(mode="json")}}
    (folder / "run.json").write_text(json.dumps(record))
    about = {"kind": kind, "steps": 3} | ({"parts": parts, "method": "soco"} if parts else {"classes": CLASSES})
    state = detector.part_state(parts) if parts else detector.module.state_dict()
    save_detector(folder / "detector.safetensors", state, about)
    return folder


@pytest.fixture
def finetuned(tmp_path, detector, settings):
    return make_run(tmp_path / "tuned", detector, settings)


@pytest.fixture
def pretrained(tmp_path, detector, settings):
    return make_run(tmp_path / "soco", detector, settings, ["backbone", "neck", "head"])


def test_a_fine_tuned_run_as_safetensors(finetuned, detector):
    done = headstart.export(finetuned, "detectron2")
    assert done.path == finetuned / "detectron2.safetensors"
    expected = detectron2.from_torchvision(detector.module.state_dict(), "resnet18").state
    found = load_file(done.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    about = read_metadata(done.path)
    assert about["classes"] == CLASSES
    assert about["channels"].startswith("RGB")
    assert about["image_mean"] == [0.485, 0.456, 0.406]
    assert (about["format"], about["detector"], about["backbone"]) == ("detectron2", "mask_rcnn", "resnet18")
    assert not done.missing
    assert set(done.parts) == set(detector.parts)
    counters = [key for key in detector.module.state_dict() if key.endswith("num_batches_tracked")]
    assert sum(done.parts.values()) == len(detector.module.state_dict()) - len(counters)
    assert 'load_file("' in done.loading


@pytest.mark.parametrize(("to", "under"), [("detectron2", "model"), ("mmdetection", "state_dict")])
def test_torch_files_are_read_without_executing_anything(finetuned, to, under):
    done = headstart.export(finetuned, to, format="pth")
    loaded = torch.load(done.path, weights_only=True)
    plain = load_file(headstart.export(finetuned, to).path)
    assert loaded[under].keys() == plain.keys()
    assert all(torch.equal(loaded[under][key], plain[key]) for key in plain)
    assert read_state(done.path).keys() == plain.keys()
    if to == "mmdetection":
        assert loaded["meta"]["dataset_meta"]["classes"] == tuple(CLASSES)


def test_a_pretrained_run_has_what_it_trained_and_says_what_is_missing(pretrained, detector):
    done = headstart.export(pretrained, "mmdetection")
    assert list(done.parts) == list(detector.parts)
    assert {part for part, keys in done.parts.items() if keys} == {"backbone", "neck", "head"}
    everything = {part: len(detector.part_state([part])) for part in detector.parts}
    assert done.missing == {part: n for part, n in everything.items() if part not in ("backbone", "neck", "head")}
    assert {key.split(".")[0] for key in load_file(done.path)} == {"backbone", "neck", "roi_head"}
    text = "".join(str(cell) for column in done.table().columns for cell in column.cells)
    assert f"{everything['rpn']} not in the run" in text


def test_the_backbone_for_timm(pretrained, detector):
    timm = pytest.importorskip("timm")
    done = headstart.export(pretrained, "timm")
    whole = timm.create_model("resnet18", num_classes=0, pretrained=False)
    whole.load_state_dict(load_file(done.path))
    assert torch.equal(whole.layer4[1].conv2.weight, detector.module.backbone.body.layer4[1].conv2.weight)
    assert {part for part, keys in done.parts.items() if keys} == {"backbone"}
    assert not done.missing_there


def test_torchvision_keeps_names(finetuned, detector):
    done = headstart.export(finetuned, out=finetuned / "weights.pth")
    detector.module.load_state_dict(torch.load(done.path, weights_only=True))
    assert done.to == "torchvision"


def test_a_run_on_a_users_own_object(tmp_path, detector, settings):
    run = make_run(tmp_path / "own", detector, settings, described={"object": "FasterRCNN"})
    assert headstart.export(run, "torchvision").parts["backbone"] == len(detector.part_state(["backbone", "neck"]))
    with pytest.raises(SettingsError, match=r"--to timm: .*own was trained on a detector object \(FasterRCNN\)"):
        headstart.export(run, "timm")


def test_what_is_wrong_is_said(tmp_path, finetuned, detector, settings):
    with pytest.raises(RunError, match="not a run folder"):
        headstart.export(tmp_path)
    with pytest.raises(SettingsError, match="--to onnx: not known"):
        headstart.export(finetuned, "onnx")
    with pytest.raises(SettingsError, match="--format onnx: not known; choose one of safetensors, pth"):
        headstart.export(finetuned, format="onnx")
    with pytest.raises(SettingsError, match=r"--out .*w\.bin: expected a name that ends in \.safetensors or \.pth"):
        headstart.export(finetuned, out=tmp_path / "w.bin")
    with pytest.raises(SettingsError, match=r"w\.pth: expected a name that ends in \.safetensors"):
        headstart.export(finetuned, out=tmp_path / "w.pth", format="safetensors")
    before = (finetuned / "detector.safetensors").read_bytes()
    with pytest.raises(RunError, match="is the run's own file"):
        headstart.export(finetuned, out=finetuned / "detector.safetensors")
    assert (finetuned / "detector.safetensors").read_bytes() == before
    heads = make_run(tmp_path / "heads", detector, settings, ["head"])
    with pytest.raises(SettingsError, match=r"--to timm: .* holds nothing that goes there"):
        headstart.export(heads, "timm")
    assert not (heads / "timm.safetensors").exists()
    save_detector(finetuned / "detector.safetensors", {"other.weight": torch.ones(1)}, {})
    with pytest.raises(WeightsError, match=r"does not fit the detector of .*run\.json \(other\.weight\)"):
        headstart.export(finetuned)
    (finetuned / "detector.safetensors").unlink()
    with pytest.raises(RunError, match="did not finish; continue it with --resume"):
        headstart.export(finetuned)


def test_command(finetuned, tmp_path):
    out = tmp_path / "d2.pth"
    done = CliRunner().invoke(cli.app, ["export", str(finetuned), "--to", "detectron2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.is_file()
    lines = done.output.replace("\n", " ")
    assert "INPUT.FORMAT = 'RGB'" in lines
    assert "MODEL.RESNETS.STRIDE_IN_1X1 = False" in lines
    assert "DetectionCheckpointer(model).load(" in lines
    assert "backbone" in done.output


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("to", ["detectron2", "mmdetection"])
def test_every_family_as_it_is_built_here(tmp_path, name, to):
    """Whatever a family's builder makes by default has a place there."""
    settings = detectors.parse_settings({"name": name, "backbone": "resnet18", "num_classes": 2, "fpn_channels": 32})
    detector = detectors.build(settings)
    run = make_run(tmp_path / name, detector, settings)
    done = headstart.export(run, to)
    assert done.parts.keys() == detector.parts.keys()
    assert all(done.parts.values())
    assert not done.missing
