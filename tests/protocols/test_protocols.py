from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import layouts
import pytest
from typer.testing import CliRunner

import headstart
from headstart import protocols, recipes
from headstart.cli import app
from headstart.datasets.detection import DetectionData, load_detection_data
from headstart.datasets.splits import Split, choose_labelled, choose_shots, divide
from headstart.datasets.voc import CLASSES
from headstart.errors import DataError, SettingsError
from headstart.protocols import PROTOCOLS
from headstart.verbs.evaluate import Metric, usual_metric

SETS: dict[str, Callable[[Path], Path]] = {
    "coco": layouts.coco,
    "VOCdevkit": layouts.voc,
    "fsod": layouts.fsod,
    "SSLAD-2D": layouts.soda10m,
    "ILSVRC2012": layouts.imagenet,
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets side by side. Tests that change one copy it."""
    folder = tmp_path_factory.mktemp("archive")
    for name, make in SETS.items():
        make(folder / name)
    layouts.lvis(folder / "coco")
    return folder


def copied(archive: Path, name: str, to: Path) -> Path:
    shutil.copytree(archive / name, to / name)
    return to / name


# ---- specs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_specs_are_whole(protocol: protocols.Protocol) -> None:
    assert PROTOCOLS[protocol.name] is protocol
    assert protocol.recipes
    for recipe in protocol.recipes:
        assert recipes.read(recipe, protocol.verb)
    assert bool(protocol.data.val) == (protocol.keep is None)
    assert set(protocol.novel) <= set(CLASSES)
    assert protocol.metrics.keys() <= {*get_args(Metric), *(["accuracy"] if protocol.verb == "linear" else [])}
    assert protocol.name in protocol.text()


def test_novel_classes_are_five_a_split() -> None:
    novel = [PROTOCOLS[f"voc_split{k}"].novel for k in (1, 2, 3)]
    assert [len(set(classes)) for classes in novel] == [5, 5, 5]
    assert set(novel[0]) & set(novel[1]) & set(novel[2]) == {"sofa"}


def test_unknown_protocol() -> None:
    with pytest.raises(SettingsError, match=r"protocol minicoco1: no such protocol; did you mean minicoco_1"):
        protocols.find("minicoco1")


# ---- check ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_miniatures_are_complete_and_not_official(archive: Path, name: str) -> None:
    folder = PROTOCOLS[name].data.folder
    for root in (archive, archive / folder):
        done = protocols.check(name, root)
        assert done.root == archive / folder
        assert done.complete, done.findings
        assert not done.official
    differing = [f for f in done.findings if f.state == "differs"]
    assert all("officially" in f.text for f in differing)


def test_numbers_of_the_official_release_are_ok(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    data = PROTOCOLS["soda10m"].data
    boxes = [len(json.loads((archive / data.folder / f.file).read_text())["annotations"]) for f in data.files]
    own = replace(
        data,
        train=(replace(data.train[0], count=8, boxes=boxes[0]),),
        val=(replace(data.val[0], count=8, boxes=boxes[1]),),
    )
    monkeypatch.setitem(PROTOCOLS, "soda10m", replace(PROTOCOLS["soda10m"], data=own))
    assert protocols.check("soda10m", archive).official
    voc = PROTOCOLS["voc0712"].data
    loaded = load_detection_data(archive / "VOCdevkit" / voc.val[0].file)
    own = replace(
        voc,
        train=tuple(replace(f, count=20, boxes=None) for f in voc.train),
        val=(replace(voc.val[0], count=6, boxes=sum(loaded.class_counts().values())),),
    )
    monkeypatch.setitem(PROTOCOLS, "voc0712", replace(PROTOCOLS["voc0712"], data=own))
    assert protocols.check("voc0712", archive).official


@pytest.mark.parametrize(
    ("name", "folder", "lost", "path", "text"),
    [
        (
            "coco",
            "coco",
            "annotations/instances_val2017.json",
            "annotations/instances_val2017.json",
            "no such file; exp",
        ),
        ("coco", "coco", "val2017", "val2017/", "5 of 5 images are not there: 000000100009.jpg"),
        ("coco", "coco", "train2017/000000000012.jpg", "train2017/", "1 of 40 images are not there: 000000000012.jpg"),
        (
            "lvis",
            "coco",
            "annotations/lvis_v1_train.json",
            "annotations/lvis_v1_train.json",
            "no such file; expected 100170",
        ),
        ("lvis", "coco", "train2017/000000000009.jpg", "./", "1 of 6 images are not there: train2017/000000000009.jpg"),
        ("fsod_test", "fsod", "images/part_2", "images/", "30 of 60 images are not there: part_2/n00/00000001.jpg"),
        ("soda10m", "SSLAD-2D", "labeled/val", "labeled/val/", "8 of 8 images are not there: HT_VAL_000001_SH_001.jpg"),
        (
            "voc0712",
            "VOCdevkit",
            "VOC2012",
            "VOC2012/ImageSets/Main/trainval.txt",
            "no such file; expected the names of 11540",
        ),
        (
            "voc0712",
            "VOCdevkit",
            "VOC2007/ImageSets/Main/test.txt",
            "VOC2007/ImageSets/Main/test.txt",
            "no such file; exp",
        ),
        (
            "voc_split1",
            "VOCdevkit",
            "VOC2007/Annotations/000005.xml",
            "VOC2007/Annotations/",
            "1 of 20 annotation files are",
        ),
        (
            "imagenet_linear",
            "ILSVRC2012",
            "train",
            "train/",
            "no such folder; expected 1281167 images, 1000 classes, a",
        ),
        ("imagenet_linear", "ILSVRC2012", "ILSVRC2012_devkit_t12", "val/", "can't be used: "),
        ("imagenet_linear", "ILSVRC2012", "ILSVRC2012_devkit_t12/data/meta.mat", "val/", "can't be used: "),
        (
            "minivoc_5",
            "VOCdevkit",
            "VOC2007/JPEGImages/001000.jpg",
            "VOC2007/JPEGImages/",
            "1 of 6 images are not there",
        ),
    ],
)
def test_what_is_missing_is_said(
    archive: Path, tmp_path: Path, name: str, folder: str, lost: str, path: str, text: str
) -> None:
    gone = copied(archive, folder, tmp_path) / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    done = protocols.check(name, tmp_path)
    missing = [f for f in done.findings if f.state == "missing"]
    assert [f.path for f in missing] == [path]
    assert missing[0].text.startswith(text)
    with pytest.raises(DataError, match=rf"headstart protocol check {name} --root .* says what else"):
        protocols.split(name, tmp_path, tmp_path / "out", shots=1 if name.startswith("voc_split") else None)
    assert not (tmp_path / "out").exists()


def test_files_that_are_something_else(archive: Path, tmp_path: Path) -> None:
    root = copied(archive, "SSLAD-2D", tmp_path)
    (root / "labeled" / "annotations" / "instance_train.json").write_text("{")
    (root / "labeled" / "annotations" / "instance_val.json").write_text('{"images": []}')
    texts = [f.text for f in protocols.check("soda10m", root).findings]
    assert "not JSON" in texts[0]
    assert texts[1].startswith("is something else; expected a COCO object")
    root = copied(archive, "VOCdevkit", tmp_path)
    (root / "VOC2007" / "Annotations" / "000006.xml").write_text("<annotation>")
    done = protocols.check("voc0712", root)
    assert [f.text for f in done.findings if f.state == "missing"] == ["1 files are not XML: 000006.xml"]
    with pytest.raises(
        DataError, match=r"nowhere: no such folder; expected the folder of COCO 2017, coco/, from https"
    ):
        protocols.check("coco", tmp_path / "nowhere")


def test_lvis_beside_the_images(archive: Path, tmp_path: Path) -> None:
    root = copied(archive, "coco", tmp_path)
    for file in (root / "annotations").glob("lvis_*"):
        file.rename(root / file.name)
    done = protocols.split("lvis", root, tmp_path / "out")
    assert len(load_detection_data(done.train)) == 6


# ---- split ---------------------------------------------------------------------------------------------------


def both(done: protocols.Splits) -> tuple[DetectionData, DetectionData]:
    return load_detection_data(done.train), load_detection_data(done.val)


def ids(data: DetectionData) -> list[int | str]:
    return [image.id for image in data.images]


@pytest.mark.parametrize(
    ("name", "train", "val"),
    [
        ("coco", 40, 5),
        ("minicoco_1", 1, 5),
        ("minicoco_5", 2, 5),
        ("minicoco_10", 4, 5),
        ("minicoco_50", 20, 5),
        ("voc0712", 40, 6),
        ("minivoc_5", 2, 6),
        ("minivoc_10", 4, 6),
        ("lvis", 6, 5),
        ("fsod_test", 48, 12),
        ("fsod_train", 48, 12),
        ("soda10m", 8, 8),
    ],
)
def test_splits_are_data_sets(archive: Path, tmp_path: Path, name: str, train: int, val: int) -> None:
    done = protocols.split(name, archive, tmp_path / "out", seed=2)
    ours, theirs = both(done)
    assert (len(ours), len(theirs)) == (train, val) == (done.train_part.images, done.val_part.images)
    assert sum(ours.class_counts().values()) == done.train_part.boxes
    assert [c.name for c in ours.categories] == [c.name for c in theirs.categories]
    assert all(image.path.is_file() for data in (ours, theirs) for image in data.images)
    assert len(done.commands()) == len(PROTOCOLS[name].recipes) + len(PROTOCOLS[name].metrics)
    assert usual_metric(theirs) in PROTOCOLS[name].metrics


def test_mini_coco_is_what_labels_draws(archive: Path, tmp_path: Path) -> None:
    data = load_detection_data(archive / "coco" / "annotations" / "instances_train2017.json")
    for seed in (0, 1):
        done = protocols.split("minicoco_10", archive, tmp_path / str(seed), seed=seed)
        assert ids(both(done)[0]) == choose_labelled(data, "10%", seed).ids
        assert choose_labelled(data, done.train).ids == ids(both(done)[0])  # --labels FILE
    assert (tmp_path / "0" / "val.json").read_text() != (tmp_path / "0" / "train.json").read_text()


def test_files_are_the_same_wherever_the_data_are(archive: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        layouts.voc(tmp_path / place / "VOCdevkit")
        protocols.split("voc_split2", tmp_path / place, tmp_path / place / "splits", shots=2, seed=4)
    for part in ("train", "val"):
        assert (tmp_path / "a/splits" / f"{part}.json").read_bytes() == (
            tmp_path / "b/splits" / f"{part}.json"
        ).read_bytes()
    content = json.loads((tmp_path / "a" / "splits" / "train.json").read_text())
    assert content["novel"] == ["aeroplane", "bottle", "cow", "horse", "sofa"]
    assert content["root"] == "../VOCdevkit"
    # A literal, so that a change of the rule, of Python or of the platform shows: such splits are cited.
    assert content["sha256"] == "44866c602f30a444961d5e505f276d466ba8ab4eb4f2350a4a18af6632e948f2"


def test_voc_is_of_both_years(archive: Path, tmp_path: Path) -> None:
    train, val = both(protocols.split("voc0712", archive, tmp_path))
    assert {str(image.id)[:3] for image in train.images} == {"000", "200"}
    assert {image.path.parent.parent.name for image in val.images} == {"VOC2007"}
    assert [c.name for c in train.categories] == list(CLASSES)
    person = next(a.boxes for a in train.annotations[20:] if CLASSES.index("person") + 1 in a.labels)
    assert len(person)  # a person with parts is one object
    assert sum(int(a.iscrowd.sum()) for a in train.annotations) == 40  # the difficult ones


@pytest.mark.parametrize("shots", [1, 3])
def test_few_shot_is_boxes(archive: Path, tmp_path: Path, shots: int) -> None:
    done = protocols.split("voc_split1", archive, tmp_path / "shots", shots=shots, seed=1)
    train, val = both(done)
    assert set(train.class_counts().values()) == {shots}
    assert sum(len(a) for a in train.annotations) == 20 * shots == done.train_part.boxes
    assert len(val) == 6
    everything = load_detection_data(protocols.split("voc0712", archive, tmp_path / "all").train)
    expected = choose_shots(everything, shots, 1)
    assert ids(train) == expected.ids
    assert all(a.ids.tolist() == expected.objects[i] for i, a in zip(ids(train), train.annotations, strict=True))
    # The same as a label budget, or as a file of it, of the whole training set.
    assert choose_labelled(everything, f"{shots}shot", 1) == expected
    assert choose_labelled(everything, done.train) == expected


def test_fsod_divides_every_class(archive: Path, tmp_path: Path) -> None:
    data = load_detection_data(archive / "fsod" / "annotations" / "fsod_test.json")
    train, val = both(protocols.split("fsod_test", archive, tmp_path, seed=3))
    assert [Split(ids(train)), Split(ids(val))] == list(divide(data, 0.8, 3))
    assert sorted(ids(train) + ids(val)) == sorted(ids(data))
    assert all(count for part in (train, val) for count in part.class_counts().values())


def test_lvis_keeps_what_was_looked_for(archive: Path, tmp_path: Path) -> None:
    _, val = both(protocols.split("lvis", archive, tmp_path))
    assert val.is_federated
    assert {image.path.parent.name for image in val.images} == {"train2017", "val2017"}
    assert all(a.negative.tolist() == [1, 3] and a.not_exhaustive.tolist() == [2] for a in val.annotations)


def test_settings_that_do_not_fit(archive: Path, tmp_path: Path) -> None:
    for name, given, message in (
        ("voc_split1", {}, r"voc_split1: needs the number of boxes of each class \(--shots\)"),
        ("coco", {"shots": 3}, r"protocol coco: has no use for --shots"),
        ("coco", {"val_ids": "x"}, r"--val-ids: goes with --ids"),
        ("fsod_test", {"val_ids": "x"}, r"--val-ids: goes with --ids"),
    ):
        with pytest.raises(SettingsError, match=message):
            protocols.split(name, archive, tmp_path, **given)
    with pytest.raises(DataError, match=r"has fewer than 50 boxes of aeroplane"):
        protocols.split("voc_split1", archive, tmp_path, shots=50)


def evaluation(path: Path, novel: float, base: float | None) -> Path:
    by_class = {name: {"AP": 0.1, "AP50": novel if name in PROTOCOLS["voc_split1"].novel else base} for name in CLASSES}
    path.write_text(json.dumps({"metric": "voc07", "per_class": {"bbox": by_class}}))
    return path


def test_novel_classes_apart(tmp_path: Path) -> None:
    files = [evaluation(tmp_path / "a.json", 0.2, 0.6), evaluation(tmp_path / "b.json", 0.4, 0.6)]
    first, second = protocols.score("voc_split1", files)
    assert (first.novel, first.base, first.all) == pytest.approx((0.2, 0.6, 0.5))
    assert second.novel == pytest.approx(0.4)
    nothing = protocols.score("voc_split1", [evaluation(tmp_path / "c.json", 0.2, None)])[0]
    assert (nothing.base, nothing.all) == (None, pytest.approx(0.2))
    split2 = protocols.score("voc_split2", files)[0]  # cow and sofa are novel in both
    assert split2.novel == pytest.approx((0.2 * 2 + 0.6 * 3) / 5)
    printed = CliRunner().invoke(app, ["protocol", "score", "voc_split1", *map(str, files)]).output
    assert "30.0 ± 14.1" in printed
    with pytest.raises(SettingsError, match="protocol coco: has no novel classes"):
        protocols.score("coco", files)
    (tmp_path / "d.json").write_text('{"metric": "voc07", "per_class": {"bbox": {"dog": {"AP50": 1}}}}')
    with pytest.raises(DataError, match=r"d\.json: has no class bird, bus, cow, motorbike, sofa; expected"):
        protocols.score("voc_split1", [tmp_path / "d.json"])
    (tmp_path / "d.json").write_text('{"bbox": {}}')
    with pytest.raises(DataError, match=r'd\.json: has no "metric" or AP50 by class'):
        protocols.score("voc_split1", [tmp_path / "d.json"])


def test_shots_are_trained_on_and_scored(archive: Path, tmp_path: Path, tiny: dict) -> None:
    done = protocols.split("voc_split1", archive, tmp_path / "shots", shots=1)
    tuned = headstart.finetune(
        "scratch",
        done.train,
        done.val,
        detector="faster_rcnn",
        out=tmp_path / "run",
        max_steps=1,
        batch_size=2,
        settings={f"detector.{k}": v for k, v in tiny.items()} | {"train.workers": 0},
        show=False,
    )
    labels = json.loads((tuned.path / "labels.json").read_text())
    assert {image["id"] for image in labels["images"]} == set(ids(load_detection_data(done.train)))
    groups = protocols.score("voc_split1", [tuned.path / "eval.json"])[0]
    assert groups.metric == "voc07"
    assert groups.all is not None


def test_imagenet_is_trained_on_as_it_is(archive: Path, tmp_path: Path) -> None:
    """Nothing is drawn or written; the command that is printed runs, and its evaluation is scored."""
    done = protocols.split("imagenet_linear", archive, tmp_path / "out")
    assert (done.train, done.val) == (archive / "ILSVRC2012" / "train", archive / "ILSVRC2012" / "val")
    assert (done.train_part.images, done.val_part.images, done.train_part.boxes) == (12, 7, None)
    assert not (tmp_path / "out").exists()
    layouts.imagenet(tmp_path / "ILSVRC2012", flat=False)
    assert protocols.split("imagenet_linear", tmp_path).val_part.sha256 == done.val_part.sha256
    train, score = done.commands()
    assert train.startswith("headstart linear START --recipe soco_table11_linear --train ")
    assert score == "headstart protocol score imagenet_linear RUN/eval.json"
    small = {"backbone.name": "resnet18", "view_px": 32, "resize_px": 32, "workers": 0, "batch_size": 4, "max_steps": 1}
    sets = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    words = [*shlex.split(train)[1:], "--out", str(tmp_path / "run"), *sets]
    ran = CliRunner().invoke(app, ["scratch" if word == "START" else word for word in words])
    assert ran.exit_code == 0, ran.output
    scored = protocols.score("imagenet_linear", [tmp_path / "run" / "eval.json"])[0]
    assert scored.top1 == json.loads((tmp_path / "run" / "eval.json").read_text())["metrics"]["accuracy"]["top1"]
    printed = (
        CliRunner().invoke(app, ["protocol", "score", "imagenet_linear", str(tmp_path / "run" / "eval.json")]).output
    )
    assert "imagenet_linear, accuracy in %" in printed
    assert f"{100 * scored.top1:.1f}" in printed
    (tmp_path / "other.json").write_text('{"metric": "coco", "metrics": {"bbox": {}}}')
    with pytest.raises(
        DataError, match=r"other\.json: has no top-1 and top-5 accuracy; expected what headstart linear"
    ):
        protocols.score("imagenet_linear", [tmp_path / "other.json"])
    with pytest.raises(SettingsError, match=r"imagenet_linear: has no use for --ids"):
        protocols.split("imagenet_linear", archive, ids="x.txt")
    printed = CliRunner().invoke(app, ["protocol", "split", "imagenet_linear", "--root", str(archive)]).output
    assert "headstart linear START" in printed


def test_command_line(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    listed = run(app, ["protocol", "list"])
    assert all(name in listed.output for name in PROTOCOLS)
    assert "proseco_table1_fsod_train" in run(app, ["protocol", "list", "fsod_train"]).output
    good = run(app, ["protocol", "check", "coco", "--root", str(archive)])
    assert good.exit_code == 0
    assert "not the official release" in good.output
    bad = run(app, ["protocol", "check", "coco", "--root", str(archive / "fsod")])
    assert bad.exit_code == 1
    assert "annotations/instances_train2017.json  118287 images, 860001 boxes, 80 classes" in bad.output
    monkeypatch.chdir(tmp_path)
    done = run(app, ["protocol", "split", "voc_split3", "--root", str(archive), "--shots", "2", "--seed", "5"])
    assert done.exit_code == 0, done.output
    assert Path("splits/voc_split3-2shot-seed5/train.json").is_file()
    assert "headstart finetune START --recipe adept_table2_joint --train splits/voc_split3-2shot-seed5" in done.output
    run(app, ["protocol", "split", "voc0712", "--root", str(archive)])
    assert Path("splits/voc0712/val.json").is_file()
