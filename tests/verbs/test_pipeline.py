"""The whole path, in small: pretrain, fine-tune, evaluate, load elsewhere; in Python and in the shell."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import detection
from typer.testing import CliRunner

import headstart
from headstart import cli, methods
from headstart.errors import DataError, RunError, SettingsError, WeightsError

SOCO = {
    "method.view_px": 64,
    "method.hidden": 32,
    "method.dim": 16,
    "proposals.scale": 100,
    "train.workers": 0,
}


@pytest.fixture(scope="module")
def detector_settings(tiny) -> dict:
    return {f"detector.{k}": v for k, v in tiny.items() if k != "backbone"}


@pytest.fixture(scope="module")
def proposals(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from headstart.proposals import ProposalSettings

    path = tmp_path_factory.mktemp("p") / "p.parquet"
    headstart.propose(
        scenes / "unlabelled",
        path,
        settings=ProposalSettings(scale=100, size_min=0.1),
        workers=0,
        progress=False,
    )
    return path


@pytest.fixture(scope="module")
def pretrained(scenes, proposals, detector_settings, tmp_path_factory):
    return headstart.pretrain(
        "mask_rcnn",
        scenes / "unlabelled",
        out=tmp_path_factory.mktemp("runs") / "soco",
        backbone="resnet18",
        proposals=proposals,
        max_steps=3,
        batch_size=4,
        settings={**SOCO, **detector_settings},
        show=False,
    )


@pytest.fixture(scope="module")
def finetuned(scenes, pretrained):
    return headstart.finetune(
        pretrained.path,
        scenes / "train.json",
        scenes / "val.json",
        labels="4",
        out=pretrained.path.parent / "tuned",
        max_steps=3,
        batch_size=2,
        settings={"train.workers": 0},
        show=False,
    )


def plain(code_file: Path):
    """The detector that the run's own ``load_in_torchvision.py`` builds and loads, from wherever it is called."""
    assert "headstart" not in code_file.read_text()
    return runpy.run_path(str(code_file))["detector"]


def test_pretraining_changes_backbone_neck_and_head_and_nothing_else(pretrained, tiny):
    from headstart import detectors

    assert pretrained.summary.finished
    torch.manual_seed(0)
    fresh = detectors.build(pretrained.detector.settings).module.state_dict()
    for name, value in pretrained.detector.module.state_dict().items():
        if not name.endswith("weight") or "layer_blocks" in name:  # a level without boxes learns nothing
            continue
        trained = name.startswith(("backbone.", "roi_heads.box_head."))
        assert torch.equal(value, fresh[name]) != trained, name


def test_pretrained_weights_load_in_plain_torchvision(pretrained):
    state = load_file(pretrained.weights)
    assert {key.split(".")[0] for key in state} == {"backbone", "roi_heads"}
    module = plain(pretrained.path / "load_in_torchvision.py")
    answer = module.load_state_dict(state, strict=False)
    assert not answer.unexpected_keys
    assert all(key.startswith(("rpn.", "roi_heads.box_predictor", "roi_heads.mask")) for key in answer.missing_keys)


def test_finetuned_detector_loads_in_plain_torchvision_with_the_same_outputs(finetuned):
    module = plain(finetuned.path / "load_in_torchvision.py").eval()
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        ours, theirs = finetuned.detector.eval().detect([image])[0], module([image])[0]
    assert ours.keys() == theirs.keys() == {"boxes", "labels", "scores", "masks"}
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])


def test_load_report_of_the_pretrained_start(finetuned):
    report = finetuned.load_report
    assert not report.unexpected
    assert not report.reshaped
    assert {key.split(".")[0] for key in report.missing} <= {"rpn", "roi_heads"}
    assert any(key.startswith("roi_heads.box_head") for key in report.matched)
    record = json.loads((finetuned.path / "run.json").read_text())
    assert record["start"]["method"] == "soco"
    assert record["start"]["pretrain_steps"] == 3
    assert record["load_report"]["matched"] == report.matched


def test_the_budget_is_written_and_can_be_given_again(finetuned, scenes):
    ids = json.loads((finetuned.path / "labels.json").read_text())
    again = headstart.finetune(
        finetuned.path,
        scenes / "train.json",
        labels=str(finetuned.path / "labels.json"),
        out=finetuned.path.parent / "again",
        seed=5,
        max_steps=1,
        batch_size=2,
        settings={"train.workers": 0},
        show=False,
    )
    assert again.load_report.missing == []
    same = json.loads((again.path / "labels.json").read_text())
    assert same["images"] == ids["images"]
    assert len(ids["images"]) == 4


