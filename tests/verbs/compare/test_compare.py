"""The grid: how starts are written, what is refused before it runs, and a small comparison that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

import headstart
from headstart.errors import DataError, HeadstartError, RunError, SettingsError
from headstart.verbs.compare import pool, rehearsal
from headstart.verbs.compare.plan import Task, cell_seed, make_plan
from headstart.verbs.compare.starts import parse_starts
from headstart.verbs.report import report

SOCO = ["soco:method.view_px=64", "soco:hidden=32", "soco:dim=16", "proposals.engine=random", "train.workers=0"]


@pytest.fixture(scope="module")
def arguments(scenes: Path, tiny: dict) -> dict:
    return {
        "train": scenes / "train.json",
        "val": scenes / "val.json",
        "unlabelled": scenes / "unlabelled",
        "starts": ["scratch", "soco"],
        "labels": ["2", "100%"],
        "seeds": 2,
        "detector": "faster_rcnn",
        "max_steps": 2,
        "batch_size": 2,
        "pretrain_max_steps": 2,
        "settings": [*(f"detector.{k}={v}" for k, v in tiny.items()), "train.workers=0"],
        "pretrain_settings": [*SOCO, "batch_size=4"],
    }


def planned(out: Path, arguments: dict, **changes):
    unset = dict.fromkeys(("backbone", "train_images", "val_images", "proposals", "recipe"))
    every = {**unset, "pretrain_recipes": (), **arguments, **changes}
    schedule = {"max_steps": every.pop("max_steps"), "batch_size": every.pop("batch_size")}
    return make_plan(out, schedule=schedule, pretrain_schedule={"max_steps": every.pop("pretrain_max_steps")}, **every)


# ---- starts and plans ----------------------------------------------------------------------------------------------


def test_starts_are_words_paths_methods_and_chains(tmp_path: Path):
    file = tmp_path / "w.pth"
    file.touch()
    starts = parse_starts(["scratch", "imagenet", str(file), "soco", " proseco@aligndet@soco", f"detreg@{file}"])
    assert [s.name for s in starts] == ["scratch", "imagenet", "w", "soco", "proseco@aligndet@soco", "detreg@w"]
    assert starts[2].source == str(file)
    chain = starts[4]
    assert (chain.method, chain.on.method, chain.on.on.method, chain.on.on.on) == ("proseco", "aligndet", "soco", None)
    assert (starts[5].method, starts[5].on.source) == ("detreg", str(file))
    for wrong, message in [
        (["scratch"], "two or more"),
        (["soco", "soco"], "named twice"),
        (["scratch", "sco"], "no file or run folder that is there"),
        (["scratch", "soco@nowhere"], "METHOD@START"),
    ]:
        with pytest.raises(SettingsError, match=message):
            parse_starts(wrong)


def test_a_plan_prepares_each_thing_once(tmp_path: Path, arguments: dict):
    plan = planned(tmp_path, arguments, starts=["soco", "scratch", "adept", "aligndet"], seeds=3)
    assert plan.baseline == "scratch"
    assert plan.starts == ["soco", "scratch", "adept", "aligndet@soco"]
    assert any("aligndet freezes the backbone" in note for note in plan.notes)
    pretrained = {name: task for name, task in plan.preparing.items() if task.verb == "pretrain"}
    assert list(pretrained) == ["soco", "adept", "aligndet@soco"]
    assert pretrained["aligndet@soco"].needs[0] == "soco"
    assert pretrained["aligndet@soco"].arguments["start"] == str(pretrained["soco"].out)
    assert plan.chains["scratch"] == []
    chain = [name for name in plan.chains["aligndet@soco"] if name in pretrained]
    assert chain == ["soco", "aligndet@soco"]
    assert pretrained["soco"].arguments["settings"]["method.hidden"] == 32  # given to soco alone
    assert "method.hidden" not in pretrained["adept"].arguments["settings"]
    assert all(task.arguments["settings"]["train.batch_size"] == 4 for task in pretrained.values())
    order = [task.name for task in plan.tasks(3)]
    assert all(order.index(need) < order.index(task.name) for task in plan.tasks(3) for need in task.needs)


def test_all_starts_get_the_same_images_seeds_and_schedule(tmp_path: Path, arguments: dict):
    plan = planned(tmp_path, arguments, seeds=3)
    assert plan.budgets == {"2": 2, "100%": 8}
    assert [len(row) for row in plan.cells] == [4, 4, 4]
    by_start: dict = {}
    for cell in (cell for row in plan.cells for cell in row):
        called = {k: v for k, v in cell.task.arguments.items() if k != "start"}
        by_start.setdefault(cell.start, []).append(called)
    assert by_start["scratch"] == by_start["soco"]
    seeds = [called["seed"] for called in by_start["soco"]]
    assert len(set(seeds)) == len(seeds) == 6  # no two budgets share one: their pairs would not be independent
    assert cell_seed(2, 1) in seeds


def test_a_method_that_does_not_fit_the_detector_lends_its_backbone(tmp_path: Path, arguments: dict):
    settings = ["detector.backbone=resnet18", "detector.fpn_channels=8", "detector.short_side_px=64"]
    plan = planned(tmp_path, arguments, detector="retinanet", starts=["scratch", "aligndet"], settings=settings)
    soco, aligndet = plan.preparing["soco"], plan.preparing["aligndet@soco"]
    assert (soco.arguments["detector"], aligndet.arguments["detector"]) == ("faster_rcnn", "retinanet")
    for task in (soco, aligndet):
        assert task.arguments["settings"]["detector.backbone"] == "resnet18"
        assert task.arguments["settings"]["detector.fpn_channels"] == 8


def test_weights_named_as_what_is_pretrained_here_are_not_taken_for_it(tmp_path: Path, arguments: dict):
    (tmp_path / "soco.pth").touch()
    mine = str(tmp_path / "soco.pth")
    for starts in (["scratch", mine, "aligndet"], ["scratch", f"adept@{mine}", "proseco@adept@soco"]):
        with pytest.raises(SettingsError, match=r"two ways of starting are named (adept@)?soco, .*METHOD@PATH"):
            planned(tmp_path / "out", arguments, starts=starts)
    plan = planned(tmp_path / "out", arguments, starts=["scratch", mine, f"aligndet@{mine}"])
    assert [name for name, task in plan.preparing.items() if task.verb == "pretrain"] == ["aligndet@soco"]
    assert plan.preparing["aligndet@soco"].arguments["start"] == mine


def test_recipes_go_to_their_methods(tmp_path: Path, arguments: dict):
    plan = planned(
        tmp_path,
        arguments,
        detector=None,
        settings=[],
        starts=["scratch", "aligndet", "adept"],
        recipe="small_cpu",
        pretrain_recipes=["small_cpu_aligndet"],
    )
    recipes = {n: t.arguments["recipe"] for n, t in plan.preparing.items() if t.verb == "pretrain"}
    assert recipes == {"soco": "small_cpu", "aligndet@soco": "small_cpu_aligndet", "adept": None}
    assert plan.preparing["adept"].arguments["settings"]["detector.head_width"] == 256  # one detector for all


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"unlabelled": None}, SettingsError, "expected --unlabelled"),
        ({"labels": ["100%", "8"]}, SettingsError, "same number of images"),
        ({"labels": ["9"]}, SettingsError, "only 8 labelled images"),
        ({"labels": []}, SettingsError, "expected one budget or more"),
        ({"seeds": 0}, SettingsError, "--seeds 0"),
        ({"settings": ["optim.lrr=1"]}, SettingsError, "no such setting"),
        ({"settings": ["optim.lr=high"]}, SettingsError, "optim.lr"),
        ({"pretrain_settings": ["soco:K=none"]}, SettingsError, "pretraining soco"),
        ({"pretrain_settings": ["sooc:K=2"]}, SettingsError, "'sooc' is no method"),
        ({"train": "nowhere.json"}, DataError, "nowhere.json"),
        ({"val": "nowhere.json"}, DataError, "nowhere.json"),
        ({"max_steps": 0}, SettingsError, "train.max_steps"),
        ({"pretrain_max_steps": 0}, SettingsError, "pretraining soco.*\n?.*train.max_steps"),
        ({"jobs": 0}, SettingsError, "--jobs 0"),
        ({"starts": ["scratch", "aligndet", "aligndet@soco"]}, SettingsError, "aligndet means aligndet@soco here"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(tmp_path: Path, arguments: dict, changes, error, message):
    with pytest.raises(error, match=message):
        headstart.compare(**{**arguments, **changes}, out=tmp_path / "out", show=False)
    assert not (tmp_path / "out").exists()


def changed(file: Path, to: Path, change) -> Path:
    content = json.loads(file.read_text())
    change(content)
    to.write_text(json.dumps(content))
    return to


def federated(content: dict) -> None:
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """Weights, labels and photos with something wrong."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    save_file({"some.layer": torch.zeros(3)}, folder / "foreign.safetensors")
    deeper = {k: v.contiguous() for k, v in torchvision.models.resnet50().state_dict().items()}
    save_file(deeper, folder / "resnet50.safetensors")
    changed(scenes / "val.json", folder / "federated.json", federated)
    changed(scenes / "val.json", folder / "empty.json", lambda content: content.update(annotations=[]))
    boxes_alone = lambda content: [a.pop("segmentation", None) for a in content["annotations"]]
    changed(scenes / "train.json", folder / "boxes_alone.json", boxes_alone)
    (folder / "photos").mkdir()
    (folder / "photos/torn.jpg").write_bytes(b"torn")
    (folder / "begun").mkdir()
    (folder / "begun/run.json").write_text(
        json.dumps({"kind": "pretrain", "config": {"detector": {"name": "faster_rcnn"}}})
    )
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": ["scratch", "broken.safetensors"]}, "broken.safetensors: not a readable safetensors file"),
        ({"starts": ["scratch", "foreign.safetensors"]}, "foreign.safetensors: no known layout"),
        ({"starts": ["scratch", "soco@resnet50.safetensors"]}, "only 77 of the 100 weights of this backbone"),
        ({"starts": ["scratch", "resnet50.safetensors"]}, "--starts resnet50: only .* Is it of another --backbone"),
        ({"starts": ["scratch", "begun"]}, "begun: has no detector.safetensors, so it did not finish"),
        ({"val": "federated.json"}, "federated.json: .*frequency"),
        ({"val": "empty.json"}, "empty.json: has no object"),
        ({"train": "boxes_alone.json", "detector": "mask_rcnn"}, "boxes_alone.json: has no masks"),
        ({"unlabelled": "photos"}, "photos: none of its images that were looked at can be read.*torn.jpg"),
        ({"proposals": "boxes.parquet"}, "boxes.parquet: no such file; expected boxes of"),
        ({"more": ["tune.only=[nose]"]}, "tune.only: no part nose"),
        ({"more": ["tune.frozen_stages=9"]}, "the backbone has 4"),
        ({"more": ["train.accumulate=3"]}, "batch size 2 can't be divided into 3 parts"),
        ({"device": "cuda:77"}, "cuda:77: this machine"),
        ({"pretrain_settings": [*SOCO, "detector.backbone=resnet34"]}, "fine-tuning has resnet18; expected the same"),
    ],
)
def test_what_would_end_a_run_ends_the_rehearsal(
    tmp_path: Path, arguments: dict, scenes: Path, faulty: Path, changes, message
):
    called = {**arguments, "train_images": scenes / "train/images", "val_images": scenes / "val/images"}
    called["settings"] = [*called["settings"], *changes.get("more", [])]
    for key, value in changes.items():
        if key == "starts":
            called[key] = [one.replace(one.rpartition("@")[2], str(faulty / one.rpartition("@")[2])) for one in value]
            called[key][0] = "scratch"
        elif key in ("train", "val", "unlabelled", "proposals"):
            called[key] = faulty / value
        elif key != "more":
            called[key] = value
    with pytest.raises(HeadstartError, match=message):
        headstart.compare(**called, out=tmp_path / "out", show=False)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_seen_before_it_is_full(tmp_path: Path, arguments: dict, monkeypatch):
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(RunError, match=r"out: the weights of these runs take 0\.\d GiB at least, and 0.0 GiB are"):
        headstart.compare(**arguments, out=tmp_path / "out", show=False)


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_side_by_side_and_what_a_failed_run_said(tmp_path: Path, scenes: Path):
    boxes = {"images": scenes / "unlabelled", "settings": {"engine": "random"}}
    good = Task("boxes", "propose", boxes, tmp_path / "boxes.parquet")
    bad = Task("bad", "finetune", {"start": "nowhere", "train": scenes / "train.json"}, tmp_path / "bad", ("boxes",))
    after = []
    with pytest.raises(
        RunError, match=r"bad: failed \(exit code 1\); all it said is in .*bad.txt:\n  nowhere: no such run"
    ):
        pool.run_all([good, bad], [None, None], tmp_path / "logs", False, lambda task: after.append(task.name))
    assert after == ["boxes"]
    assert pool.finished(good)
    assert not pool.finished(bad)


