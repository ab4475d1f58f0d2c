"""Every method with every detector it goes with: pretrain, fine-tune, evaluate, export, load in the plain library.

The README's table says which those are; it is what the registries say, and each of its cells is run here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import headstart
from headstart import cli, detectors, methods
from headstart.detectors import FAMILIES, formats
from headstart.errors import DataError, SettingsError
from headstart.methods import METHODS

README = Path(__file__).parents[1] / "README.md"
PYRAMID = {"backbone": "resnet18", "fpn_channels": 8, "short_side_px": 64, "long_side_px": 96}
REGIONS = {"head_width": 16, "rois_train": 16, "proposals_train": 32, "proposals_test": 16}
ANCHORS = {"anchor_px": [8, 16, 32, 64, 96]}
QUERIES = {"backbone": "resnet18", "num_queries": 12, "width": 64, "heads": 4, "feedforward": 32, "dropout": 0.0}
LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "short_side_px": 64, "long_side_px": 96}
DETECTORS = {
    "faster_rcnn": PYRAMID | REGIONS | ANCHORS,
    "mask_rcnn": PYRAMID | REGIONS | ANCHORS,
    "cascade_rcnn": PYRAMID | REGIONS | ANCHORS,
    "retinanet": PYRAMID | ANCHORS,
    "fcos": PYRAMID | ANCHORS,
    "detr": QUERIES | LAYERS,
    "deformable_detr": QUERIES | LAYERS,
}
QUICK = {"train.workers": 0, "train.amp": "off", "train.checkpoint_every": 2}
VIEWS = {"view_px": 64, "hidden": 16, "dim": 8}
CROPS = {"crop_px": 32}
METHOD_SETTINGS = {
    "soco": VIEWS,
    "adept": VIEWS,
    "aligndet": {"hidden": 16, "dim": 8, "K": 8},
    "detreg": CROPS,
    "updetr": CROPS | {"M": 4},
    "proseco": {"hidden": 16, "dim": 8, "K": 8},
    "joindet": CROPS | {"dim": 16, "jitter": (0.5, 1.0), "update_epochs": 1 / 6},  # before each of the two steps
}
TABLE = methods.table()
CELLS = [(row[0], method) for row in TABLE[1:] for method, cell in zip(TABLE[0][1:], row[1:], strict=True) if cell]
OTHERS = [(row[0], method) for row in TABLE[1:] for method, cell in zip(TABLE[0][1:], row[1:], strict=True) if not cell]
VARIANTS = [
    *((family, method, {}, {}) for family, method in CELLS),
    *((family, method, {"neck": "c4"}, {}) for family, method in CELLS if family in ("faster_rcnn", "mask_rcnn")),
    ("faster_rcnn", "soco", {"head": "2fc"}, {}),
    ("faster_rcnn", "adept", {}, {"training": "separate"}),
    ("faster_rcnn", "adept", {}, {"export": "online"}),
    ("faster_rcnn", "adept", {}, {"boxes": "ss_rpn", "rpn_into_backbone": True}),
    ("fcos", "aligndet", {}, {"regress": "both"}),
    ("deformable_detr", "detreg", {"refine": True, "two_stage": True}, {}),
    ("deformable_detr", "proseco", {"refine": True, "two_stage": True}, {}),
    ("deformable_detr", "joindet", {"levels": 1}, {"priors": "instance", "merge": "nms"}),
    ("deformable_detr", "aligndet", {"refine": True, "two_stage": True}, {}),
    ("deformable_detr", "updetr", {"refine": True}, {}),
    ("detr", "updetr", {"pre_norm": True}, {"patches": "proposals"}),
]
REGION_FORMATS, QUERY_FORMATS = ("detectron2", "mmdetection"), ("transformers",)


def test_the_registry_knows_what_is_tested_here():
    assert set(DETECTORS) == set(FAMILIES)
    assert set(METHOD_SETTINGS) == set(METHODS)
    assert {"torchvision", "timm", *REGION_FORMATS, *QUERY_FORMATS} == set(formats.FORMATS)


def test_the_readme_has_the_table_that_the_registries_give():
    done = CliRunner().invoke(cli.app, ["methods", "--markdown"])
    assert done.exit_code == 0
    assert done.output.strip() in README.read_text(encoding="utf-8")
    assert "| `fcos` |" in done.output


@pytest.mark.parametrize(("family", "method"), OTHERS)
def test_what_does_not_go_together_says_why(family, method, tmp_path, scenes):
    with pytest.raises(SettingsError, match=f"{method} trains .* which a .* does not have; headstart methods says"):
        headstart.pretrain(family, scenes / "unlabelled", method, out=tmp_path / "run", start="scratch", show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", DETECTORS)
def test_more_classes_than_outputs_are_refused_before_training(family, scenes, tmp_path):
    """A user's own object may have been built for other classes; labels beyond its outputs would be an index error."""
    built = detectors.build(detectors.parse_settings({"name": family, **DETECTORS[family], "num_classes": 2}))
    assert built.num_classes == 2
    with pytest.raises(DataError, match=r"train.json: has 6 classes, the detector 2; expected one with at least as"):
        headstart.finetune(built.module, scenes / "train.json", out=tmp_path / "run", max_steps=1, show=False)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def boxes(scenes, tmp_path_factory) -> Path:
    return headstart.propose(
        scenes / "unlabelled", tmp_path_factory.mktemp("boxes") / "boxes.parquet", progress=False
    ).path


