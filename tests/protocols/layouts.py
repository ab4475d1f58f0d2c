"""Miniature copies of the published data sets: the same files in the same formats, a few images each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from headstart.datasets.voc import CLASSES

WIDTH, HEIGHT = 32, 24


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)


def square(box: Sequence[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def objects(rng: np.random.Generator, classes: int) -> list[tuple[int, list[float]]]:
    """(class from 0, [x, y, width, height]) of up to five objects."""
    boxes = rng.integers(2, 10, (int(rng.integers(1, 6)), 4)).astype(float).tolist()
    return [(int(rng.integers(classes)), box) for box in boxes]


def coco_json(path: Path, images: list[dict[str, Any]], names: Sequence[str], seed: int, **more: Any) -> None:
    """One line without spaces, as COCO's files are; category ids have gaps as COCO's have."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in images:
        for label, box in objects(rng, len(names)):
            annotation = {
                "segmentation": square(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "image_id": image["id"],
                "bbox": box,
                "category_id": 2 * label + 1,
                "id": 1000 * seed + len(annotations) + 7,
            }
            annotations.append({k: v for k, v in annotation.items() if k not in more.get("without", ())})
    content = {
        "info": {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017},
        "licenses": [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "BY-NC-SA"}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"supercategory": "thing", "id": 2 * k + 1, "name": name, **more.get("category", {})}
            for k, name in enumerate(names)
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")))


def coco(root: Path, train: int = 40, val: int = 5) -> Path:
    for split, count, first in (("train2017", train, 9), ("val2017", val, 100009)):
        images = []
        for number in range(first, first + 3 * count, 3):
            name = f"{number:012d}.jpg"
            photo(root / split / name)
            images.append(
                {
                    "license": 1,
                    "file_name": name,
                    "coco_url": f"http://images.cocodataset.org/{split}/{name}",
                    "height": HEIGHT,
                    "width": WIDTH,
                    "date_captured": "2013-11-14 16:28:13",
                    "flickr_url": "http://farm5.staticflickr.com/4153/5014840282_48cabd80c4_z.jpg",
                    "id": number,
                }
            )
        coco_json(root / "annotations" / f"instances_{split}.json", images, ("person", "bicycle", "car"), first % 7)
    return root


def lvis(root: Path, place: str = "annotations") -> Path:
    """LVIS's files on a COCO that :func:`coco` made. Images of the validation set are of both folders."""
    for split, folders in (("train", ["train2017"] * 6), ("val", ["val2017"] * 3 + ["train2017"] * 2)):
        names = {folder: sorted(p.name for p in (root / folder).iterdir()) for folder in set(folders)}
        images = []
        for k, folder in enumerate(folders):
            name = names[folder][-1 - k if split == "val" else k]
            images.append(
                {
                    "date_captured": "2013-11-14 16:28:13",
                    "neg_category_ids": [1, 5],
                    "id": int(name[:-4]),
                    "license": 1,
                    "height": HEIGHT,
                    "width": WIDTH,
                    "flickr_url": "http://farm5.staticflickr.com/4153/5014840282_48cabd80c4_z.jpg",
                    "coco_url": f"http://images.cocodataset.org/{folder}/{name}",
                    "not_exhaustive_category_ids": [3],
                }
            )
        category = {"frequency": "r", "synset": "yak.n.01", "synonyms": ["yak"], "def": "an ox", "image_count": 1}
        path = root / place / f"lvis_v1_{split}.json"
        coco_json(path, images, ("yak", "cup", "car"), len(split), category=category, without=("iscrowd",))
    return root


def soda10m(root: Path) -> Path:
    names = ("Pedestrian", "Cyclist", "Car", "Truck", "Tram", "Tricycle")
    for split in ("train", "val"):
        images = []
        for k in range(1, 9):
            name = f"HT_{split.upper()}_{k:06d}_SH_{k:03d}.jpg"
            photo(root / "labeled" / split / name)
            said = {"city": "Shanghai", "location": "Citystreet", "period": "Daytime", "weather": "Clear"}
            images.append({"file_name": name, "id": k, "height": HEIGHT, "width": WIDTH, **said})
        path = root / "labeled" / "annotations" / f"instance_{split}.json"
        coco_json(path, images, names, len(split), without=("segmentation",))
    return root


def fsod(root: Path, count: int = 60) -> Path:
    for part, split in enumerate(("test", "train")):
        images = []
        for k in range(1, count + 1):
            name = f"part_{k % 2 + 1}/n{part:02d}/{k:08d}.jpg"
            photo(root / "images" / name)
            images.append({"id": k, "file_name": name, "width": WIDTH, "height": HEIGHT})
        coco_json(root / "annotations" / f"fsod_{split}.json", images, [f"thing {k}" for k in range(8)], part + 1)
    return root


# WordNet id, number in the development kit and words. The kit's numbers are not in the order of the ids.
SYNSETS = (
    ("n01440764", 449, "tench, Tinca tinca"),
    ("n01443537", 450, "goldfish, Carassius auratus"),
    ("n01484850", 442, "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"),
)
TRUTH = (442, 449, 450, 449, 442, 450, 450)  # of the validation images, in order


def imagenet(root: Path, train: int = 4, flat: bool = True) -> Path:
    """ILSVRC 2012: training images in a folder a class, validation images as their archive has them, or in folders."""
    for wnid, _, _ in SYNSETS:
        for k in range(train):
            photo(root / "train" / wnid / f"{wnid}_{10 + 16 * k}.JPEG")
    wnids = {number: wnid for wnid, number, _ in SYNSETS}
    for k, number in enumerate(TRUTH, 1):
        name = f"ILSVRC2012_val_{k:08d}.JPEG"
        photo(root / "val" / name if flat else root / "val" / wnids[number] / name)
    if flat:
        devkit(root / "ILSVRC2012_devkit_t12")
    return root


def devkit(folder: Path) -> Path:
    """``meta.mat`` with classes and what is above them, a column of structs; and the classes' numbers, a line each."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = [(n, wnid, words, "a fish", 0, np.zeros((1, 0), np.uint16), 0, 1300) for wnid, n, words in SYNSETS]
    above = np.array([[449, 450, 442]], np.uint16)
    rows.append((1001, "n02512053", "fish", "an animal", 3, above, 3, 0))
    synsets = np.empty((len(rows), 1), [(name, object) for name in (*fields, "num_train_images")])
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    (folder / "data").mkdir(parents=True, exist_ok=True)
    savemat(folder / "data" / "meta.mat", {"synsets": synsets}, do_compression=True)
    truth = "".join(f"{number}\n" for number in TRUTH)
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    return folder


def voc(root: Path, train: int = 40, test: int = 6) -> Path:
    """VOC2007 with trainval and test, VOC2012 with trainval; every class often enough for three shots."""
    rng = np.random.default_rng(3)
    sets: dict[tuple[str, str], list[str]] = {
        ("VOC2007", "trainval"): [f"{k:06d}" for k in range(5, 5 + train // 2)],
        ("VOC2007", "test"): [f"{k:06d}" for k in range(1000, 1000 + test)],
        ("VOC2012", "trainval"): [f"2008_{k:06d}" for k in range(2, 2 + train - train // 2)],
    }
    turn = 0
    for (year, name), stems in sets.items():
        for stem in stems:
            found = [(turn + k) % 20 for k in range(4 + int(stem[-6:]) % 3)]
            turn += len(found)
            boxes = [rng.integers(1, 10, 4).tolist() for _ in found]
            write_voc(root / year, stem, [(CLASSES[k], *box) for k, box in zip(found, boxes, strict=True)])
        lists = root / year / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        (lists / f"cow_{name}.txt").write_text("".join(f"{stem} -1\n" for stem in stems))
    return root


def write_voc(folder: Path, stem: str, found: Sequence[tuple[str, int, int, int, int]]) -> None:
    """As the devkit has it: tabs; in 2012 corners with fractions, and the parts of a person inside of it."""
    later = folder.name == "VOC2012"
    photo(folder / "JPEGImages" / f"{stem}.jpg")
    text = [
        f"<annotation>\n\t<folder>{folder.name}</folder>\n\t<filename>{stem}.jpg</filename>\n\t<source>",
        f"\t\t<database>The {folder.name} Database</database>\n\t\t<annotation>PASCAL {folder.name}</annotation>",
        "\t\t<image>flickr</image>\n\t</source>\n\t<size>",
        f"\t\t<width>{WIDTH}</width>\n\t\t<height>{HEIGHT}</height>\n\t\t<depth>3</depth>\n\t</size>",
        "\t<segmented>0</segmented>",
    ]
    for k, (name, x, y, w, h) in enumerate(found):
        difficult = k == len(found) - 1  # the last of each image
        corners = (x, y, x + w, y + h)
        fraction = ".5" if later else ""
        box = "\n".join(
            f"\t\t\t<{corner}>{value}{fraction}</{corner}>"
            for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        )
        part = "\t\t<part>\n\t\t\t<name>head</name>\n\t\t\t<bndbox>\n" + box + "\n\t\t\t</bndbox>\n\t\t</part>\n"
        text.append(
            f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Left</pose>\n\t\t<truncated>1</truncated>\n"
            f"\t\t<difficult>{int(difficult)}</difficult>\n{part if later and name == 'person' else ''}"
            f"\t\t<bndbox>\n{box}\n\t\t</bndbox>\n\t</object>"
        )
    path = folder / "Annotations" / f"{stem}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*text, "</annotation>\n"]))
