"""The loop: exact resume, samples that depend on (seed, n) alone, sick losses, unreadable images, stops."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from headstart import checkpoint
from headstart.engine import Job, TrainSettings, _Stream, fit, pick_device
from headstart.errors import ImageError, RunError, SettingsError, TrainingError
from headstart.optim import OptimSettings
from headstart.runs import Run

OPTIM = OptimSettings(optimizer="adamw", lr=0.05, weight_decay=0.01, warmup_steps=3, clip=1.0)


class Model(nn.Module):
    """Dropout makes it use the process's random state, batch norm gives it buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.explode_at: int | None = None
        self.calls = 0

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.calls += 1
        loss = (self.net(batch.x).squeeze(1) - batch.x.sum(dim=1)).square().mean()
        if self.explode_at is not None and self.calls > self.explode_at:
            loss = loss * float("nan")
        return {"fit": loss, "small": 0.1 * loss}


@dataclass
class Batch:
    x: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.x.to(device))


def collate(samples: list[np.ndarray]) -> Batch:
    return Batch(torch.from_numpy(np.stack(samples)))


def load(index: int, rng: np.random.Generator) -> np.ndarray:
    return (rng.normal(size=4) + index).astype(np.float32)


NAMES = [f"{i}.jpg" for i in range(10)]


def job(model: Model, **changes) -> Job:
    base = {"name": "test", "model": model, "images": 10, "load": load, "collate": collate}
    return Job(**{**base, "name_of": NAMES.__getitem__, **changes})


def settings(**changes) -> TrainSettings:
    base = {"max_steps": 12, "batch_size": 4, "device": "cpu", "amp": "off", "workers": 0, "log_every": 1}
    return TrainSettings(**{**base, "checkpoint_every": 4, **changes})


def start(path: Path, resume: bool = False) -> Run:
    return Run.start(path, {"kind": "pretrain", "config": {"a": 1}, "data": {}}, resume)


def log_of(path: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["terms"], line["lr"]) for line in lines]


def weights(model: nn.Module) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a: dict, b: dict) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_resumed_run_gives_the_same_numbers_bit_for_bit(tmp_path):
    whole = Model()
    fit(job(whole), settings(), OPTIM, start(tmp_path / "whole"), show=False)

    def stop_after_six(step: int, total: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    first = Model()
    stopped = fit(job(first, after_step=stop_after_six), settings(), OPTIM, start(tmp_path / "cut"), show=False)
    assert (stopped.steps, stopped.finished) == (6, False)
    again = Model()
    done = fit(job(again), settings(), OPTIM, start(tmp_path / "cut", resume=True), resume=True, show=False)
    assert done.finished
    assert_same(weights(whole), weights(again))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")


def test_a_run_killed_between_checkpoints_repeats_its_last_steps(tmp_path):
    whole, killed, again = Model(), Model(), Model()
    fit(job(whole), settings(), OPTIM, start(tmp_path / "whole"), show=False)

    class Killed(Exception):
        pass

    def die(step: int, total: int) -> None:
        if step == 6:  # the last checkpoint is of step 4
            raise Killed

    with pytest.raises(Killed):
        fit(job(killed, after_step=die), settings(), OPTIM, start(tmp_path / "cut"), show=False)
    with open(tmp_path / "cut" / "log.jsonl", "a") as log:
        log.write('{"step": 7, "lo')  # half a line
    (tmp_path / "cut" / ".tmp-step_000008-1-abc").mkdir()  # half a checkpoint
    fit(job(again), settings(), OPTIM, start(tmp_path / "cut", resume=True), resume=True, show=False)
    assert_same(weights(whole), weights(again))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob(".tmp*"))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole, again = Model(), Model()
    done = fit(job(whole), settings(), OPTIM, start(tmp_path / "run"), show=False)
    log = log_of(tmp_path / "run")
    same = fit(job(again), settings(), OPTIM, start(tmp_path / "run", resume=True), resume=True, show=False)
    assert (same.steps, same.loss, same.finished) == (done.steps, done.loss, True)
    assert done.loss is not None
    assert_same(weights(whole), weights(again))
    assert log_of(tmp_path / "run") == log


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    fit(job(Model()), settings(), OPTIM, start(tmp_path / "run"), show=False)
    expected = checkpoint.load(tmp_path / "run" / "step_000008")
    state = tmp_path / "run" / "step_000012" / "model.safetensors"
    state.write_bytes(state.read_bytes()[:50])
    found = checkpoint.load_latest(tmp_path / "run")
    assert found.step == 8
    assert_same(found.model, expected.model)
    (tmp_path / "run" / "step_000008" / "state.pt").write_bytes(b"cut")
    with pytest.raises(RunError, match=r"none of its 2 checkpoints.*state\.pt"):
        checkpoint.load_latest(tmp_path / "run")