def test_the_last_words_are_those_of_the_last_try(tmp_path: Path):
    log = tmp_path / "run.txt"
    assert "it said nothing" in pool._last_words(log, 1)
    log.write_text(f"{pool.BEGUN} 1\nerror: no space\n{pool.BEGUN} 2\nstep 10\nerror: two\nlines\n\n")
    assert pool._last_words(log, 1).endswith("run.txt:\n  two\n  lines")
    log.write_text(f"{pool.BEGUN} 1\nerror: no space\n{pool.BEGUN} 2\n" + "".join(f"step {i}\n" for i in range(9)))
    said = pool._last_words(log, -9)
    assert said.startswith("was killed by signal 9 (out of memory?)")
    assert [line.strip() for line in said.splitlines()[1:]] == [f"step {i}" for i in range(3, 9)]


def test_one_command_works_in_a_folder_at_a_time(tmp_path: Path):
    """A run that outlives a command that was killed is waited for."""
    busy = pytest.raises(RunError, match="out: another headstart compare works in it")
    with pool.alone(tmp_path / "out"), busy, pool.alone(tmp_path / "out"):
        pass
    order = []
    at_work = threading.Event()

    def orphan():
        with pool._locked(tmp_path / "out" / pool.RUNS_LOCK, shared=True):
            at_work.set()
            time.sleep(0.3)
            order.append("run")

    thread = threading.Thread(target=orphan)
    thread.start()
    at_work.wait()
    with pool.alone(tmp_path / "out"):
        order.append("command")
    thread.join()
    assert order == ["run", "command"]


