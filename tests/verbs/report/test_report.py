from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reading import Page
from run_folders import CLASSES, make_finetuning, make_ground_truth, make_pretraining, make_study

from headstart.errors import RunError
from headstart.verbs.report import figures, pictures, report


def test_the_table_holds_the_numbers_of_the_runs(study: list[Path], study_page: Path) -> None:
    page = Page(study_page)
    scores = [json.loads((run / "eval.json").read_text()) for run in study if run.name.startswith("tuned")]
    values = [100 * s["metrics"]["bbox"]["AP"] for s in scores]
    assert len(values) == 3
    text = page.words()
    assert f"{np.mean(values):.1f}" in text
    assert f"± {np.std(values, ddof=1):.1f}" in text
    assert f"{min(values):.1f} to {max(values):.1f}" in text
    assert f"SoCo reaches {np.mean(values):.1f} AP against" in text
    per_class = np.mean([s["per_class"]["bbox"][CLASSES[0]]["AP"] for s in scores])
    assert f"{100 * per_class:.1f}" in text
    assert "the 3 runs start from one pretrained checkpoint" in text


def test_error_types_are_those_of_the_runs(study: list[Path], study_page: Path) -> None:
    page = Page(study_page)
    found = [json.loads((run / "eval.json").read_text())["errors"]["bbox"] for run in study if "tuned" in run.name]
    missed = [100 * errors["dAP"]["Miss"] for errors in found]
    text = page.words()
    assert f"Miss (an object that nothing comes near), {np.mean(missed):.1f} points" in text
    assert f"{np.mean(missed):.1f} ± {np.std(missed, ddof=1):.1f}" in text
    figures_of_errors = [svg for svg in page.all("svg") if "types of error cost" in (svg.get("aria-label") or "")]
    assert len(figures_of_errors) == 2
    assert all("SoCo, 300 steps: " in (svg["aria-label"] or "") for svg in figures_of_errors)
    assert "#errors" in [link["href"] for link in page.all("a")]
    assert "of an older version" not in text


def test_evaluations_without_error_types_say_how_to_make_them(tmp_path: Path) -> None:
    truth = make_ground_truth(tmp_path / "data", 4)
    run = make_finetuning(tmp_path / "runs" / "old", truth)
    scores = json.loads((run / "eval.json").read_text())
    for key in ("errors", "metric"):
        del scores[key]
    (run / "eval.json").write_text(json.dumps(scores))
    page = Page(report(run, tmp_path / "r.html", images=0))
    assert "1 evaluation of an older version" in page.words()
    assert f"headstart evaluate {run} {truth} --metric coco --out {run / 'eval.json'}" in page.words()
    assert "What AP is lost to" not in page.words()


def test_another_metric_on_the_same_data_is_another_result(tmp_path: Path) -> None:
    truth = make_ground_truth(tmp_path / "data", 4)
    run = make_finetuning(tmp_path / "runs" / "one", truth)
    scores = json.loads((run / "eval.json").read_text())
    (run / "eval_val_voc.json").write_text(json.dumps({**scores, "metric": "voc"}))
    (run / "eval_val_proposals.json").write_text(json.dumps({**scores, "metric": "proposals"}))
    text = Page(report(run, tmp_path / "r.html", images=0)).words()
    assert text.count("COCO metrics in %") == 1
    assert text.count("area under the curve in %") == 1
    assert "whatever the class" not in text


def test_it_loads_nothing_from_elsewhere(study_page: Path) -> None:
    page = Page(study_page)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
    assert not re.search(r"url\((?!#)", page.source)
    assert "@import" not in page.source
    assert "http://" not in page.source
    assert "https://" not in page.source
    policies = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert (policies[0]["content"] or "").startswith("default-src 'none'")


def test_what_users_wrote_stays_text(study_page: Path) -> None:
    page = Page(study_page)
    assert CLASSES[1] in page.words()
    assert page.source.count("<script>") == 1  # the page's own
    assert "bar & $tripe$" in page.words()


