"""Images and their classes, in each of the layouts that ImageNet comes in."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pytest

from headstart.datasets.class_folders import ClassData, load_class_data
from headstart.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "protocols"))

import layouts


def classes_of(data: ClassData) -> dict[str, str]:
    """Name of the image's file -> class."""
    names = (name.rpartition("/")[2] for name in data.images.names)
    return {name: data.classes[label] for name, label in zip(names, data.labels.tolist(), strict=True)}


def packed(folder: Path, tar: Path, prefix: str = "") -> None:
    with tarfile.open(tar, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, f"{prefix}{file.name}")


def test_the_flat_layout_is_the_one_in_folders(tmp_path: Path) -> None:
    flat = load_class_data(layouts.imagenet(tmp_path / "flat") / "val")
    folders = load_class_data(layouts.imagenet(tmp_path / "folders", flat=False) / "val")
    assert flat.classes == folders.classes == ("n01440764", "n01443537", "n01484850")
    assert classes_of(flat) == classes_of(folders)
    wnids = {number: wnid for wnid, number, _ in layouts.SYNSETS}
    assert list(classes_of(flat).values()) == [wnids[number] for number in layouts.TRUTH]
    assert flat.counts().tolist() == [2, 3, 2]


def test_the_archives_as_they_are(tmp_path: Path) -> None:
    """A tar file a class, as in ILSVRC2012_img_train.tar; the flat tar of the validation images; tars of folders."""
    root = layouts.imagenet(tmp_path / "ILSVRC2012")
    expected = classes_of(load_class_data(root / "train"))
    (tmp_path / "tars").mkdir()
    for folder in (root / "train").iterdir():
        packed(folder, tmp_path / "tars" / f"{folder.name}.tar")
    assert classes_of(load_class_data(tmp_path / "tars")) == expected
    (tmp_path / "shards").mkdir()
    for k, folder in enumerate((root / "train").iterdir()):
        packed(folder, tmp_path / "shards" / f"{k % 2}-{folder.name[-1]}.tar", f"{folder.name}/")
    assert classes_of(load_class_data(tmp_path / "shards")) == expected
    flat = classes_of(load_class_data(root / "val"))
    packed(root / "val", root / "ILSVRC2012_img_val.tar")
    assert classes_of(load_class_data(root / "ILSVRC2012_img_val.tar")) == flat


def test_the_kit_may_be_beside_a_link(tmp_path: Path) -> None:
    root = layouts.imagenet(tmp_path / "a")
    expected = classes_of(load_class_data(root / "val"))
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (root / "val").rename(tmp_path / "store" / "deep" / "val")
    (root / "val").symlink_to(tmp_path / "store" / "deep" / "val")
    assert classes_of(load_class_data(root / "val")) == expected


def test_another_order_of_classes(tmp_path: Path) -> None:
    data = load_class_data(layouts.imagenet(tmp_path / "a") / "val")
    order = ["zebra", *reversed(data.classes)]
    assert classes_of(data.in_order_of(order)) == classes_of(data)
    assert data.in_order_of(order).counts().tolist() == [0, 2, 3, 2]
    with pytest.raises(
        DataError, match=r"val: has 1 classes that the training images have not: n01484850; expected some"
    ):
        data.in_order_of(data.classes[:2])


def test_a_class_may_have_folders(tmp_path: Path) -> None:
    for name in ("cat/a/1.png", "cat/b/2.png", "dog/3.png"):
        layouts.photo(tmp_path / name)
    assert classes_of(load_class_data(tmp_path)) == {"1.png": "cat", "2.png": "cat", "3.png": "dog"}


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_class_data(path)

    refused(tmp_path / "nowhere", r"nowhere: no such folder")
    layouts.photo(tmp_path / "one" / "cat" / "1.png")
    refused(tmp_path / "one", r"one: has one class alone, cat; expected a folder for each of several")
    layouts.photo(tmp_path / "one" / "stray.png")
    refused(
        tmp_path / "one", r"one: stray\.png lies in no class's folder; expected .*one/CLASS/stray\.png, or ImageNet's"
    )
    root = layouts.imagenet(tmp_path / "net")
    (root / "whole").mkdir()
    for part in ("train", "val"):
        (root / "whole" / part).symlink_to(root / part)
    refused(root / "whole", r"whole: holds the parts train, val; expected one of them, such as .*whole/(train|val)")

    kit = root / "ILSVRC2012_devkit_t12" / "data"
    truth, meta = kit / "ILSVRC2012_validation_ground_truth.txt", kit / "meta.mat"
    good = truth.read_text()
    truth.write_text("449\n450\n")
    refused(root / "val", r"val: ILSVRC2012_val_00000003\.JPEG has no line in .*ground_truth\.txt, which has 2")
    truth.write_text("449\nfish\n")
    refused(root / "val", r"ground_truth\.txt: line 2 is 'fish'; expected a number of a class a line")
    truth.write_text(good.replace("442", "7"))
    refused(root / "val", r"ground_truth\.txt: has class 7, which .*meta\.mat")
    truth.unlink()
    refused(root / "val", r"ground_truth\.txt: no such file; expected a number")
    truth.write_text(good)
    meta.write_bytes(meta.read_bytes()[:200])
    refused(root / "val", r"meta\.mat: can't be read .*expected the \"synsets\" of the development kit")
    meta.unlink()
    refused(root / "val", r"meta\.mat: no such file")
    (root / "ILSVRC2012_devkit_t12").rename(root / "kit")
    refused(
        root / "val", r"val: has ImageNet's validation images without folders, .*expected that beside it: .*devkit_t12"
    )
    layouts.photo(root / "val" / "IMG_1.JPEG")
    (root / "kit").rename(root / "ILSVRC2012_devkit_t12")
    layouts.devkit(root / "ILSVRC2012_devkit_t12")
    refused(root / "val", r"val: IMG_1\.JPEG is none of ImageNet's validation images|lies in no class's folder")
