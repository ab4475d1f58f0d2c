"""Run folders: what may be started, resumed, and what is said when not."""

from __future__ import annotations

import pytest

from headstart.errors import RunError
from headstart.files import read_json
from headstart.runs import Run, fingerprint, read_record

RECORD = {
    "kind": "pretrain",
    "config": {"train": {"batch_size": 8, "workers": 1}},
    "data": {"fingerprint": "a"},
}


def changed(**keys) -> dict:
    return {**RECORD, "config": {"train": {**RECORD["config"]["train"], **keys}}}


def test_a_run_is_not_overwritten(tmp_path):
    Run.start(tmp_path / "x", RECORD, resume=False)
    with pytest.raises(RunError, match=r"holds a pretrain run already.*--resume"):
        Run.start(tmp_path / "x", RECORD, resume=False)


def test_resume_with_other_settings_names_them(tmp_path):
    Run.start(tmp_path / "x", RECORD, resume=False)
    with pytest.raises(RunError, match=r"train.batch_size: was 8, now 16"):
        Run.start(tmp_path / "x", changed(batch_size=16), resume=True)
    with pytest.raises(RunError, match=r"data.fingerprint: was 'a', now 'b'"):
        Run.start(tmp_path / "x", {**RECORD, "data": {"fingerprint": "b"}}, resume=True)
    with pytest.raises(RunError, match="is a pretrain run, not a finetune run"):
        Run.start(tmp_path / "x", {**RECORD, "kind": "finetune"}, resume=True)


def test_resume_may_use_other_workers(tmp_path):
    Run.start(tmp_path / "x", RECORD, resume=False)
    run = Run.start(tmp_path / "x", changed(workers=4), resume=True)
    assert run.record["config"]["train"]["workers"] == 4


def test_resume_of_nothing_starts(tmp_path):
    Run.start(tmp_path / "x", RECORD, resume=True)
    assert read_record(tmp_path / "x")["status"] == "running"


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="not empty and not a run"):
        Run.start(tmp_path, RECORD, resume=False)
    with pytest.raises(RunError, match="is a file"):
        Run.start(tmp_path / "photo.jpg", RECORD, resume=False)
    with pytest.raises(RunError, match="not a run folder"):
        read_record(tmp_path)


def test_a_record_that_is_no_record(tmp_path):
    (tmp_path / "run.json").write_text('{"a": 1}')
    with pytest.raises(RunError, match="not the record of a run"):
        read_record(tmp_path)


def test_a_record_says_with_what_it_was_made(tmp_path):
    Run.start(tmp_path / "x", RECORD, resume=False)
    record = read_json(tmp_path / "x" / "run.json")
    assert {"python", "torch", "torchvision"} <= record["versions"].keys()
    assert record["hardware"]["cores"] >= 1
    assert record["command"]


def test_fingerprint_knows_names_and_sizes():
    assert fingerprint(["a", "b"], [1, 2]) == fingerprint(["a", "b"], [1, 2])
    assert fingerprint(["a", "b"], [1, 2]) != fingerprint(["a", "b"], [1, 3])
    assert fingerprint(["ab", "c"], [1, 2]) != fingerprint(["a", "bc"], [1, 2])