def test_pictures_are_small_jpegs_stored_once(study_page: Path) -> None:
    page = Page(study_page)
    stored = page.all("image")
    assert 6 <= len(stored) <= 6 + 8  # detections and proposals, shared where they show one photo
    for image in stored:
        data = base64.b64decode((image["href"] or "").removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.format == "JPEG"
            assert max(opened.size) <= 256
            drawn = float(image["width"] or 0), float(image["height"] or 0)
            assert max(drawn) == 256
            assert opened.width / opened.height == pytest.approx(drawn[0] / drawn[1], rel=0.02)
    keys = {f"#{image['id']}" for image in stored}
    used = {use["href"] for use in page.all("use") if (use["href"] or "").startswith("#photo")}
    assert used == keys
    assert study_page.stat().st_size < 1_000_000


def test_everything_seen_has_words(study_page: Path) -> None:
    page = Page(study_page)
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or svg.get("aria-label"), svg
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert (link["href"] or "").removeprefix("#") in ids
    assert (page.all("html")[0]["lang"], len(page.all("h1"))) == ("en", 1)


def test_detections_stand_beside_the_ground_truth(study: list[Path], study_page: Path) -> None:
    page = Page(study_page)
    labels = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("data-title")]
    truths = [label for label in labels if "ground truth" in label]
    assert len(truths) == 6
    assert sum("SoCo, 300 steps" in label and "centres" not in label for label in labels) == 6
    first = json.loads((study[0].parent / "tuned-10-seed0" / "detections.json").read_text())
    name = truths[0].split(":")[0]
    image_id = int(name.removeprefix("photo ").removesuffix(".jpg")) + 1
    kept = [d for d in first if d["image_id"] == image_id and d["score"] >= 0.5]
    start = f"{name}: SoCo, 300 steps, {len(kept)} detection{'' if len(kept) == 1 else 's'}: "
    assert sum(label.startswith(start) for label in labels) == 1


def test_a_picture_without_sure_detections_shows_the_best(study: list[Path], tmp_path: Path) -> None:
    page = Page(report(study[:4], tmp_path / "r.html", images=3, threshold=1.0))
    assert re.search(r"best of \d+, score 0\.\d\d", page.words())


def test_several_budgets_become_a_curve(tmp_path: Path) -> None:
    runs = make_study(tmp_path, budgets=(10, 25), seeds=(0, 1, 2))
    page = Page(report(runs, tmp_path / "r.html", images=2))
    charts = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("class") == "figure"]
    assert any(re.search(r"against labelled images.*at 10.*at 25", label) for label in charts)
    assert sum("Fine-tuning loss with" in label for label in charts) == 2
    assert "(10 labelled images)" not in page.words()
    assert "in points of AP: " in page.words()


def test_only_a_pretraining_run(tmp_path: Path) -> None:
    make_ground_truth(tmp_path / "data", 6)
    run = make_pretraining(tmp_path / "my run", tmp_path / "data" / "images")
    page = Page(report(run, tmp_path / "r.html"))
    assert "No results yet" in page.words()
    assert f"headstart finetune '{run}' --train" in page.words()
    assert "Spread of the embeddings" in page.words()
    counts = [svg["aria-label"] or "" for svg in page.all("svg") if "Histogram" in (svg.get("aria-label") or "")]
    assert len(counts) == 3


def test_histograms_count_what_the_file_holds(tmp_path: Path) -> None:
    from headstart.proposals.store import ProposalStore

    make_ground_truth(tmp_path / "data", 6)
    run = make_pretraining(tmp_path / "run", tmp_path / "data" / "images")
    store = ProposalStore.open(run / "proposals.parquet")
    counts = [len(store.boxes(i)) for i in range(len(store))]
    sides = np.concatenate([store.boxes(i)[:, 2:] - store.boxes(i)[:, :2] for i in range(len(store))])
    sizes = np.sqrt(sides[:, 0] * sides[:, 1] / (200 * 150))
    labels = {svg.get("aria-label") for svg in Page(report(run, tmp_path / "r.html")).all("svg")}
    assert f"Histogram of boxes an image; median {np.median(counts):.3g}." in labels
    assert f"Histogram of relative box size; median {np.median(sizes):.3g}." in labels
    ratios = np.clip(sides[:, 0] / sides[:, 1], 1 / 4, 4)
    assert f"Histogram of width by height; median {np.median(ratios):.3g}." in labels


def test_proposals_of_a_comparison_that_was_moved(tmp_path: Path) -> None:
    make_ground_truth(tmp_path / "data", 4)
    run = make_pretraining(tmp_path / "moved" / "runs" / "soco", tmp_path / "data" / "images")
    (run / "log.jsonl").unlink()
    (run / "proposals.parquet").rename(tmp_path / "moved" / "boxes-1.parquet")
    record = json.loads((run / "run.json").read_text())
    record["data"]["proposals"] = "/before/boxes-1.parquet"
    (run / "run.json").write_text(json.dumps(record))
    text = Page(report(run, tmp_path / "r.html", images=0)).words()
    assert "headstart propose" not in text
    assert str(tmp_path / "moved" / "boxes-1.parquet") in text