@pytest.fixture
def folder(tmp_path):
    """Emptied at once: the runs of all cells together would be gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(("family", "method", "detector", "chosen"), VARIANTS)
def test_a_cell(family, method, detector, chosen, scenes, boxes, folder):
    settings = dict(QUICK)
    settings |= {f"detector.{k}": v for k, v in {**DETECTORS[family], **detector}.items()}
    settings |= {f"method.{k}": v for k, v in {**METHOD_SETTINGS[method], **chosen}.items()}
    common = {"max_steps": 2, "batch_size": 2, "device": "cpu", "show": False}
    pretrained = headstart.pretrain(
        family,
        scenes / "unlabelled",
        method,
        out=folder / "pretrained",
        start="scratch",
        proposals=boxes,
        settings=settings,
        **common,
    )
    assert pretrained.summary.finished
    kept = load_file(pretrained.weights)
    plain = built_without_us(pretrained.path)
    assert plain.load_state_dict(kept, strict=False).unexpected_keys == []
    assert {k.split(".")[0] for k in kept} >= {"backbone"}

    tuned = headstart.finetune(
        pretrained.path,
        scenes / "train.json",
        scenes / "val.json",
        out=folder / "tuned",
        settings=QUICK,
        **common,
    )
    assert set(tuned.load_report.matched) >= set(kept)
    assert not tuned.load_report.reshaped
    assert tuned.evaluation.metrics["bbox"]["AP"] is not None

    exported = headstart.export(tuned.path, "torchvision")
    plain = built_without_us(tuned.path)
    plain.load_state_dict(load_file(exported.path))
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 80)]
    ours = tuned.detector.eval()
    with torch.no_grad():
        for a, b in zip(ours.detect(images), plain.eval()(images), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key])
    for name in ("torchvision", "timm", *(REGION_FORMATS if "head_width" in DETECTORS[family] else ())):
        assert headstart.export(tuned.path, name, out=folder / f"{name}.safetensors").path.exists()
    if "num_queries" in DETECTORS[family] and not detector.get("pre_norm"):  # of which transformers knows nothing
        assert (headstart.export(tuned.path, "transformers").path / "config.json").exists()


def built_without_us(run: Path) -> torch.nn.Module:
    """The module that the first part of ``load_in_torchvision.py`` builds."""
    code = (run / "load_in_torchvision.py").read_text()
    assert "headstart" not in code
    scope: dict = {}
    exec(code.partition("from safetensors.torch import")[0], scope)
    return scope["detector"]


def test_any_torchvision_object_of_these_families_is_pretrained_in_place(scenes, boxes, folder):
    from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn_v2

    for build, name in ((fcos_resnet50_fpn, "fcos"), (retinanet_resnet50_fpn_v2, "retinanet")):
        module = build(weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        headstart.pretrain(
            module,
            scenes / "unlabelled",
            "aligndet",
            out=folder / name,
            proposals=boxes,
            max_steps=1,
            batch_size=2,
            device="cpu",
            settings={"train.workers": 0, "train.amp": "off", "method.K": 4},
            show=False,
        )
        after = module.state_dict()
        changed = {k.split(".")[0] + "." + k.split(".")[1] for k, v in after.items() if not torch.equal(v, before[k])}
        assert "backbone.fpn" in changed
        assert "backbone.body" not in changed
        assert detectors.wrap(module).family == name
        assert all(p.requires_grad for p in module.parameters())
