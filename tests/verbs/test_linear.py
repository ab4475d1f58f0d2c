"""Linear evaluation: the classifier learns what a plain loop learns, and the backbone stays as it is."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import headstart
from headstart import detectors
from headstart.cli import app
from headstart.datasets.class_folders import load_class_data
from headstart.detectors import backbones
from headstart.detectors.weights import read_metadata
from headstart.errors import DataError, RunError, SettingsError, WeightsError
from headstart.verbs import linear as linear_module
from headstart.verbs.evaluate import load_finetuned
from headstart.verbs.linear import Accuracy, LinearSettings, central_view, classifier, ranks_of

PX = 32
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}
SMALL = {
    "backbone.name": "resnet18",
    "augment.view_px": PX,
    "test.resize_px": PX,
    "train.workers": 0,
    "train.device": "cpu",
    "train.amp": "off",
}
# The whole image, as it is: what a plain loop can do too.
STILL = {"augment.crop_scale": [1.0, 1.0], "augment.crop_ratio": [1.0, 1.0], "augment.flip_prob": 0.0}


def photos(root: Path, count: int, seed: int, names: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """Images whose class is their colour, under noise; a folder a class."""
    rng = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            pixels = np.array(COLOURS[name]) + rng.normal(0, 40, (PX, PX, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    photos(root / "train", 8, 0)
    photos(root / "val", 4, 1)
    return root


def run(data: Path, out: Path, start="scratch", settings=None, **more):
    given = {"max_steps": 4, "batch_size": 6, "show": False, **more}
    return headstart.linear(
        start, data / "train", data / "val", out=out, settings={**SMALL, **(settings or {})}, **given
    )


def resnet(file: Path) -> Path:
    """A ResNet-18 of torchvision, whose norms have seen something."""
    torch.manual_seed(5)
    net = torchvision.models.resnet18()
    net(torch.randn(4, 3, PX, PX))
    save_file(net.state_dict(), file)
    return file


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_the_classifier_learns_what_a_plain_loop_learns(data, tmp_path):
    """Features by torchvision's own network, cross-entropy and SGD with momentum written out; then the accuracies."""
    file = resnet(tmp_path / "resnet.safetensors")
    images = load_class_data(data / "train")
    batch, steps, lr = len(images), 10, 0.5  # all of them each step: their order does not matter
    schedule = {"optim.lr": lr, "optim.drops": [0.6, 0.8]}
    done = run(data, tmp_path / "run", file, {**STILL, **schedule}, max_steps=steps, batch_size=batch)

    net = torchvision.models.resnet18()
    net.load_state_dict(load_file(file))
    net.eval().fc = torch.nn.Identity()

    def features(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        found = [(p, k) for k, name in enumerate(sorted(COLOURS)) for p in sorted((folder / name).iterdir())]
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) / 255 for p, _ in found])
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            z = net((pixels - mean[:, None, None]) / std[:, None, None])
        return z, torch.tensor([k for _, k in found])

    config = LinearSettings(backbone={"name": "resnet18"})
    fc = classifier(config, backbones.body("resnet18", (5,))(), 3).fc
    w, b = fc.weight.detach().clone(), fc.bias.detach().clone()
    assert (w.std().item(), b.abs().max().item()) == (pytest.approx(0.01, rel=0.1), 0.0)
    z, y = features(data / "train")
    speed_w, speed_b = torch.zeros_like(w), torch.zeros_like(b)
    losses = []
    for step in range(steps):
        p = torch.softmax(z @ w.T + b, dim=1)
        losses.append(-p[torch.arange(batch), y].log().mean().item())
        error = (p - F.one_hot(y, 3)) / batch
        speed_w, speed_b = 0.9 * speed_w + error.T @ z, 0.9 * speed_b + error.sum(0)
        rate = lr * 0.1 ** ((step >= 6) + (step >= 8))
        w, b = w - rate * speed_w, b - rate * speed_b
    torch.testing.assert_close(done.model.fc.weight.detach(), w, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(done.model.fc.bias.detach(), b, rtol=1e-3, atol=1e-4)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["loss"] == pytest.approx(np.mean(losses), rel=1e-3)

    z, y = features(data / "val")
    surest = (z @ w.T + b).topk(2, dim=1).indices
    assert done.evaluation.top(1) == pytest.approx((surest[:, 0] == y).float().mean().item())
    assert done.evaluation.top(2) == pytest.approx((surest == y[:, None]).any(1).float().mean().item())
    assert done.evaluation.top(5) is None  # of three classes


def test_a_rate_too_high_for_the_features_is_said(data, tmp_path, capsys):
    """And the one that is advised is not."""
    file = resnet(tmp_path / "resnet.safetensors")
    run(data, tmp_path / "high", file, {"optim.lr": 300.0, "train.log_every": 1}, max_steps=6)
    said = " ".join(capsys.readouterr().err.split())
    assert "times 1.10, that of guessing: the rate is too high for features of norm" in said
    lines = [json.loads(line) for line in (tmp_path / "high" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["watch"].keys() == {"feature_norm", "top1"}
    advised = float(said.partition("--set optim.lr=")[2].split(".[")[0].split()[0].rstrip("."))
    good = run(data, tmp_path / "good", file, {"optim.lr": advised}, max_steps=6)
    assert good.summary.loss < 1.2 < max(line["loss"] for line in lines)
    assert "that of guessing" not in capsys.readouterr().err


def test_ranks_are_top_k_and_ties_do_not_help():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 9), torch.randint(0, 9, (50,))
    ranks = ranks_of(logits, labels)
    for k in (1, 5):
        expected = (logits.topk(k, dim=1).indices == labels[:, None]).any(1)
        assert torch.equal(ranks < k, expected)
    assert ranks_of(torch.zeros(2, 9), torch.tensor([0, 8])).tolist() == [8, 8]
    assert ranks_of(torch.full((1, 9), torch.nan), torch.tensor([0])).tolist() == [8]


def test_names_of_classes_are_printed_as_they_are(tmp_path):
    scores = Accuracy(tmp_path, ("[red]", "plain"), np.array([0, 1]), np.array([0, 1]))
    console = Console(width=100, file=io.StringIO())
    console.print(*scores.tables())
    assert "[red]" in console.file.getvalue()


def test_colour_is_learned_on_random_features_and_the_backbone_stays(data, tmp_path):
    """A planted signal: the classes are colours. Nothing of the backbone moves, batch norm's statistics included."""
    file = resnet(tmp_path / "resnet.safetensors")
    done = run(data, tmp_path / "run", file, {"optim.lr": 1.0}, max_steps=30)
    assert done.evaluation.top(1) > 0.9
    assert done.evaluation.commonest == pytest.approx(1 / 3)
    before = load_file(file)
    after = load_file(tmp_path / "run" / "step_000030" / "model.safetensors")
    kept = [name for name in after if name.startswith("body.")]
    assert len(kept) == len([name for name in before if not name.startswith("fc.")])
    for name in kept:
        assert torch.equal(after[name], before[name.removeprefix("body.")]), name


def test_what_is_written(data, tmp_path):
    out = tmp_path / "run"
    done = run(data, out, settings={"test.every_epochs": 0.5})
    scores = json.loads((out / "eval.json").read_text())
    assert scores["metric"] == "accuracy"
    assert scores["metrics"]["accuracy"]["top1"] == done.evaluation.top(1)
    assert sorted(scores["per_class"]["accuracy"]) == ["blue", "green", "red"]
    assert scores["images"] == 12
    state = load_file(out / "classifier.safetensors")
    assert {name: tuple(value.shape) for name, value in state.items()} == {"fc.weight": (3, 512), "fc.bias": (3,)}
    assert read_metadata(out / "classifier.safetensors")["classes"] == ["blue", "green", "red"]
    record = json.loads((out / "run.json").read_text())
    assert (record["kind"], record["status"]) == ("linear", "finished")
    assert record["start"] == {"from": "scratch", "method": "scratch", "pretrain_steps": 0}
    assert record["summary"]["accuracy"]["top1"] == done.evaluation.top(1)
    assert record["data"]["n_classes"] == 3
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [2, 4]
    assert lines[-1]["validation"] == {"top1": done.evaluation.top(1), "top5": None}


def test_two_processes_are_one(data, tmp_path):
    """Each trains on half of every batch and looks at half of the validation images."""
    alone = run(data, tmp_path / "one", settings={"optim.lr": 0.1}, max_steps=2, batch_size=8)
    sets = [word for k, v in {**SMALL, "optim.lr": 0.1}.items() for word in ("--set", f"{k}={v}")]
    command = ["linear", "scratch", "--train", str(data / "train"), "--val", str(data / "val"), *sets]
    command += ["--max-steps", "2", "--batch-size", "8", "--out", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "headstart"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    together = load_file(tmp_path / "two" / "classifier.safetensors")
    torch.testing.assert_close(together["fc.weight"], alone.model.fc.weight.detach(), rtol=1e-4, atol=1e-6)
    assert (tmp_path / "two" / "eval.json").read_text() == (tmp_path / "one" / "eval.json").read_text()


def test_a_stopped_run_goes_on_to_the_same_numbers(data, tmp_path, monkeypatch):
    whole = run(data, tmp_path / "whole", max_steps=6)
    fit = linear_module.fit

    def stopping(job, *arguments):
        job.after_step = lambda step, total: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None
        return fit(job, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(linear_module, "fit", stopping)
        cut = run(data, tmp_path / "cut", max_steps=6)
    assert (cut.summary.steps, cut.summary.finished, cut.evaluation) == (3, False, None)
    assert not (tmp_path / "cut" / "eval.json").exists()
    again = run(data, tmp_path / "cut", max_steps=6, resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert np.array_equal(whole.evaluation.ranks, again.evaluation.ranks)


@pytest.mark.parametrize("square", [False, True])
def test_the_tested_view_is_the_one_that_is_usual(square, photo):
    """Pillow's bilinear resizing of the shorter side, or both, and the centre: at most a level of rounding apart."""
    config = LinearSettings(augment={"view_px": 32}, test={"resize_px": 40, "square": square})
    view = central_view(torch.from_numpy(photo).permute(2, 0, 1), config)
    image = Image.fromarray(photo).resize((40, 40) if square else (53, 40), Image.BILINEAR)
    left, top = round((image.width - 32) / 2), 4
    expected = np.asarray(image.crop((left, top, left + 32, top + 32)))
    assert np.abs(view.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).max() <= 1


def test_an_unreadable_image_counts_as_wrong(data, tmp_path):
    photos(tmp_path / "val", 2, 1)
    (tmp_path / "val" / "red" / "0.png").write_bytes(b"no image")
    (tmp_path / "train").symlink_to(data / "train")
    done = run(tmp_path, tmp_path / "run", max_steps=1)
    assert list(done.evaluation.unreadable) == ["red/0.png"]
    assert done.evaluation.ranks.max() == 3  # of three classes
    assert done.evaluation.top(1, 2) <= 0.5


# ---- where the backbone comes from -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"name": "faster_rcnn"}, {"name": "faster_rcnn", "neck": "c4"}, {"name": "detr"}])
def test_only_the_backbone_of_a_run_is_used(data, tmp_path, tiny, given):
    """And all of it: a C4 detector's head is its last stage."""
    small = {k: v for k, v in tiny.items() if given["name"] == "faster_rcnn" or k == "backbone"}
    detector = detectors.build(detectors.parse_settings({**small, **given, "num_classes": 2}))
    start = tmp_path / "start"
    start.mkdir()
    record = {"kind": "finetune", "config": {"detector": detector.settings.model_dump(mode="json")}}
    (start / "run.json").write_text(json.dumps(record))
    save_file({k: v.clone() for k, v in detector.module.state_dict().items()}, start / "detector.safetensors")
    without = {k: v for k, v in SMALL.items() if k != "backbone.name"}
    done = headstart.linear(
        start, data / "train", data / "val", out=tmp_path / "run", max_steps=1, settings=without, show=False
    )
    own = detector.module.state_dict()
    c4 = given.get("neck") == "c4"
    for name, value in done.model.body.state_dict().items():
        where = f"backbone.body.{name}" if not c4 else f"backbone.{name}"
        if c4 and name.startswith("layer4."):
            where = f"roi_heads.box_head.0.{name.removeprefix('layer4.')}"
        if where in own or not name.endswith("num_batches_tracked"):
            assert torch.equal(value, own[where]), name
    assert done.load_report.unexpected
    assert any("other parts of the detector" in words for words in done.load_report.moved)


def test_a_published_backbone(data, tmp_path):
    own = torchvision.models.resnet18().state_dict()
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in own.items()}}, tmp_path / "moco.pth")
    done = run(data, tmp_path / "run", tmp_path / "moco.pth", max_steps=1)
    assert torch.equal(done.model.body.layer4[1].conv2.weight, own["layer4.1.conv2.weight"])
    assert "moco_v2" in done.load_report.source
    assert json.loads((tmp_path / "run" / "run.json").read_text())["start"]["method"] == "moco"


def test_a_backbone_that_would_be_random_in_part_is_refused(data, tmp_path):
    file = resnet(tmp_path / "resnet.safetensors")
    with pytest.raises(WeightsError, match=r"resnet\.safetensors: has no weights that fit for \d+ keys of resnet34"):
        run(data, tmp_path / "run", file, backbone="resnet34", settings={"backbone.name": "resnet34"})
    state = {k: v for k, v in load_file(file).items() if not k.startswith("layer4.")}
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"part\.safetensors: has no weights that fit .*layer4.*another --backbone"):
        run(data, tmp_path / "run", tmp_path / "part.safetensors")
    assert not (tmp_path / "run").exists()


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def test_data_and_settings_that_do_not_fit(data, tmp_path):
    photos(tmp_path / "more" / "val", 1, 0)
    (tmp_path / "more" / "val" / "red").rename(tmp_path / "more" / "val" / "pink")
    (tmp_path / "more" / "train").symlink_to(data / "train")
    with pytest.raises(
        DataError, match=r"val: has 1 classes that the training images have not: pink; expected some of"
    ):
        run(tmp_path / "more", tmp_path / "run")
    with pytest.raises(RunError, match=r"nowhere: no such run folder or weights file"):
        run(data, tmp_path / "run", "nowhere")
    with pytest.raises(SettingsError, match=r"linear: test\.resize_px: 32; expected augment\.view_px or more"):
        run(data, tmp_path / "run", settings={"test.resize_px": 32, "augment.view_px": 64})
    for name, value, message in (
        ("augment.crop_scale", [2.0, 3.0], r"crop_scale: 2\.0, 3\.0; expected .* above 0, the smaller first, up to 1"),
        ("augment.crop_ratio", [0.0, 1.0], r"crop_ratio: 0\.0, 1\.0; expected .* above 0, the smaller first"),
        ("augment.crop_ratio", [2.0, 1.0], r"crop_ratio: 2\.0, 1\.0; expected"),
        ("backbone.image_mean", [0.5], r"backbone\.image_mean"),
    ):
        with pytest.raises(SettingsError, match=message):
            run(data, tmp_path / "run", settings={name: value})
    with pytest.raises(SettingsError, match=r"optim\.optimizer=adamw: needs its learning rate too"):
        run(data, tmp_path / "run", settings={"optim.optimizer": "adamw"})
    assert not (tmp_path / "run").exists()


def test_no_detector_comes_out(data, tmp_path):
    """Other verbs say what it is; a report of several runs goes without it."""
    from headstart.verbs.report.runs import read_runs

    out = run(data, tmp_path / "run", max_steps=1).path
    said = r"run: is a linear evaluation, whose classifier of whole images is no detector; .* began with: scratch"
    with pytest.raises(RunError, match=said):
        headstart.finetune(out, "train.json")
    with pytest.raises(RunError, match=said):
        headstart.export(out)
    with pytest.raises(RunError, match=said):
        headstart.linear(out, data / "train", data / "val")
    with pytest.raises(RunError, match=said):
        load_finetuned(out)
    with pytest.raises(RunError, match=r"report: there are linear evaluations alone"):
        read_runs([out])
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text(json.dumps({"kind": "pretrain", "config": {}}))
    assert [each.path for each in read_runs([out, other])] == [other]


def test_command_line(data, tmp_path):
    sets = [word for k, v in SMALL.items() for word in ("--set", f"{k}={v}")]
    folders = ["--train", str(data / "train"), "--val", str(data / "val")]
    command = ["linear", "scratch", *folders, "--out", str(tmp_path / "run"), "--max-steps", "2", *sets]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "Linear evaluation, accuracy in %" in done.output
    assert "always the commonest class" in " ".join(done.output.split())
    assert "green" in done.output
    recipe = [*command, "--recipe", "soco_table11_linear", "--resume"]
    refused = CliRunner().invoke(app, recipe)
    assert "was started with other settings" in str(refused.exception)
    assert "augment.view_px" in CliRunner().invoke(app, ["linear", "--help"]).output
