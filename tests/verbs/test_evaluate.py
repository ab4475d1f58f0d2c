from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import headstart
from headstart import cli, tide
from headstart.coco_eval import LVIS_METRICS, METRICS
from headstart.datasets.detection import DetectionData, load_detection_data
from headstart.datasets.voc import CLASSES
from headstart.errors import DataError, SettingsError
from headstart.proposals.store import Row, schema_for, table_of, write_rows
from headstart.verbs.evaluate import assess, in_order_of, usual_metric, write_evaluation


def voc_data(root: Path, year: str, names: tuple[str, ...] = CLASSES) -> Path:
    """A development kit with one image for each class; its list of images is returned."""
    base = root / "VOCdevkit" / year
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    stems = [f"{k:06d}" for k in range(len(names))]
    for stem, name in zip(stems, names, strict=True):
        Image.new("RGB", (40, 30)).save(base / "JPEGImages" / f"{stem}.jpg")
        box = "<xmin>5</xmin><ymin>6</ymin><xmax>24</xmax><ymax>25</ymax>"
        (base / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>40</width><height>30</height></size>"
            f"<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
        )
    (base / "ImageSets" / "Main" / "test.txt").write_text("\n".join(stems))
    return base / "ImageSets" / "Main" / "test.txt"


def perfect(data: DetectionData) -> list[dict[str, Any]]:
    return [{**a, "score": 0.5} for a in data.to_coco()["annotations"]]


def federated(folder: Path, source: Path) -> Path:
    content = json.loads(source.read_text())
    for image in content["images"]:
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [], []
    for category in content["categories"]:
        category["frequency"] = "f"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lvis.json").write_text(json.dumps(content))
    return folder / "lvis.json"


def test_data_are_evaluated_as_they_usually_are(scenes: Path, tmp_path: Path) -> None:
    images = load_detection_data(scenes / "val.json").images[0].path.parent
    assert usual_metric(load_detection_data(scenes / "val.json")) == "coco"
    assert usual_metric(load_detection_data(federated(tmp_path, scenes / "val.json"), images)) == "lvis"
    assert usual_metric(load_detection_data(voc_data(tmp_path, "VOC2007"))) == "voc07"
    assert usual_metric(load_detection_data(voc_data(tmp_path, "VOC2012"))) == "voc"
    assert usual_metric(load_detection_data(voc_data(tmp_path / "own", "VOC2007", ("cat", "cell")))) == "coco"


def test_every_metric_of_perfect_detections_is_one(scenes: Path, tmp_path: Path) -> None:
    images = load_detection_data(scenes / "val.json").images[0].path.parent
    data = load_detection_data(federated(tmp_path, scenes / "val.json"), images)
    for metric, names in {
        "coco": METRICS,
        "lvis": LVIS_METRICS,
        "voc": ("AP", "AP50", "AP75"),
        "voc07": ("AP", "AP50", "AP75"),
    }.items():
        evaluation = assess(data, perfect(data), metric)
        write_evaluation(evaluation, tmp_path / "eval.json")
        written = json.loads((tmp_path / "eval.json").read_text())
        assert (written["metric"], tuple(written["metrics"]["bbox"])) == (metric, names)
        assert written["metrics"]["bbox"]["AP"] == pytest.approx(1)
        assert list(written["errors"]["bbox"]["dAP"]) == [*tide.MAIN, *tide.SPECIAL]
        assert sum(written["errors"]["bbox"]["counts"].values()) == 0
        console = Console(width=120, file=io.StringIO())
        console.print(*evaluation.tables())
        assert "FalseNeg" in console.file.getvalue()  # type: ignore[attr-defined]
    proposals = assess(data, perfect(data), "proposals")
    assert (proposals.metrics["bbox"]["AR1000"], proposals.errors) == (pytest.approx(1), {})


def test_what_a_detector_knows_besides_counts_for_nothing_in_lvis_data(scenes: Path, tmp_path: Path) -> None:
    images = load_detection_data(scenes / "val.json").images[0].path.parent
    data = load_detection_data(federated(tmp_path, scenes / "val.json"), images)
    more = in_order_of(data, ["ghost", *(category.name for category in data.categories)])
    ghosts = [{**d, "category_id": more.categories[0].id, "score": 0.9} for d in perfect(data)]
    assert assess(more, [*ghosts, *perfect(data)], "lvis").metrics == assess(data, perfect(data), "lvis").metrics


