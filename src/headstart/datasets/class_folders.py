"""Images whose class is the folder they are in, as ImageNet has them.

A folder holds one of these, with any names of classes:

=====================================  ================================================================================
``n01440764/n01440764_10026.JPEG``     a folder a class, whatever lies between it and the image
``n01440764.tar``                      a tar file a class, as ImageNet's archive of the training images has them
``any.tar`` with ``n01440764/1.JPEG``  tar files with such folders
``ILSVRC2012_val_00000001.JPEG``       ImageNet's validation images, whose classes its development kit says, which lies
                                       beside the folder, in it, or one further up: ``ILSVRC2012_devkit_t12/``
=====================================  ================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from headstart.datasets.detection import named
from headstart.datasets.image_set import SHARD_SUFFIX, ImageSet
from headstart.errors import DataError

KIT = "ILSVRC2012_devkit_t12"
TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"  # in it: of each validation image, in order, its class's number
SYNSETS = "data/meta.mat"  # in it: the WordNet id of each number
_FLAT = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_PARTS = {"train", "val", "test"}


@dataclass(frozen=True)
class ClassData:
    """Images and their classes.

    Attributes:
        classes: names, sorted.
        labels: (n,) int64, of each of ``images.names`` its place in ``classes``.
    """

    images: ImageSet
    classes: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def path(self) -> Path:
        return self.images.path

    def counts(self) -> np.ndarray:
        """(C,) images of each class."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def in_order_of(self, classes: Sequence[str]) -> ClassData:
        """The same images, label k meaning ``classes[k]``.

        Raises:
            DataError: there is a class that is not among ``classes``.
        """
        unknown = [name for name in self.classes if name not in set(classes)]
        if unknown:
            raise DataError(
                f"{self.path}: has {len(unknown)} classes that the training images have not: {named(unknown)}; "
                f"expected some of their {len(classes)}: {named(classes)}"
            )
        place = {name: number for number, name in enumerate(classes)}
        moved = np.array([place[name] for name in self.classes], np.int64)
        return replace(self, classes=tuple(classes), labels=moved[self.labels])


def load_class_data(path: Path | str, progress: bool = False) -> ClassData:
    """The images below ``path``, and their classes.

    Args:
        path: a folder as above, or one such tar file.
        progress: show how far the listing is when it takes long.

    Raises:
        DataError: nothing is there, an image lies in no class's folder, there is one class alone, or of ImageNet's
            validation images the classes are not known.
    """
    images = ImageSet(path, progress=progress)
    if _folder_of(images.names[0]) is None and _FLAT.fullmatch(images.names[0].rpartition("/")[2]):
        return _sorted(images, *_official(images))
    return _sorted(images, *_by_folder(images))


def _by_folder(images: ImageSet) -> tuple[dict[str, int], np.ndarray]:
    """Number of each class in the order of its first image, and each image's."""
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        found = _class_of(name)
        if found is None:
            raise DataError(
                f"{images.path}: {name} lies in no class's folder; expected {images.path / 'CLASS' / name}, or "
                f"ImageNet's ILSVRC2012_val_00000001.JPEG and so on with its {KIT}/"
            )
        return numbers.setdefault(found, len(numbers))

    labels = np.fromiter(map(number, images.names), np.int64, len(images))
    if numbers.keys() <= _PARTS:
        part = images.path / next(iter(numbers))
        raise DataError(
            f"{images.path}: holds the parts {named(sorted(numbers))}; expected one of them, such as {part}"
        )
    if len(numbers) < 2:
        raise DataError(
            f"{images.path}: has one class alone, {next(iter(numbers))}; expected a folder for each of several"
        )
    return numbers, labels


def _folder_of(name: str) -> str | None:
    """The first folder in an image's name that is no tar file."""
    parents = name.split("/")[:-1]
    return next((part for part in parents if not part.lower().endswith(SHARD_SUFFIX)), None)


def _class_of(name: str) -> str | None:
    folder = _folder_of(name)
    if folder is not None or "/" not in name:
        return folder
    return name.split("/")[-2][: -len(SHARD_SUFFIX)]


def _official(images: ImageSet) -> tuple[dict[str, int], np.ndarray]:
    """The same of ImageNet's validation images, by the development kit's numbers."""
    kit = _kit(images.path)
    truth, synsets = _read_truth(kit / TRUTH), _read_synsets(kit / SYNSETS)
    strange = sorted(set(truth.tolist()) - synsets.keys())
    if strange:
        raise DataError(
            f"{kit / TRUTH}: has class {strange[0]}, which {kit / SYNSETS} has not among its {len(synsets)}"
        )

    def label(name: str) -> int:
        found = _FLAT.fullmatch(name.rpartition("/")[2])
        if found is None or _folder_of(name) is not None:
            raise DataError(f"{images.path}: {name} is none of ImageNet's validation images, as the first one is")
        number = int(found[1])
        if not 1 <= number <= len(truth):
            raise DataError(f"{images.path}: {name} has no line in {kit / TRUTH}, which has {len(truth)}")
        return int(truth[number - 1])

    ids = np.fromiter(map(label, images.names), np.int64, len(images))
    return {synsets[number]: number for number in np.unique(ids).tolist()}, ids


def _kit(path: Path) -> Path:
    # Where a link is before where it leads.
    folders = dict.fromkeys((path.absolute(), path.resolve()))
    places = [place / KIT for folder in folders for place in (folder, folder.parent, folder.parent.parent)]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(
        f"{path}: has ImageNet's validation images without folders, so their classes are in {KIT}/ (its .tar.gz, "
        f"unpacked); expected that beside it: {places[1]}"
    )


def _read_truth(file: Path) -> np.ndarray:
    expected = "a number of a class a line"
    try:
        lines = file.read_text(encoding="ascii").split()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; expected {expected}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: can't be read ({error}); expected {expected}") from None
    for number, line in enumerate(lines, 1):
        if not line.isdigit():
            raise DataError(f"{file}: line {number} is {line!r}; expected {expected}")
    return np.array(lines, np.int64)


def _read_synsets(file: Path) -> dict[int, str]:
    """Number of each class that has no classes below it -> its WordNet id. Nothing in the file is executed."""
    expected = 'the "synsets" of the development kit, with ILSVRC2012_ID, WNID and num_children'
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected {expected}")
    try:
        synsets = np.atleast_1d(loadmat(file, squeeze_me=True)["synsets"])
        found = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    except Exception as error:  # a damaged file shows as one of many kinds
        raise DataError(f"{file}: can't be read ({type(error).__name__}: {error}); expected {expected}") from None
    if not found:
        raise DataError(f"{file}: has no classes; expected {expected}")
    return found


def _sorted(images: ImageSet, numbers: dict[str, int], labels: np.ndarray) -> ClassData:
    classes = sorted(numbers)
    place = np.zeros(max(numbers.values()) + 1, np.int64)
    place[[numbers[name] for name in classes]] = np.arange(len(classes))
    return ClassData(images, tuple(classes), place[labels])
