"""Pascal VOC annotations: one XML file an image (http://host.robots.ox.ac.uk/pascal/VOC/).

Corners are pixels counted from 1, the last one included: the box that covers the first pixel alone is
(1, 1, 1, 1) there and (0, 0, 1, 1) here. Objects marked *difficult* are kept as crowds: ignored in
evaluation, as in the VOC challenge, and no target in training. Images are looked for in: the folder given by
the caller, ``JPEGImages/``, ``images/``, the data set's folder, the folder of the XML file.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree

from headstart.datasets.detection import (
    Category,
    DetectionData,
    ImageRecord,
    Notes,
    RawObject,
    check_missing,
    find_image,
    finite,
    image_size,
    named,
    usable,
)
from headstart.datasets.images import IMAGE_SUFFIXES
from headstart.errors import DataError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *(
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
)
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load_voc(
    path: Path | str, images: Path | str | None = None, only: Collection[int | str] | None = None
) -> DetectionData:
    """Read Pascal VOC annotations. See :func:`headstart.datasets.detection.load_detection_data`.

    Image ids are the names of the XML files without suffix. Categories are VOC's own 20 when all names are
    among them, otherwise the names found, sorted; of a list ``ImageSets/Main/<name>.txt`` the names in *all*
    files of ``Annotations/``, so that train and val agree.

    Raises:
        DataError: as there.
    """
    path = Path(path)
    root, folder, stems = _layout(path)
    if only is not None:
        stems = [stem for stem in stems if stem in only]
    folders = [root / "JPEGImages", root / "images", root, folder]
    if images is not None:
        if not Path(images).is_dir():
            raise DataError(f"{images}: no such folder; expected the folder of the images of {path}")
        folders.insert(0, Path(images))

    files = sorted(folder.glob("*.xml"))
    trees = {file.stem: _parse(file) for file in files}
    absent = [stem for stem in stems if stem not in trees]
    if absent:
        raise DataError(f"{path}: names images without an annotation file in {folder}: {named(absent)}")
    categories = _categories(folder, trees)
    label_of = {category.name: category.id for category in categories}

    notes = Notes(path)
    missing: list[str] = []
    records, annotations = [], []
    for stem in stems:
        tree, file = trees[stem], folder / f"{stem}.xml"
        given = (tree.findtext("filename") or "").strip()
        names = ([given] if given else []) + [stem + suffix for suffix in sorted(IMAGE_SUFFIXES)]
        found = find_image(names, folders)
        if found is None:
            missing.append(given or stem)
            notes.add("images are missing, they and their objects were left out", given or stem)
            continue
        size = _size(file, tree, found, notes)
        if size is None:
            missing.append(given or stem)
            continue
        record = ImageRecord(stem, found, found.name, *size)
        objects = [_object(file, k, node, label_of, notes) for k, node in enumerate(tree.iterfind("object"))]
        records.append(record)
        annotations.append(usable(objects, record, notes))
    check_missing(path, missing, len(stems), folders)
    return DetectionData(path, categories, records, annotations, notes.sentences())


def _layout(path: Path) -> tuple[Path, Path, list[str]]:
    """The data set's folder, the folder of the XML files, and which of them are meant."""
    if path.is_file():  # ImageSets/Main/<name>.txt
        root = path.resolve().parent.parent.parent
        folder = root / "Annotations"
        if not folder.is_dir():
            raise DataError(f"{path}: no folder {folder}; expected VOC's ImageSets/Main/<name>.txt beside Annotations/")
        # Lists of one class carry -1, 0 or 1 in a second column; the images are the same.
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{path}: is not text; expected the name of an image in each line") from None
        stems = [line.split()[0] for line in lines if line.strip()]
        if not stems:
            raise DataError(f"{path}: is empty; expected the name of an image in each line")
        return root, folder, list(dict.fromkeys(stems))
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    stems = sorted(file.stem for file in folder.glob("*.xml"))
    if not stems:
        raise DataError(f"{folder}: holds no .xml file; expected Pascal VOC annotations")
    return (path if folder != path else path.parent), folder, stems


def _parse(file: Path) -> ElementTree.Element:
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file}: not XML ({error}); expected a Pascal VOC annotation") from None
    if root.tag != "annotation":
        raise DataError(f"{file}: begins with <{root.tag}>; expected a Pascal VOC <annotation>")
    return root


def _categories(folder: Path, trees: dict[str, ElementTree.Element]) -> list[Category]:
    names: set[str] = set()
    for stem, tree in trees.items():
        for k, node in enumerate(tree.iterfind("object")):
            name = (node.findtext("name") or "").strip()
            if not name:
                raise DataError(f"{folder / stem}.xml: object {k + 1} has no <name>; expected its class")
            names.add(name)
    if not names:
        raise DataError(f"{folder}: no file holds an <object>; expected at least one labelled object")
    ordered = list(CLASSES) if names <= set(CLASSES) else sorted(names)
    return [Category(k + 1, name) for k, name in enumerate(ordered)]


def _size(file: Path, tree: ElementTree.Element, found: Path, notes: Notes) -> tuple[int, int] | None:
    """As given, or from the image: several annotation tools leave <size> out or write 0."""
    try:
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError):
        raise DataError(f"{file}: <size> is not a number; expected <width> and <height> in pixels") from None
    return (width, height) if width > 0 and height > 0 else image_size(found, notes)


def _object(file: Path, index: int, node: ElementTree.Element, label_of: dict[str, int], notes: Notes) -> RawObject:
    name = (node.findtext("name") or "").strip()
    place = f"object {index + 1}, {name}, of {file.name}"
    corners = []
    for corner in _CORNERS:
        text = node.findtext(f"bndbox/{corner}")
        if text is None:
            raise DataError(
                f"{file}: object {index + 1} ({name}) has no <{corner}> in <bndbox>; "
                "expected <xmin>, <ymin>, <xmax>, <ymax> in pixels"
            )
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not finite(value):
            raise DataError(f"{file}: object {index + 1} ({name}) has <{corner}> {text!r}; expected a pixel number")
        corners.append(value)
    difficult = (node.findtext("difficult") or "0").strip() == "1"
    if difficult:
        notes.add("difficult objects: ignored in evaluation, no target in training", place)
    x0, y0, x1, y1 = corners
    # From the first pixel's number to behind the last one's.
    return RawObject(place, (x0 - 1, y0 - 1, x1, y1), label_of[name], iscrowd=difficult, id=index + 1)