def boxes_file(path: Path, data: DetectionData, scores: bool = False, **change: Any) -> Path:
    """All objects, after four boxes that are none; with scores that call the objects surer."""
    rows, levels = [], []
    for image, of in zip(data.images, data.annotations, strict=True):
        none = np.array([[0, 0, 2 + k, 2] for k in range(4)], np.float32)
        rows.append(Row(image.file_name, 1, image.width, image.height, np.concatenate([none, of.boxes])))
        levels.append([0.1] * 4 + [0.9] * len(of.boxes))
    for key, value in change.items():
        setattr(rows[0], key, value)
    schema = schema_for({"settings": {"engine": "opencv"}, "engine": "opencv"})
    table = table_of(rows, schema)
    if scores:
        schema = schema.append(pa.field("scores", pa.list_(pa.float32())))
        table = pa.table([*table.columns, pa.array(levels, schema.field("scores").type)], schema=schema)
    write_rows(path, iter([table]), schema)
    return path


def test_boxes_without_classes(scenes: Path, tmp_path: Path) -> None:
    data = load_detection_data(scenes / "val.json")
    plain = headstart.evaluate(boxes_file(tmp_path / "a.parquet", data), scenes / "val.json").metrics["bbox"]
    assert plain["AR1000"] == pytest.approx(1)
    assert plain["AR1"] < 0.5
    sure = headstart.evaluate(boxes_file(tmp_path / "b.parquet", data, scores=True), data).metrics["bbox"]
    assert sure["AP"] == pytest.approx(1)
    assert sure["AR1"] > plain["AR1"]


def test_boxes_of_other_photos(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_detection_data(scenes / "val.json")
    file = tmp_path / "boxes.parquet"
    headstart.evaluate(boxes_file(file, data, image="elsewhere.jpg"), data)
    assert f"no boxes of 1 labelled images, which count as missed: {data.images[0].file_name}" in "".join(
        capsys.readouterr().err.split("\n")
    )
    with pytest.raises(DataError, match=r"is 7 x .* expected the same image"):
        headstart.evaluate(boxes_file(file, data, width=7), data)
    with pytest.raises(DataError, match=r"holds none of the images of .*val.json"):
        headstart.evaluate(boxes_file(file, data.subset([data.images[0].id]), image="elsewhere.jpg"), data)
    moved = [Path(image.file_name).name for image in data.images]
    assert len(set(moved)) == len(moved)
    one = data.subset([data.images[0].id])
    by_name = headstart.evaluate(boxes_file(file, one, image=f"other/folder/{moved[0]}"), one)
    assert by_name.metrics["bbox"]["AR1000"] == pytest.approx(1)


def test_on_the_command_line(scenes: Path, tmp_path: Path) -> None:
    file = boxes_file(tmp_path / "boxes.parquet", load_detection_data(scenes / "val.json"))
    arguments = ["evaluate", str(file), str(scenes / "val.json"), "--out", str(tmp_path / "eval.json")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "AR1000" in done.output
    assert json.loads((tmp_path / "eval.json").read_text())["metric"] == "proposals"


@pytest.mark.parametrize(
    ("metric", "message"), [("voc", "have no classes"), ("map", "expected one of coco, lvis, voc")]
)
def test_metrics_that_cannot_be(metric: str, message: str, scenes: Path, tmp_path: Path) -> None:
    file = boxes_file(tmp_path / "boxes.parquet", load_detection_data(scenes / "val.json"))
    with pytest.raises(SettingsError, match=message):
        headstart.evaluate(file, scenes / "val.json", metric=metric)


def test_what_is_no_lvis_data_is_refused_before_anything_is_detected(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detected: list[Any] = []
    monkeypatch.setattr("headstart.detectors.wrap", lambda module: module)
    monkeypatch.setattr("headstart.verbs.evaluate.run_detector", lambda *given: detected.append(given))
    with pytest.raises(DataError, match=r'"neg_category_ids" None; .* as LVIS v1'):
        headstart.evaluate(torch.nn.Identity(), scenes / "val.json", metric="lvis")
    assert not detected
