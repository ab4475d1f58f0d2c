"""Lists as papers publish them, read as splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest

from headstart import protocols
from headstart.datasets.detection import DetectionData, load_detection_data
from headstart.datasets.splits import Split, choose_shots
from headstart.datasets.voc import CLASSES
from headstart.errors import DataError, SettingsError
from headstart.protocols.published import read_published


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    layouts.coco(folder / "coco", train=12)
    layouts.voc(folder / "VOCdevkit")
    layouts.fsod(folder / "fsod")
    return folder


@pytest.fixture(scope="module")
def coco(root: Path) -> DetectionData:
    return load_detection_data(root / "coco" / "annotations" / "instances_train2017.json")


@pytest.fixture(scope="module")
def voc(root: Path, tmp_path_factory: pytest.TempPathFactory) -> DetectionData:
    return load_detection_data(protocols.split("voc0712", root, tmp_path_factory.mktemp("voc")).train)


def ids_of(path: Path) -> list[int | str]:
    return [image.id for image in load_detection_data(path).images]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ids.json", "[15, 9]"),
        ("names.json", '["000000000015.jpg", "000000000009.jpg"]'),
        ("text.json", '["15", "9"]'),
        ("ids.txt", "15\n\n9\n"),
        ("names.txt", "000000000015.jpg\n000000000009.jpg\n"),
        ("paths.txt", "coco/train2017/000000000015.jpg 1\ncoco/train2017/000000000009.jpg 1\n"),
        ("stems.txt", "000000000015\n000000000009\n"),
        ("split.json", '{"images": [{"id": 15, "file_name": "000000000015.jpg"}, {"id": 9}]}'),
    ],
)
def test_lists_of_images(root: Path, tmp_path: Path, coco: DetectionData, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_published(tmp_path / name, coco) == Split([15, 9])
    done = protocols.split("minicoco_10", root, tmp_path / "out", ids=tmp_path / name)
    assert ids_of(done.train) == [15, 9]
    assert len(ids_of(done.val)) == 5
    content = json.loads(done.train.read_text())
    assert content["labels"] == f"from {name}"


def coco_file(root: Path, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads((root / "coco" / "annotations" / "instances_train2017.json").read_text())
    content["images"] = content["images"][2:5]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_coco_files(root: Path, tmp_path: Path, coco: DetectionData) -> None:
    whole = read_published(coco_file(root, tmp_path / "part.json", lambda c: None), coco)
    assert whole == Split([15, 18, 21])
    of = {
        i: next(a.ids.tolist() for a, m in zip(coco.annotations, coco.images, strict=True) if m.id == i)
        for i in (15, 18)
    }
    fewer = [*of[15][1:]]

    def some(content: dict[str, Any]) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["id"] in fewer or a["image_id"] == 18]

    shots = read_published(coco_file(root, tmp_path / "shots.json", some), coco)
    assert shots.ids == [15, 18, 21]
    assert shots.objects == {15: fewer, 21: []}
    done = protocols.split("minicoco_1", root, tmp_path / "out", ids=tmp_path / "shots.json")
    assert [a.ids.tolist() for a in load_detection_data(done.train).annotations] == [fewer, of[18], []]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: [a.update(id=k + 1) for k, a in enumerate(c["annotations"])],
            r"part\.json: annotation 1 of image 0.*15\.jpg is not in .*; its ids are others than the data's",
        ),
        (
            lambda c: (c["annotations"].pop(0), c["annotations"][0].update(bbox=[20, 20, 1, 1])),
            r"is not in .*instances_train2017\.json with that id and box \[20, 20, 1, 1\]",
        ),
        (
            lambda c: [image.update(id=9 + 3 * k) for k, image in enumerate(c["images"])],
            r"part\.json: image 9 is 000000000015\.jpg, and in .* 000000000009\.jpg; it was made from other data",
        ),
        (lambda c: c["images"][0].update(id=4), r"part\.json: 1 of its 3 images are not in .*train2017\.json: 4"),
        (lambda c: c.update(images=3), r'part\.json: "images" or "annotations" is not a list'),
        (lambda c: c.update(images=[9, 15]), r'part\.json: "images" or "annotations" is not a list of objects'),
    ],
)
def test_coco_files_of_other_data(
    root: Path, tmp_path: Path, coco: DetectionData, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_published(coco_file(root, tmp_path / "part.json", change), coco)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ids.txt", "15\n4\n", r"ids\.txt: 1 of its 2 images are not in .*: 4"),
        ("ids.txt", "\n", r"ids\.txt: names no image; expected a split file, a COCO file"),
        ("ids.txt", "15\n000000000015.jpg", r"ids\.txt: names an image twice"),
        ("ids.json", "{}", r"ids\.json: has no list of images"),
        ("ids.json", "[", r"ids\.json: not JSON"),
        ("", "", r"holds no box_<K>shot_<class>_train\.txt"),
    ],
)
def test_lists_that_do_not_fit(tmp_path: Path, coco: DetectionData, name: str, text: str, message: str) -> None:
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_published(tmp_path / name, coco)
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; expected a split file"):
        read_published(tmp_path / "nowhere", coco)


def test_names_that_two_images_have_mean_neither(root: Path, tmp_path: Path) -> None:
    data = load_detection_data(root / "fsod" / "annotations" / "fsod_test.json")
    data.images[1] = type(data.images[1])(2, data.images[1].path, "part_2/other/00000001.jpg", 32, 24)
    (tmp_path / "ids.txt").write_text("part_2/n00/00000001.jpg\npart_2/other/00000001.jpg")
    assert read_published(tmp_path / "ids.txt", data).ids == [1, 2]
    (tmp_path / "ids.txt").write_text("00000001.jpg")
    with pytest.raises(DataError, match=r"1 of its 1 images are not in .*: 00000001\.jpg"):
        read_published(tmp_path / "ids.txt", data)


# ---- lists of shots ------------------------------------------------------------------------------------------


def shot_lists(folder: Path, data: DetectionData, shots: int) -> dict[str, list[str]]:
    """As Wang et al. have them: for each class, images with ``shots`` boxes of it, or more."""
    folder.mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[str]] = {}
    for label, name in enumerate(CLASSES, 1):
        chosen: list[str] = []
        boxes = 0
        for image, objects in zip(data.images, data.annotations, strict=True):
            mine = int(((objects.labels == label) & ~objects.iscrowd).sum())
            if mine and boxes < shots:
                chosen.append(str(image.id))
                boxes += mine
        lists[name] = chosen
        years = ["VOC2012" if "_" in stem else "VOC2007" for stem in chosen]
        lines = [f"datasets/{year}/JPEGImages/{stem}.jpg\n" for year, stem in zip(years, chosen, strict=True)]
        (folder / f"box_{shots}shot_{name}_train.txt").write_text("".join([*lines, lines[0]]))  # drawn twice
    return lists


def test_lists_of_shots(root: Path, tmp_path: Path, voc: DetectionData) -> None:
    lists = shot_lists(tmp_path / "seed1", voc, 2)
    split = read_published(tmp_path / "seed1", voc)
    chosen = split.of(voc)
    assert set(chosen.class_counts().values()) == {2}
    for label, name in enumerate(CLASSES, 1):
        having = [i.id for i, a in zip(chosen.images, chosen.annotations, strict=True) if label in a.labels]
        assert set(having) == set(lists[name])
    done = protocols.split("voc_split1", root, tmp_path / "out", ids=tmp_path / "seed1", shots=2)
    loaded = load_detection_data(done.train)
    kept = {image.id: a.ids.tolist() for image, a in zip(loaded.images, loaded.annotations, strict=True)}
    assert kept == {i: list(split.objects[i]) for i in split.ids}
    assert json.loads(done.train.read_text())["sha256"] == split.digest(voc)


def test_too_many_boxes_are_ranked_as_shots_are(tmp_path: Path, voc: DetectionData) -> None:
    shot_lists(tmp_path / "seed1", voc, 3)
    for file in (tmp_path / "seed1").iterdir():
        file.rename(file.with_name(file.name.replace("3shot", "1shot")))
    split = read_published(tmp_path / "seed1", voc, seed=6)
    assert set(split.of(voc).class_counts().values()) == {1}
    assert read_published(tmp_path / "seed1", voc, seed=7) != split
    everything = tmp_path / "everything"
    everything.mkdir()
    for name in CLASSES:
        label = CLASSES.index(name) + 1
        having = [str(i.id) for i, a in zip(voc.images, voc.annotations, strict=True) if label in a.labels[~a.iscrowd]]
        (everything / f"box_2shot_{name}_train.txt").write_text("\n".join(having))
    listed = read_published(everything, voc, seed=6)
    ours = choose_shots(voc, 2, 6)
    assert {i: list(listed.objects[i]) for i in listed.ids} == {i: list(ours.objects[i]) for i in ours.ids}


def test_folders_of_other_shots(tmp_path: Path, voc: DetectionData) -> None:
    folder = tmp_path / "lists"
    shot_lists(folder, voc, 1)
    with pytest.raises(SettingsError, match=r"lists: has lists of 1 shots, none of 5"):
        read_published(folder, voc, 5)
    shot_lists(folder, voc, 2)
    with pytest.raises(SettingsError, match=r"lists: has lists of 1, 2 shots; say which \(--shots\)"):
        read_published(folder, voc)
    (folder / "box_2shot_cow_train.txt").rename(folder / "box_2shot_yak_train.txt")
    with pytest.raises(DataError, match=r"of its lists of 2 shots there is none for cow; expected one for each class"):
        read_published(folder, voc, 2)
    (folder / "box_1shot_yak_train.txt").write_text("000005\n")
    with pytest.raises(DataError, match=r"there is one for yak, which .* has not"):
        read_published(folder, voc, 1)
    (folder / "box_1shot_yak_train.txt").unlink()
    without = next(str(i.id) for i, a in zip(voc.images, voc.annotations, strict=True) if 1 not in a.labels)
    (folder / "box_1shot_aeroplane_train.txt").write_text(f"{without}\n")
    with pytest.raises(DataError, match=r"its images have no aeroplane that is not difficult; expected 1"):
        read_published(folder, voc, 1)


# ---- two parts -----------------------------------------------------------------------------------------------


def test_published_parts(root: Path, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n".join(str(k) for k in range(1, 50)))
    done = protocols.split("fsod_test", root, tmp_path / "a", ids=tmp_path / "train.txt")
    assert ids_of(done.val) == list(range(50, 61))
    (tmp_path / "val.txt").write_text("51\n52\n")
    done = protocols.split("fsod_test", root, tmp_path / "b", ids=tmp_path / "train.txt", val_ids=tmp_path / "val.txt")
    assert ids_of(done.val) == [51, 52]
    (tmp_path / "val.txt").write_text("49\n52\n")
    with pytest.raises(DataError, match=r"train\.txt: 1 of its images are in .*val\.txt too; expected no image"):
        protocols.split("fsod_test", root, tmp_path / "c", ids=tmp_path / "train.txt", val_ids=tmp_path / "val.txt")


def test_a_split_is_written_again_where_the_data_are_now(root: Path, tmp_path: Path) -> None:
    first = protocols.split("minivoc_10", root, tmp_path / "a", seed=8)
    again = protocols.split("minivoc_10", root, tmp_path / "deep" / "er" / "b", ids=first.train)
    assert ids_of(again.train) == ids_of(first.train)
    assert again.train_part.sha256 == first.train_part.sha256