def test_proposals_are_asked_for_only_where_they_were_used(tmp_path: Path) -> None:
    make_ground_truth(tmp_path / "data", 4)
    run = make_pretraining(tmp_path / "run", tmp_path / "data" / "images", proposals=False)
    (run / "log.jsonl").unlink()
    record = json.loads((run / "run.json").read_text())
    for proposals, said in ((None, ""), ("on-the-fly", "made while training"), ("gone.parquet", "file is not there")):
        record["data"]["proposals"] = proposals
        (run / "run.json").write_text(json.dumps(record))
        text = Page(report(run, tmp_path / "r.html")).words()
        assert ("headstart propose" in text) == bool(said)
        assert said in text


def test_missing_parts_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    truth = make_ground_truth(tmp_path / "data", 6)
    pretrained = make_pretraining(tmp_path / "soco", tmp_path / "data" / "images", proposals=False)
    source = {"method": "soco", "source": str(pretrained), "pretrain_steps": 600}
    unscored = make_finetuning(tmp_path / "un scored", truth, evaluated=False, **source)
    killed = make_finetuning(tmp_path / "killed", truth, evaluated=False, seed=1, **source)
    record = json.loads((killed / "run.json").read_text())
    del record["summary"]
    (killed / "run.json").write_text(json.dumps(record | {"status": "running"}))
    with open(killed / "log.jsonl", "a") as log:
        log.write('{"step": 310, "lo')  # killed while writing
    (killed / "eval.json").write_text("{broken")

    text = Page(report([pretrained, unscored, killed], tmp_path / "r.html")).words()
    assert "un scored has no evaluation yet" in text
    assert f"headstart evaluate '{unscored}' {truth}" in text
    assert "killed is still running or was killed after step 300" in text
    assert re.search(r"headstart finetune .*killed --resume", text)
    assert "eval.json: not JSON" in text
    assert "1 unreadable line" in text
    assert "No run from scratch was given" in text
    assert "proposals file is not there" in text
    assert "headstart propose" in text


def test_a_run_whose_pretraining_is_not_given(study: list[Path], tmp_path: Path) -> None:
    tuned = [run for run in study if run.name.startswith("tuned")]
    text = Page(report(tuned, tmp_path / "r.html", images=1)).words()
    assert f"The pretraining run {study[0]} is not part of this report" in text


def test_lost_photos_and_detections_leave_the_numbers(tmp_path: Path) -> None:
    truth = make_ground_truth(tmp_path / "data", 6)
    runs = [make_finetuning(tmp_path / f"run{i}", truth, seed=i) for i in range(2)]
    (runs[0] / "detections.json").unlink()
    text = Page(report(runs, tmp_path / "a.html")).words()
    assert "kept no detections" in text
    shutil.rmtree(tmp_path / "data")
    text = Page(report(runs, tmp_path / "b.html")).words()
    assert "the ground truth can't be read" in text
    assert "only 1 seed" not in text
    values = [json.loads((r / "eval.json").read_text())["metrics"]["bbox"]["AP"] for r in runs]
    assert f"{100 * np.mean(values):.1f}" in text


def test_undefined_metrics_and_minus_one_are_no_numbers(tmp_path: Path) -> None:
    truth = make_ground_truth(tmp_path / "data", 4)
    run = make_finetuning(tmp_path / "run", truth)
    scores = json.loads((run / "eval.json").read_text())
    scores["metrics"]["bbox"] |= {"AP": -1, "AP50": None, "AP75": 0.25}
    (run / "eval.json").write_text(json.dumps(scores))
    page = Page(report(run, tmp_path / "r.html", images=1))
    assert not re.search(r"(?<![\w/])-100", page.words())  # which a path may hold
    assert "25.0" in page.words()


def test_two_data_sets_are_never_mixed(tmp_path: Path) -> None:
    truth = make_ground_truth(tmp_path / "data", 6)
    other = make_ground_truth(tmp_path / "other", 9)
    run = make_finetuning(tmp_path / "run", truth)
    scores = json.loads((run / "eval.json").read_text())
    (run / "eval_other.json").write_text(json.dumps(scores | {"data": str(other), "images": 9}))
    page = Page(report(run, tmp_path / "r.html", images=1))
    assert f"Results on {truth}" in page.words()
    assert f"Results on {other}" in page.words()