def test_ctrl_c_between_steps_stops_the_comparison(tmp_path: Path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "work", interrupted)
    task = Task("boxes", "propose", {}, tmp_path / "boxes.parquet")
    assert pool.run_all([task], [None], tmp_path / "logs", False, interrupted) is False


@pytest.mark.parametrize(("gain", "seeds", "verdict"), [(0.05, 4, "better"), (0.0, 6, "not shown")])
def test_stopping_early(tmp_path: Path, arguments: dict, monkeypatch, gain, seeds, verdict):
    """Two budgets: 3 seeds are 6 pairs, which can't show anything when there may be four looks; 4 seeds are 8."""

    def trained(tasks, places, logs, show, after):
        for task in (task for task in tasks if not pool.finished(task)):
            task.out.mkdir(parents=True, exist_ok=True)
            (task.out / "run.json").write_text('{"status": "finished", "summary": {"seconds": 1}}')
            (task.out / "detector.safetensors").touch()
            seed = task.arguments["seed"] if task.verb == "finetune" else 0
            better = gain if "soco" in task.name else 0.0
            noise = np.random.default_rng([seed, "soco" in task.name]).normal(0, 0.005)
            metrics = {"bbox": {"AP": 0.2 + better + noise}}
            (task.out / "eval.json").write_text(json.dumps({"metrics": metrics}))
        return True

    monkeypatch.setattr("headstart.verbs.compare.run_all", trained)
    monkeypatch.setattr("headstart.verbs.compare.report", lambda *_: None)
    done = headstart.compare(**{**arguments, "seeds": 6}, out=tmp_path / "out", stop_early=True, show=False)
    assert done.answer.against_baseline()[0].verdict == verdict
    assert {len(cells) for budgets in done.scores.values() for cells in budgets.values()} == {seeds}
    assert json.loads((tmp_path / "out/compare.json").read_text())["answer"]["looks"] == 4


