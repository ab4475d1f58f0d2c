"""What the gallery says of each box, against TIDE on the whole data set."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from reading import Page
from run_folders import make_finetuning, make_ground_truth

from headstart.tide import verdicts
from headstart.verbs.report import report


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict]:
    """Two ways of starting, on photos which are all shown."""
    root = tmp_path_factory.mktemp("two")
    truth_file = make_ground_truth(root / "data", 8)
    truth = json.loads(truth_file.read_text())
    truth["annotations"][0]["iscrowd"] = 1
    truth_file.write_text(json.dumps(truth))
    source = {"method": "soco", "pretrain_steps": 600, "source": "runs/soco"}
    runs = [
        make_finetuning(root / "runs" / "scratch", truth_file, quality=0.4),
        make_finetuning(root / "runs" / "tuned", truth_file, quality=0.7, **source),
    ]
    return runs, truth


def marks(page: Page, tag: str = "g") -> list[tuple[str, str]]:
    return [(a["data-c"] or "", a["data-e"] or "") for a in page.all(tag) if a.get("data-c")]


def test_boxes_carry_what_tide_calls_them(two: tuple[list[Path], dict], tmp_path: Path) -> None:
    """All detections are judged, whatever the threshold; a filter goes by the class and the kind."""
    runs, truth = two
    for threshold in (0.0, 0.6):
        expected: Counter = Counter()
        for run in runs:
            found = json.loads((run / "detections.json").read_text())
            told = verdicts(truth, found)
            kinds = ["ignored" if of else k for k, of in zip(told.detections, told.ignored, strict=True)]
            for image in truth["images"]:
                mine = [k for k, d in enumerate(found) if d["image_id"] == image["id"]]
                sure = [k for k in mine if found[k]["score"] >= threshold]
                drawn = sure or sorted(mine, key=lambda k: -found[k]["score"])[:1]
                expected.update((str(found[k]["category_id"] // 10), kinds[k]) for k in drawn)
            lacking = [
                (a, s) for a, s in zip(truth["annotations"], told.objects, strict=True) if s in ("Miss", "wrong")
            ]
            expected.update((str(a["category_id"] // 10), state) for a, state in lacking)
        page = Page(report(runs, tmp_path / "r.html", images=8, threshold=threshold))
        of_objects = Counter(m for m in marks(page) if set(m[1].split()) & {"found", "crowd"} or " " in m[1])
        objects = len(truth["annotations"])
        both = [verdicts(truth, json.loads((run / "detections.json").read_text())).objects for run in runs]
        alike = Counter(
            (str(a["category_id"] // 10), " ".join(dict.fromkeys(states)))
            for a, states in zip(truth["annotations"], zip(*both, strict=True), strict=True)
        )
        assert alike.total() == objects
        assert of_objects == Counter(
            {m: n for m, n in alike.items() if {"found", "crowd"} & set(m[1].split()) or " " in m[1]}
        )
        assert Counter(marks(page)) == expected + alike


def test_the_filter_says_what_it_would_find(two: tuple[list[Path], dict], tmp_path: Path) -> None:
    runs, truth = two
    page = Page(report(runs, tmp_path / "r.html", images=8, threshold=0.0))
    counts: Counter = Counter()
    photos: dict[str, set] = {}
    for run in runs:
        found = json.loads((run / "detections.json").read_text())
        told = verdicts(truth, found)
        for d, kind, ignored in zip(found, told.detections, told.ignored, strict=True):
            if not ignored:
                counts[kind] += 1
                photos.setdefault(kind or "", set()).add(d["image_id"])
    text = page.words()
    for kind in ("correct", "Cls", "Loc", "Bkg"):
        assert counts[kind]
        noun = "photo" if len(photos[kind]) == 1 else "photos"
        assert re.search(rf"{kind}: [\w ,]+ \({counts[kind]} in {len(photos[kind])} {noun}\)", text)
    false = sum(n for kind, n in counts.items() if kind != "correct")
    assert f"all false detections together ({false} in " in text


def test_errors_are_seen_without_colours(two: tuple[list[Path], dict], tmp_path: Path) -> None:
    page = Page(report(two[0], tmp_path / "r.html", images=8, threshold=0.3))
    flags = len(re.findall(r'(?:<path d="M[^"]*z"/>){3}</g>', page.source))
    assert flags == sum(kind in ("Cls", "Loc", "Both", "Dupe", "Bkg") for _, kind in marks(page))
    dotted = [a for a in page.all("g") if a.get("class") == "dotted"]
    assert {a["data-e"] for a in dotted} == {"Miss", "wrong"}
    coded = [e for _, e in marks(page, "text")]
    for kind in ("Cls", "Loc", "Bkg"):  # in a crowded picture too, and on objects found by some
        assert coded.count(kind) == [e for _, e in marks(page)].count(kind)
    assert "In the ground truth “1/2” is an object" in page.words()
    assert "/2</text>" in page.source
    assert ">crowd</text>" in page.source


def test_pictures_say_in_words_what_they_show(two: tuple[list[Path], dict], tmp_path: Path) -> None:
    runs, truth = two
    page = Page(report(runs[1], tmp_path / "r.html", images=8, threshold=0.0))
    found = json.loads((runs[1] / "detections.json").read_text())
    told = verdicts(truth, found)
    image = truth["images"][3]
    kinds = Counter(
        k
        for d, k, i in zip(found, told.detections, told.ignored, strict=True)
        if d["image_id"] == image["id"] and not i
    )
    lacking = sum(
        a["image_id"] == image["id"] and s in ("Miss", "wrong")
        for a, s in zip(truth["annotations"], told.objects, strict=True)
    )
    listed = ", ".join(f"{kinds[k]} {k}" for k in ("correct", "Cls", "Loc", "Both", "Dupe", "Bkg") if kinds[k])
    said = f"{image['file_name']}: SoCo, {kinds.total()} detections: {listed}"
    said += f"; {lacking} object{'' if lacking == 1 else 's'} not found" if lacking else ""
    assert said in [svg.get("aria-label") for svg in page.all("svg")]


def test_ids_that_are_words_and_classes_that_are_unknown(tmp_path: Path) -> None:
    """What COCO's tools can't have is renumbered; a detection of no class of the data is left out."""
    truth_file = make_ground_truth(tmp_path / "data", 4)
    run = make_finetuning(tmp_path / "run", truth_file)
    found = json.loads((run / "detections.json").read_text())
    truth = json.loads(truth_file.read_text())
    stray = [{**found[0], "category_id": 99}, {**found[0], "image_id": 77}]
    (run / "detections.json").write_text(json.dumps(found + stray))
    for entries, key in ((truth["images"], "id"), (truth["annotations"], "image_id")):
        for entry in entries:
            entry[key] = f"photo-{entry[key]}"
    truth_file.write_text(json.dumps(truth))
    page = Page(report(run, tmp_path / "r.html", images=4, threshold=0.0))
    told = [e for _, e in marks(page)]
    assert sum(e in ("correct", "Cls", "Loc", "Both", "Dupe", "Bkg") for e in told) == len(found)
    assert np.isin(["correct", "found"], told).all()


def test_without_pictures_there_is_no_section_of_them(two: tuple[list[Path], dict], tmp_path: Path) -> None:
    page = Page(report(two[0], tmp_path / "r.html", images=0))
    assert "Detections beside ground truth" not in page.words()
    assert "#pictures" not in [a["href"] for a in page.all("a")]
    assert "Centres of predicted boxes" in page.words()