def test_a_loss_that_was_not_finite_leaves_a_curve(tmp_path: Path) -> None:
    truth = make_ground_truth(tmp_path / "data", 4)
    run = make_finetuning(tmp_path / "run", truth, evaluated=False)
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 310, "loss": NaN}\n')
    page = Page(report(run, tmp_path / "r.html"))
    (label,) = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("class") == "figure"]
    assert re.search(r"Last values: scratch \d\.\d+$", label)
    assert "NaN" not in page.source


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text('{"kind": "bake"}')
    for name, message in {
        "photos": "not a run folder",
        "missing": "no such folder",
        "file": "is a file",
        "broken": "not JSON",
        "odd": "'bake'; expected",
    }.items():
        with pytest.raises(RunError, match=message):
            report([tmp_path / name], tmp_path / "r.html")
    with pytest.raises(RunError, match="no run folder given"):
        report([], tmp_path / "r.html")
    with pytest.raises(RunError, match="is a folder"):
        report([tmp_path / "odd"], tmp_path)
    assert not (tmp_path / "r.html").exists()


def test_a_run_given_twice_counts_once(study: list[Path], tmp_path: Path) -> None:
    again = [study[1], study[1].parent / ".." / study[1].parent.name / study[1].name]
    assert "1 run " in Page(report(again, tmp_path / "r.html", images=0)).words()


def test_the_verb_can_be_called_whatever_was_imported(study: list[Path], tmp_path: Path) -> None:
    import headstart

    for name in ("a.html", "b.html"):  # the second time, headstart.report is the package
        assert headstart.report(study[1], tmp_path / name, images=0) == tmp_path / name


# -- parts ------------------------------------------------------------------------------------------------


def test_moving_mean_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=37)
    values[[3, 4, 5, 20]] = np.nan
    for window in (1, 3, 7):
        half = window // 2
        expected = []
        for i in range(37):
            near = values[max(0, i - half) : i + half + 1]
            expected.append(near[np.isfinite(near)].mean() if np.isfinite(near).any() else np.nan)
        np.testing.assert_allclose(figures.moving_mean(values, window), expected, atol=1e-12)


def test_bands_over_runs_of_unequal_length() -> None:
    values = np.array([[3.0, 2.0, np.nan, np.nan], [5.0, 2.0, 1.0, np.nan]])
    steps, mean, low, high = figures.smooth_band(np.array([1.0, 2.0, 3.0, 4.0]), values)
    assert steps.tolist() == [1, 2, 3]
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([4, 2, 1], [3, 2, 1], [5, 2, 1])


def test_every_way_of_starting_looks_different() -> None:
    looks = [figures.Look(i, i) for i in range(14)]
    assert len({(look.color, look.marker) for look in looks}) == 14
    assert len({look.marker for look in looks[:7]}) == len({look.color for look in looks[:7]}) == 7


def test_labels_stay_in_the_picture_and_off_each_other() -> None:
    thumb = pictures.Thumbnail("photo0", "data:", 200, 150, 0.5)
    boxes = np.array([[10, 10, 90, 90], [12, 12, 90, 90], [380, 2, 399, 30], [0, 0, 400, 300]], np.float64)
    names = ["platelet 0.91", "platelet 0.72", "long name 0.55", "whole 0.30"]
    drawn = pictures.marks(thumb, boxes, [pictures.class_style(k) for k in (1, 2, 9, 4)], names)
    assert (drawn[0].x, drawn[0].y, drawn[0].width, drawn[0].height) == (5, 5, 40, 40)
    places = [(m.text_x, m.text_y, m.text_x + 6.2 * len(m.label)) for m in drawn]
    assert all(x >= 0 and right <= 200 and 8 <= y <= 150 for x, y, right in places)
    for i, (x, y, right) in enumerate(places):
        for other_x, other_y, other_right in places[:i]:
            assert right < other_x or other_right < x or abs(y - other_y) >= 10
    assert len({pictures.class_style(k) for k in range(1, 33)}) == 32


def test_photos_are_spread_evenly() -> None:
    assert pictures.evenly_spaced(3, 12) == [0, 1, 2]
    assert pictures.evenly_spaced(100, 4) == [12, 37, 62, 87]
    assert pictures.evenly_spaced(10, 0) == []