def test_starts_and_budgets_are_added_to_a_comparison_that_was_moved(tmp_path: Path, arguments: dict, monkeypatch):
    """What is there is not run again, and boxes and weights that were made in the folder are where it is now."""
    ran: list[str] = []

    def trained(tasks, places, logs, show, after):
        for task in (task for task in tasks if not pool.finished(task)):
            ran.append(task.name)
            if task.verb == "propose":
                task.out.parent.mkdir(parents=True, exist_ok=True)
                task.out.touch()
                continue
            task.out.mkdir(parents=True, exist_ok=True)
            (task.out / "run.json").write_text('{"status": "finished", "summary": {"seconds": 1}}')
            (task.out / "detector.safetensors").touch()
            ap = 0.2 + 0.05 * ("soco" in task.name) + 0.001 * (task.arguments.get("seed", 0) % 7)
            (task.out / "eval.json").write_text(json.dumps({"metrics": {"bbox": {"AP": ap}}}))
        return True

    monkeypatch.setattr("headstart.verbs.compare.run_all", trained)
    monkeypatch.setattr("headstart.verbs.compare.report", lambda *_: None)
    monkeypatch.setattr("headstart.verbs.compare.rehearse", lambda *_: None)
    call = lambda out, **more: headstart.compare(**{**arguments, "seeds": 3, **more}, out=out, show=False)
    first = call(tmp_path / "out", starts=["scratch", "aligndet"])
    assert first.answer.looks == 1
    (tmp_path / "out").rename(tmp_path / "moved")
    ran.clear()
    more = {"starts": ["scratch", "aligndet", "soco"], "labels": ["2", "4", "100%"]}
    second = call(tmp_path / "moved", **more)
    every = {f"{start}-4-seed{4000 + k}" for start in ("scratch", "aligndet@soco", "soco") for k in range(3)}
    every |= {
        f"soco-{budget}-seed{1000 * images + k}" for budget, images in (("2", 2), ("100pct", 8)) for k in range(3)
    }
    assert set(ran) == every
    assert second.answer.looks == 2
    assert {c.pairs for c in second.answer.contrasts} == {9}
    assert len(second.answer.contrasts) == 3
    with pytest.raises(RunError, match=r"aligndet@soco, proposals: was .*, now 'else.parquet'"):
        call(tmp_path / "moved", **more, proposals="else.parquet")