def test_evaluate_reads_the_run_and_writes_the_same_metrics(finetuned, scenes):
    evaluation = headstart.evaluate(finetuned.path, scenes / "val.json", show=False)
    written = json.loads((finetuned.path / "eval_val.json").read_text())
    at_the_end = json.loads((finetuned.path / "eval.json").read_text())
    assert written["metrics"] == at_the_end["metrics"] == evaluation.metrics
    assert written["metrics"].keys() == {"bbox", "segm"}
    assert written["errors"] == at_the_end["errors"]
    assert written["errors"].keys() == {"bbox", "segm"}
    assert json.loads((finetuned.path / "detections_val.json").read_text()) == evaluation.detections
    other = headstart.evaluate(finetuned.path, scenes / "val.json", metric="voc", show=False)
    assert other.path == finetuned.path / "eval_val_voc.json"
    assert json.loads(other.path.read_text())["metric"] == "voc"


def test_a_perfect_detector_has_ap_one(scenes, monkeypatch):
    """``evaluate`` matches labels, boxes and images up: ground truth as detections scores 1."""
    from headstart.datasets.detection import load_detection_data
    from headstart.verbs import evaluate as module

    data = load_detection_data(scenes / "val.json")

    class Oracle:
        parts = ()
        training = False
        seen = 0

        def to(self, device):
            return self

        def eval(self):
            return self

        def train(self, mode):
            return self

        def detect(self, images):
            found = data.annotations[self.seen : self.seen + len(images)]
            self.seen += len(images)
            return [
                {
                    "boxes": torch.from_numpy(a.boxes.copy()),
                    "labels": torch.from_numpy(a.labels.copy()),
                    "scores": torch.ones(len(a.labels)),
                }
                for a in found
            ]

    result = module.run_detector(Oracle(), data, 3, torch.device("cpu"), False)
    assert result.metrics["bbox"]["AP"] == pytest.approx(1)


def test_resumed_pretraining_is_the_same_run(scenes, proposals, detector_settings, tmp_path):
    def go(name, resume=False, stop=None):
        settings = {**SOCO, **detector_settings, "train.checkpoint_every": 2, "train.amp": "off"}
        if stop is not None:
            from headstart.methods.soco import SoCo

            original = SoCo.momentum

            def momentum(self, step, total):
                if step == stop:
                    raise KeyboardInterrupt
                return original(self, step, total)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SoCo, "momentum", momentum)
                with pytest.raises(KeyboardInterrupt):
                    go(name)
            return None
        return headstart.pretrain(
            "faster_rcnn",
            scenes / "unlabelled",
            out=tmp_path / name,
            backbone="resnet18",
            proposals=proposals,
            max_steps=5,
            batch_size=4,
            settings=settings,
            resume=resume,
            show=False,
        )

    whole = go("whole")
    go("cut", stop=3)
    resumed = go("cut", resume=True)
    a, b = load_file(whole.weights), load_file(resumed.weights)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_torchvision_object_is_trained_in_place_and_handed_back_as_it_came(scenes, proposals, tmp_path):
    module = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=7)
    module.backbone.body["0"].requires_grad_(False)  # the user's own choice stays
    module.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    done = headstart.pretrain(
        module,
        images=scenes / "unlabelled",
        method="soco",
        out=tmp_path / "run",
        proposals=proposals,
        max_steps=2,
        batch_size=4,
        settings=SOCO,
        show=False,
    )
    assert done.detector.module is module
    assert not module.training
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == frozen
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k]) and k.endswith("weight")}
    assert moved
    assert all(key.startswith(("backbone.", "roi_heads.box_head.")) for key in moved)
    assert not moved & set(frozen)
    tuned = headstart.finetune(
        module,
        scenes / "train.json",
        scenes / "val.json",
        out=tmp_path / "tuned",
        max_steps=1,
        batch_size=2,
        settings={"train.workers": 0},
        show=False,
    )
    assert tuned.detector.module is module
    assert tuned.evaluation is not None
    detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=7).load_state_dict(
        load_file(tuned.path / "detector.safetensors")
    )