def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    fit(job(Model()), settings(max_steps=4), OPTIM, start(tmp_path / "run"), show=False)
    torch.save({"format": 1, "step": 4, "x": Evil()}, tmp_path / "run" / "step_000004" / "state.pt")
    with pytest.raises(RunError, match=r"state\.pt"):
        checkpoint.load(tmp_path / "run" / "step_000004")
    assert not (tmp_path / "owned").exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    fit(job(Model()), settings(checkpoint_every=2), OPTIM, start(tmp_path / "run"), show=False)
    assert sorted(p.name for p in (tmp_path / "run").glob("step_*")) == ["step_000010", "step_000012"]
    assert (tmp_path / "run" / "latest").read_text() == "step_000012\n"


def test_workers_do_not_change_the_numbers(tmp_path):
    alone, helped = Model(), Model()
    fit(job(alone), settings(max_steps=5), OPTIM, start(tmp_path / "a"), show=False)
    fit(job(helped), settings(max_steps=5, workers=2), OPTIM, start(tmp_path / "b"), show=False)
    assert_same(weights(alone), weights(helped))


def test_every_epoch_shows_every_image_once_in_another_order():
    stream = _Stream(job(Model()), seed=3)
    epochs = [[stream.index(n) for n in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [_Stream(job(Model()), seed=3).index(n) for n in (7, 25, 3)] == [stream.index(n) for n in (7, 25, 3)]


def test_the_parts_of_a_step_add_up_to_its_batch(tmp_path):
    """Without batch norm and dropout, a step in two parts is the step of the whole batch."""
    results = []
    for parts in (1, 2):
        model = Model()
        model.net = nn.Sequential(model.net[0], nn.ReLU(), model.net[3])
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        fit(job(model), settings(accumulate=parts), OPTIM, start(tmp_path / str(parts)), show=False)
        results.append(weights(model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    model = Model()
    model.explode_at = 9
    with pytest.raises(TrainingError, match=r"no longer finite at step 10 .*step_000008.*optim\.lr"):
        fit(job(model), settings(), OPTIM, start(tmp_path / "run"), show=False)
    found = checkpoint.load_latest(tmp_path / "run")
    assert found.step == 8
    assert all(torch.isfinite(v).all() for v in found.model.values())


def test_an_unreadable_image_is_replaced_counted_and_named(tmp_path):
    def flaky(index: int, rng: np.random.Generator) -> np.ndarray:
        if index == 3:
            raise ImageError("3.jpg: truncated")
        return load(index, rng)

    summary = fit(job(Model(), load=flaky), settings(max_unreadable=0.2), OPTIM, start(tmp_path / "run"), show=False)
    assert summary.finished
    assert summary.unreadable == {"3.jpg": "3.jpg: truncated"}


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    def broken(index: int, rng: np.random.Generator) -> np.ndarray:
        if index % 2:
            raise ImageError(f"{index}.jpg: truncated")
        return load(index, rng)

    with pytest.raises(TrainingError, match=r"of 10 images can't be read, more than 10%.*jpg: truncated"):
        fit(job(Model(), load=broken), settings(), OPTIM, start(tmp_path / "run"), show=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_at_all_is_one_clear_line(tmp_path, workers):
    def broken(index: int, rng: np.random.Generator) -> np.ndarray:
        raise ImageError(f"{index}.jpg: gone")

    with pytest.raises(TrainingError, match="none of 10 images in a row") as error:
        fit(job(Model(), load=broken), settings(workers=workers), OPTIM, start(tmp_path / "run"), show=False)
    assert "Traceback" not in str(error.value)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    model = Model()
    fit(job(model), settings(max_steps=4), OPTIM, start(tmp_path / "run"), show=False)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RunError, match=r"step_000008.*No space left.*untouched"):
        checkpoint.save(tmp_path / "run", 8, model, optimizer, [], {}, keep=2)
    assert checkpoint.load_latest(tmp_path / "run").step == 4
    assert not list((tmp_path / "run").glob(".tmp*"))


def test_a_batch_that_can_not_be_divided_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"--batch-size 4.*3 parts"):
        fit(job(Model()), settings(accumulate=3), OPTIM, start(tmp_path / "run"), show=False)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SettingsError, match="tpu9"):
        pick_device("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no CUDA device"):
            pick_device("cuda")


def test_log_and_tensorboard_hold_every_term(tmp_path):
    fit(job(Model(), watch=lambda: {"health": 1.0}), settings(), OPTIM, start(tmp_path / "run"), show=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[3]["loss"] == pytest.approx(sum(lines[3]["terms"].values()), rel=1e-5)
    assert lines[3]["watch"] == {"health": 1.0}
    assert list((tmp_path / "run").glob("events.out.tfevents*"))


# ---- between steps ---------------------------------------------------------------------------------------------------


class Curve:
    """An examination that draws random numbers, changes modes, and stops after two values that are no better."""

    def __init__(self, model: Model, values: dict[int, float]) -> None:
        self.model, self.values = model, values
        self.asked: list[int] = []
        self.best, self.since = -1.0, 0

    def __call__(self, done: int) -> tuple[dict, bool]:
        assert not torch.is_grad_enabled()
        self.asked.append(done)
        torch.rand(7)
        self.model.eval()
        self.model(Batch(torch.zeros(3, 4)))
        value = self.values[done]
        self.best, self.since = (value, 0) if value > self.best else (self.best, self.since + 1)
        return {"validation": {"AP": value}}, self.since >= 2

    def hooks(self) -> dict:
        return {"examine_every": 3, "examine": self, "state": self.state, "restore": self.restore}

    def state(self) -> dict:
        return {"best": self.best, "since": self.since}

    def restore(self, state: dict) -> None:
        self.best, self.since = state["best"], state["since"]


RISING = {3: 0.1, 6: 0.2, 9: 0.3, 12: 0.4, 14: 0.5}
FALLING = {3: 0.4, 6: 0.3, 9: 0.2}


def examined(path: Path, values: dict[int, float], stop_after: int | None = None, resume: bool = False):
    model = Model()
    model.net[1].eval()  # one layer keeps its statistics: its mode is its own
    curve = Curve(model, values)

    def stop(step: int, total: int) -> None:
        if step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    done = fit(
        job(model, after_step=stop, **curve.hooks()),
        settings(max_steps=14),
        OPTIM,
        start(path, resume),
        resume=resume,
        show=False,
    )
    return done, curve, weights(model)


def test_an_examination_changes_nothing_of_the_training(tmp_path):
    """It is asked every so many steps and at the end, and what it draws and which modes it leaves do not matter."""
    plain = Model()
    fit(job(plain), settings(max_steps=14), OPTIM, start(tmp_path / "plain"), show=False)
    done, curve, found = examined(tmp_path / "run", RISING)
    assert done.finished
    assert curve.asked == [3, 6, 9, 12, 14]
    assert_same(found, weights(plain))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {line["step"]: line["validation"]["AP"] for line in lines if "validation" in line} == RISING


def test_an_examination_ends_the_run_and_a_resume_knows(tmp_path):
    done, curve, found = examined(tmp_path / "run", FALLING)
    assert (done.steps, done.finished, curve.asked) == (9, True, [3, 6, 9])
    again, asked, same = examined(tmp_path / "run", FALLING, resume=True)
    assert (again.steps, again.finished, asked.asked) == (9, True, [])
    assert_same(found, same)


@pytest.mark.parametrize("at", [2, 3, 5, 9, 14])
def test_a_run_that_is_examined_resumes_to_the_same(tmp_path, at):
    """Also where it was stopped exactly when an examination was due, the last one included."""
    _, whole, expected = examined(tmp_path / "whole", RISING)
    done, before, _ = examined(tmp_path / "cut", RISING, stop_after=at)
    assert (done.steps, done.finished) == (at, False)
    done, after, found = examined(tmp_path / "cut", RISING, resume=True)
    assert done.finished
    assert before.asked + after.asked == whole.asked
    assert after.state() == whole.state()
    assert_same(expected, found)
    validations = [
        [
            line
            for line in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
            if "validation" in line
        ]
        for name in ("whole", "cut")
    ]
    assert [[v["step"] for v in side] for side in validations] == [[3, 6, 9, 12, 14]] * 2


class Renewed:
    """Data that change every five steps, and depend on the weights at that moment."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder, self.at, self.shift = model, folder, -1, 0.0

    def __call__(self, done: int) -> bool:
        torch.rand(3)
        self.model.eval()
        at = done // 5 * 5
        if at == self.at:
            return False
        file = self.folder / f"{at}.txt"
        if not file.exists():
            assert at == done
            file.write_text(repr(float(self.model.net[0].weight.sum())))
        self.at, self.shift = at, float(file.read_text())
        return True

    def load(self, index: int, rng: np.random.Generator) -> np.ndarray:
        return (load(index, rng) + self.shift).astype(np.float32)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [None, 3, 5, 8])
def test_renewed_data_reach_the_workers_and_a_resumed_run(tmp_path, workers, at):
    def run(name: str, stop_after: int | None, resume: bool = False) -> tuple:
        model = Model()
        (tmp_path / name).mkdir(exist_ok=True)
        renewed = Renewed(model, tmp_path / name)

        def stop(step: int, total: int) -> None:
            if step + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        hooks = {"load": renewed.load, "renew": renewed, "renew_every": 5, "after_step": stop}
        folder = start(tmp_path / name / "run", resume)
        done = fit(job(model, **hooks), settings(workers=workers), OPTIM, folder, resume=resume, show=False)
        return done, weights(model)

    _, expected = run("whole", None)
    if at is None:
        plain = Model()
        fit(job(plain), settings(), OPTIM, start(tmp_path / "plain"), show=False)
        assert not torch.equal(weights(plain)["net.0.weight"], expected["net.0.weight"])
        assert sorted(p.name for p in (tmp_path / "whole").glob("*.txt")) == ["0.txt", "10.txt", "5.txt"]
        return
    done, _ = run("cut", at)
    assert done.steps == at
    _, found = run("cut", None, resume=True)
    assert_same(expected, found)