def test_seeds_that_are_added_after_a_verdict_are_another_look(tmp_path: Path, arguments: dict, monkeypatch):
    """And a comparison that fails half-way has none, nor one that another start was added to."""
    fail_at: list[int] = []

    def trained(tasks, places, logs, show, after):
        for number, task in enumerate(task for task in tasks if not pool.finished(task)):
            if fail_at and number == fail_at[0]:
                raise RunError(f"{task.name}: broken")
            task.out.mkdir(parents=True, exist_ok=True)
            (task.out / "run.json").write_text(
                '{"status": "finished", "summary": {"seconds": 1, "steps": 9}, "config": {"train": {"batch_size": 4}}}'
            )
            steps = [{"step": 4, "images_per_s": 2}, {"step": 9, "images_per_s": 4}]  # 8 s, killed, and 5 s
            (task.out / "log.jsonl").write_text("\n".join(map(json.dumps, steps)))
            (task.out / "detector.safetensors").touch()
            ap = 0.2 + 0.05 * ("soco" in task.name) + 0.001 * (task.arguments.get("seed", 0) % 7)
            errors = {"bbox": {"dAP": {"Miss": 0.5 - ap, "Dupe": None}}}
            (task.out / "eval.json").write_text(json.dumps({"metrics": {"bbox": {"AP": ap}}, "errors": errors}))
        return True

    monkeypatch.setattr("headstart.verbs.compare.run_all", trained)
    monkeypatch.setattr("headstart.verbs.compare.report", lambda *_: None)
    monkeypatch.setattr("headstart.verbs.compare.rehearse", lambda *_: None)
    out = tmp_path / "out"
    call = lambda **more: headstart.compare(**{**arguments, **more}, out=out, show=False)
    content = lambda: json.loads((out / "compare.json").read_text())
    fail_at.append(5)
    with pytest.raises(RunError, match="broken"):
        call(seeds=3)
    assert content()["status"] == "stopped"
    assert content()["sentences"][0].startswith("No verdict yet: ")
    assert content()["looked"] == []
    fail_at.clear()
    for _ in range(2):  # the same once more is no other look
        first = call(seeds=3)
        assert (first.answer.looks, len(content()["looked"])) == (1, 1)
        assert first.answer.contrasts[0].luck == pytest.approx(2 / 2**6)
    second = call(seeds=4)
    assert (second.answer.looks, len(content()["looked"])) == (2, 2)
    assert second.answer.contrasts[0].luck == pytest.approx(2 * 2 / 2**8)
    assert call(seeds=3).answer.looks == 1

    assert second.times["soco"] | {"chain": []} == {
        "chain": [],
        "pretraining": 13.0,
        "images_seen": 36,
        "finetuning": 13.0,
        "runs": 8,
    }
    assert "Pretraining soco took 13s, as long as 1.0 fine-tuning runs, and showed it 36 images." in second.sentences
    assert [c.type for c in second.changes] == ["Miss"]
    assert second.command.startswith(f"headstart finetune {out}/runs/soco --train ")
    assert "--max-steps 2" in second.command
    assert "detector.backbone" not in second.command  # the run knows it


