"""What is printed, drawn and shown on the page of a comparison whose numbers are made up."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from headstart.errors import RunError
from headstart.verbs.compare import _plain, words
from headstart.verbs.compare.errors import changes
from headstart.verbs.compare.statistics import RULE, Answer, answer
from headstart.verbs.report import comparison, report
from headstart.verbs.report.parts import Looks

SCORES = {
    "scratch": {10: {0: 0.100, 1: 0.104, 2: 0.102}, 40: {3: 0.200, 4: 0.204, 5: 0.202}},
    "soco": {10: {0: 0.150, 1: 0.155, 2: 0.152}, 40: {3: 0.260, 4: 0.262, 5: 0.258}},
}
TIMES = {
    "scratch": {"chain": [], "pretraining": None, "finetuning": 60.0},
    "soco": {"chain": ["soco"], "pretraining": 3700.0, "finetuning": 61.0},
}


@pytest.fixture(scope="module")
def found() -> Answer:
    return answer(SCORES, "scratch")


@pytest.fixture
def folder(tmp_path: Path, found: Answer) -> Path:
    """As compare leaves it, but for the runs."""
    content = {
        "kind": "compare",
        "status": "finished",
        "sentences": words.sentences(found),
        "rule": RULE,
        "answer": _plain(asdict(found)),
        "starts": TIMES,
        "pretraining": [],
        "runs": [],
    }
    (tmp_path / "compare.json").write_text(json.dumps(content, allow_nan=False))
    return tmp_path


def test_sentences_say_gain_chance_and_labels(found: Answer):
    verdict, saved = words.sentences(found)
    assert verdict.startswith(
        "soco helps: +5.4 points of AP against scratch, mean over 2 label budgets (95% interval +5"
    )
    assert verdict.endswith("6 of 6 pairs point this way; luck alone would do as much 1 time in 32.")
    assert "with 10 labelled images it reaches 15.2 AP, for which scratch needs 20 (95% interval" in saved
    assert "with 40 labelled images it reaches 26.0 AP, for which scratch needs more than 40 (95% inter" in saved


def test_tables_for_the_console(found: Answer):
    console = Console(file=io.StringIO(), width=140)
    for table in words.tables(found, TIMES):
        console.print(table)
    text = console.file.getvalue()
    row = next(line.split() for line in text.splitlines() if line.startswith("soco"))
    assert row == ["soco", "15.2", "±", "0.6", "26.0", "±", "0.5", "better,", "+5.4", "1h01m", "1m01s"]
    assert "more than 40 (more than 40 to more than 40)" in text


def test_the_page_reads_what_was_written(folder: Path):
    content = comparison.read(folder)
    shown = comparison.answered(folder, content, [], Looks([]), "compare0")
    assert shown.state == ""
    assert [(c["ours"], c["other"], c["verdict"], c["said"]) for c in shown.contrasts] == [
        ("soco", "scratch", "shown", "better")
    ]
    assert [s["needed"] for s in shown.saved] == ["20", "more than 40"]
    assert [key.label for key in shown.legend] == ["scratch", "soco"]
    assert "scratch: 10.2 at 10, 20.2 at 40; soco: 15.2 at 10, 26.0 at 40" in shown.figure.svg
    assert "#0a0" not in shown.figure.svg  # every stand-in for a colour was replaced


def test_pictures_stand_alone(folder: Path):
    comparison.draw(folder)
    with Image.open(folder / "compare.png") as image:
        assert image.size == (960, 600)
        assert (0, 0x72, 0xB2) in {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    drawn = (folder / "compare.svg").read_text()
    assert "#0a0" not in drawn
    assert "soco" in drawn


def test_what_is_no_comparison_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(RunError, match="no run of this comparison is finished yet"):
        report([folder], tmp_path / "r.html")
    (folder / "compare.json").write_text('{"kind": "other"}')
    with pytest.raises(RunError, match='"kind" is not "compare"'):
        report([folder], tmp_path / "r.html")
    (folder / "compare.json").write_text("{")
    with pytest.raises(RunError, match="not JSON"):
        report([folder], tmp_path / "r.html")


def printed(tables) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_brackets_in_the_names_of_files_are_printed():
    scores = {"base[/red]": SCORES["scratch"], "w[red]": SCORES["soco"]}
    times = {"base[/red]": TIMES["scratch"], "w[red]": TIMES["soco"]}
    said = printed(words.tables(answer(scores, "base[/red]"), times, changes({"Miss": scores}, "base[/red]")))
    assert said.count("w[red]") == 4  # AP, labels saved with two budgets, errors
    assert "against base[/red]" in said
    assert "that base[/red] needs for the same AP" in said


def test_errors_before_and_after_are_of_the_same_pairs(folder: Path):
    """Where runs are missing, each start has others in common with the baseline."""
    lost = {**SCORES, "adept": {40: {seed: ap + 0.1 for seed, ap in SCORES["scratch"][40].items()}}}
    found = changes({"Miss": lost}, "scratch", final=False)
    content = json.loads((folder / "compare.json").read_text())
    content["starts"]["adept"] = TIMES["soco"]
    content["errors"] = [asdict(change) for change in found]
    (row,) = comparison._error_rows(content)
    assert row["before"] == "15.2"
    assert [(cell["before"], cell["after"]) for cell in row["cells"]] == [("", "20.6"), ("20.2", "30.2")]
    said = printed(words.tables(answer(lost, "scratch", final=False), content["starts"], found))
    assert "20.2 → 30.2" in said
    assert "15.2 → " not in said