def test_c4_from_pretraining_to_evaluation(scenes, proposals, tmp_path):
    settings = {"detector.neck": "c4", "detector.short_side_px": 64, "detector.rois_train": 8}
    settings |= {"detector.proposals_train": 16, "detector.proposals_test": 8}
    done = headstart.pretrain(
        "mask_rcnn",
        scenes / "unlabelled",
        out=tmp_path / "c4",
        backbone="resnet18",
        proposals=proposals,
        max_steps=1,
        batch_size=2,
        settings={**SOCO, **settings},
        show=False,
    )
    tuned = headstart.finetune(
        done.path,
        scenes / "train.json",
        scenes / "val.json",
        out=tmp_path / "tuned",
        max_steps=1,
        batch_size=2,
        settings={"train.workers": 0},
        show=False,
    )
    assert not tuned.load_report.reshaped
    assert "segm" in tuned.evaluation.metrics


# ---- what goes wrong, and what is said --------------------------------------------------------------------------


def test_labels_without_masks_name_the_way_out(finetuned, scenes, tmp_path, pretrained):
    labels = json.loads((scenes / "train.json").read_text())
    for annotation in labels["annotations"]:
        annotation.pop("segmentation")
    (tmp_path / "boxes.json").write_text(json.dumps(labels))
    arguments = {"train_images": scenes / "train" / "images", "show": False}
    with pytest.raises(DataError, match=r"boxes\.json: has no masks.*--detector faster_rcnn"):
        headstart.finetune(pretrained.path, tmp_path / "boxes.json", **arguments)
    tuned = headstart.finetune(
        pretrained.path,
        tmp_path / "boxes.json",
        detector="faster_rcnn",
        out=tmp_path / "boxes-only",
        max_steps=1,
        batch_size=2,
        settings={"train.workers": 0},
        **arguments,
    )
    assert any(key.startswith("roi_heads.box_head") for key in tuned.load_report.matched)