def test_a_killed_comparison_goes_on_and_answers(tmp_path: Path, arguments: dict):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "headstart", "compare", "--out", str(out)]
    for key, value in arguments.items():
        option = {"settings": "--set", "pretrain_settings": "--pretrain-set"}.get(key, f"--{key.replace('_', '-')}")
        if option.endswith("set"):
            command += [part for one in value for part in (option, str(one).replace("'", '"'))]
        else:
            command += [option, ",".join(value) if isinstance(value, list) else str(value)]
    with open(tmp_path / "said.txt", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:
        answered = json.loads((out / "compare.json").read_text()) if (out / "compare.json").exists() else {}
        if len(answered.get("runs", [])) >= 3:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "said.txt").read_text()[-2000:]
    before = json.loads((out / "compare.json").read_text())
    assert before["status"] == "running"
    assert len(before["runs"]) < 8
    stamps = {run["path"]: (out / run["path"] / "eval.json").stat().st_mtime_ns for run in before["runs"]}
    pretrained = (out / "runs/soco/detector.safetensors").stat().st_mtime_ns

    done = headstart.compare(**arguments, out=out, show=False)

    assert done.finished
    assert {path: (out / path / "eval.json").stat().st_mtime_ns for path in stamps} == stamps
    assert (out / "runs/soco/detector.safetensors").stat().st_mtime_ns == pretrained
    answered = json.loads((out / "compare.json").read_text())
    assert answered["status"] == "finished"
    assert len(answered["runs"]) == 8
    assert {start: {i: len(s) for i, s in b.items()} for start, b in done.scores.items()} == {
        start: {2: 2, 8: 2} for start in ("scratch", "soco")
    }
    assert "Only 2 seeds to compare" in done.sentences[0]
    assert done.times["soco"]["pretraining"] > 0
    chosen = {}
    for run in answered["runs"]:
        labelled = json.loads((out / run["path"] / "labels.json").read_text())["images"]
        chosen.setdefault((run["images"], run["seed"]), []).append(labelled)
        record = json.loads((out / run["path"] / "run.json").read_text())
        assert record["summary"]["steps"] == 2
        assert record["start"]["method"] == run["start"]
    assert all(len(lists) == 2 and lists[0] == lists[1] for lists in chosen.values())
    assert Image.open(out / "compare.png").size[0] > 600
    assert "<svg" in (out / "compare.svg").read_text()
    page = (out / "report.html").read_text()
    for text in (
        "Does it pay?",
        "only 2 seeds to compare",
        "Labels saved",
        "The rule behind this",
        "of one number of labels alone",
    ):
        assert text in page

    with pytest.raises(RunError, match="begun with other settings: fine-tuning, max_steps: was 2, now 3"):
        headstart.compare(**{**arguments, "max_steps": 3}, out=out, show=False)
    moved = out.rename(tmp_path / "moved")
    assert "Does it pay?" in report([moved], tmp_path / "again.html", images=0).read_text()