def test_starts_that_are_none(scenes, tmp_path):
    train = scenes / "train.json"
    with pytest.raises(RunError, match="no such run folder or weights file"):
        headstart.finetune(tmp_path / "nothing", train)
    with pytest.raises(RunError, match="not a run folder"):
        headstart.finetune(scenes, train)
    torch.save({"x": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"no known layout of a ResNet or Swin checkpoint. Its first keys: x"):
        headstart.finetune(tmp_path / "w.pth", train, backbone="resnet18", max_steps=1, out=tmp_path / "o", show=False)


def test_evaluating_a_pretraining_run_says_what_is_missing(pretrained, scenes):
    with pytest.raises(RunError, match="knows no classes yet; run headstart finetune"):
        headstart.evaluate(pretrained.path, scenes / "val.json", show=False)


def test_proposals_of_other_images_are_refused(scenes, proposals, tmp_path):
    with pytest.raises(DataError, match=r"p\.parquet"):
        headstart.pretrain(
            "faster_rcnn",
            scenes / "val" / "images",
            out=tmp_path / "run",
            backbone="resnet18",
            proposals=proposals,
            max_steps=1,
            settings=SOCO,
            show=False,
        )


def test_training_reads_tar_shards_as_it_reads_files(scenes, detector_settings, tmp_path):
    """In shards, and in subfolders that are called as the shards are: the same images by the same names."""
    names = sorted(path.name for path in (scenes / "unlabelled").iterdir())
    (tmp_path / "packed").mkdir()
    for i in range(2):
        (tmp_path / f"plain/s-{i}.tar").mkdir(parents=True)
        with tarfile.open(tmp_path / f"packed/s-{i}.tar", "w") as archive:
            for name in names[i::2]:
                archive.add(scenes / "unlabelled" / name, name)
                shutil.copy(scenes / "unlabelled" / name, tmp_path / f"plain/s-{i}.tar" / name)

    def train(kind, **rest):
        settings = {**SOCO, **detector_settings, "proposals.engine": "random", "train.workers": 1}
        return headstart.pretrain(
            "faster_rcnn",
            tmp_path / kind,
            out=tmp_path / f"run-{kind}",
            backbone="resnet18",
            max_steps=2,
            batch_size=4,
            settings=settings,
            show=False,
            **rest,
        )

    packed, plain = train("packed"), train("plain")
    a, b = load_file(packed.weights), load_file(plain.weights)
    assert all(torch.equal(a[key], b[key]) for key in a)
    records = [json.loads((run.path / "run.json").read_text())["data"] for run in (packed, plain)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    page = headstart.report(packed.path, tmp_path / "report.html").read_text()
    assert "s-1.tar/" in page
    assert page.count("data:image/jpeg") == 8
    # The same names, other images.
    first = tmp_path / "plain/s-0.tar" / names[0]
    first.write_bytes(first.read_bytes() + b"more")
    proposals = tmp_path / "run-plain/proposals.parquet"
    with pytest.raises(DataError, match=rf"1 images have the same name but another content: s-0\.tar/{names[0]} \("):
        headstart.pretrain(
            "faster_rcnn",
            tmp_path / "plain",
            out=tmp_path / "again",
            backbone="resnet18",
            proposals=proposals,
            max_steps=1,
            show=False,
        )


def test_unknown_method_detector_and_recipe():
    with pytest.raises(SettingsError, match="choose one of soco"):
        headstart.pretrain("faster_rcnn", ".", method="moco")
    with pytest.raises(SettingsError, match="choose one of faster_rcnn"):
        headstart.pretrain("yolo", ".")
    with pytest.raises(SettingsError, match=r"--recipe nothing.*soco_table1_100ep"):
        headstart.pretrain("faster_rcnn", ".", recipe="nothing")


# ---- the shell -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "hint"), [("sooc", "did you mean soco"), ("photos", "name one before the photos")])
def test_what_is_no_method_is_answered_with_those_there_are(word, hint):
    done = CliRunner().invoke(cli.app, ["pretrain", word, "--out", "x"])
    assert done.exit_code == 2
    said = " ".join(done.output.replace("│", " ").split())
    assert f"'{word}' is no method; {hint}" in said
    assert "joindet" in said


def test_weights_can_be_read_by_whoever_can_read_the_run(pretrained):
    assert pretrained.weights.stat().st_mode == (pretrained.path / "run.json").stat().st_mode


def shell(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "headstart", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_answers_without_torch():
    code = (
        "import sys, headstart.cli; "
        "heavy = {'torch', 'cv2', 'pyarrow', 'matplotlib', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = shell("--help").stdout
    assert all(verb in text for verb in ("propose", "pretrain", "finetune", "evaluate", "report", "scenes"))


def test_method_help_shows_the_papers_symbols():
    text = shell("pretrain", "soco", "--help").stdout
    assert "method.K" in text
    assert "method.tau" in text
    assert "Table 5d" in text
    assert "--proposals" in text
    assert "Settings of soco with faster_rcnn" in text


def test_a_methods_own_family_is_what_its_help_shows(monkeypatch):
    monkeypatch.setattr(methods.method_type("aligndet"), "detector", "fcos")
    text = CliRunner().invoke(cli.app, ["pretrain", "aligndet", "--help"]).output
    assert "Settings of aligndet with fcos" in text
    text = CliRunner().invoke(cli.app, ["pretrain", "aligndet", "--detector", "retinanet", "--help"]).output
    assert "Settings of aligndet with retinanet" in text


def test_errors_are_one_message_without_a_traceback(tmp_path):
    (tmp_path / "empty").mkdir()
    done = shell("pretrain", "soco", tmp_path / "empty", "--out", tmp_path / "x")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error:" in done.stderr
    assert "empty" in done.stderr
    assert not (tmp_path / "x").exists()


def test_the_commands_make_a_report(scenes, proposals, detector_settings, tmp_path):
    """The README's commands, tiny: every option that is spelled in it."""
    sets = [f"--set={k}={v}" for k, v in {**SOCO, **detector_settings}.items()]
    done = shell(
        *("pretrain", "soco", scenes / "unlabelled", "--detector", "faster_rcnn", "--backbone", "resnet18"),
        *(
            "--proposals",
            proposals,
            "--out",
            tmp_path / "x",
            "--max-steps",
            2,
            "--batch-size",
            4,
            "--seed",
            1,
        ),
        *("--device", "cpu", *sets),
    )
    assert done.returncode == 0, done.stderr
    assert "Pretrained: backbone, neck, head" in " ".join(done.stderr.split())
    done = shell(
        *("finetune", tmp_path / "x", "--train", scenes / "train.json", "--val", scenes / "val.json"),
        *(
            "--labels",
            "50%",
            "--seed",
            1,
            "--out",
            tmp_path / "y",
            "--max-steps",
            2,
            "--set",
            "train.workers=0",
        ),
    )
    assert done.returncode == 0, done.stderr
    assert "AP50" in done.stdout
    done = shell("report", tmp_path / "x", tmp_path / "y", "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "report.html").read_text()
    assert html.lstrip().lower().startswith("<!doctype html>")
