from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headstart.datasets.detection import Annotations, Category, DetectionData, ImageRecord, load_detection_data
from headstart.datasets.splits import (
    Budget,
    Origin,
    Source,
    Split,
    choose_shots,
    divide,
    parse_budget,
    read_split,
    write_split,
)
from headstart.datasets.splits import choose_labelled as choose
from headstart.errors import DataError, SettingsError


def data(labels: list[list[int]], classes: int = 4, crowd: bool = False) -> DetectionData:
    def objects(of_image: list[int]) -> Annotations:
        n = len(of_image)
        boxes = np.tile(np.array([1, 1, 9, 9], np.float32), (n, 1))
        return Annotations(boxes, np.array(of_image, np.int64), boxes[:, 0], np.full(n, crowd), [None] * n)

    return DetectionData(
        Path("train.json"),
        [Category(k, f"class{k}") for k in range(1, classes + 1)],
        [ImageRecord(100 + i, Path(f"{i}.jpg"), f"{i}.jpg", 20, 20) for i in range(len(labels))],
        [objects(of_image) for of_image in labels],
    )


def choose_labelled(of: DetectionData, budget: Budget | str | int, seed: int = 0) -> list[int | str]:
    return choose(of, budget, seed).ids


PLAIN = data([[1]] * 200)


def hash_order(seed: int, count: int) -> list[int]:
    return [100 + i for i in sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}:{i}.jpg".encode()).hexdigest())]


# ---- budgets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "available", "expected"),
    [
        ("10%", 200, 20),
        ("1%", 200, 2),
        ("0.1%", 200, 1),  # never empty
        ("2.5%", 200, 5),
        ("12.5%", 4, 1),  # halves go up
        ("100%", 7, 7),
        ("all", 7, 7),
        ("25", 200, 25),
        (25, 200, 25),
        (" 3 ", 3, 3),
    ],
)
def test_budgets(text: str | int, available: int, expected: int) -> None:
    assert parse_budget(text).images(available) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0%", r"labels 0%: expected more than 0% and at most 100%"),
        ("101%", r"labels 101%: expected more than 0%"),
        ("0", r"labels 0: expected at least 1 image"),
        (
            "-5",
            r"labels '-5': not understood; expected a share such as \"10%\", a number of images",
        ),
        ("0shot", r"labels 0shot: expected at least 1 box of each class"),
        (
            "5 shot",
            r"labels '5 shot': not understood; expected .*, boxes of each class such as \"5shot\", \"all\"",
        ),
        ("0.1", r"labels '0\.1': not understood; expected a share such as"),
        ("nan%", r"labels 'nan%': not understood"),
        ("few", r"labels 'few': not understood"),
        ("", r"labels '': not understood"),
        ("missing/split.json", r"labels 'missing/split\.json': no such file; expected .* a split file"),
    ],
)
def test_budgets_that_are_none(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_budget(text)


def test_more_labels_than_images() -> None:
    with pytest.raises(SettingsError, match="labels 201: there are only 200 labelled images"):
        choose_labelled(PLAIN, "201")


def test_shots_are_no_number_of_images() -> None:
    with pytest.raises(SettingsError, match="labels 5shot: is no number of images; expected a share or a number"):
        parse_budget("5shot").images(200)


# ---- choice ------------------------------------------------------------------------------------------------


def test_order_is_that_of_the_hashes() -> None:
    assert choose_labelled(PLAIN, "10%", seed=3) == hash_order(3, 200)[:20]
    # A literal, so that a change of the rule, of Python or of the platform shows: such splits are cited.
    assert choose_labelled(PLAIN, "4", seed=0) == hash_order(0, 200)[:4] == [283, 146, 244, 167]


def test_seeds_differ_and_budgets_nest() -> None:
    assert set(choose_labelled(PLAIN, "10%", seed=0)) != set(choose_labelled(PLAIN, "10%", seed=1))
    rare = data([[1], [1, 2], [1], [3], [1], [4], [2], [1], [1], [1]])
    chosen = [choose_labelled(rare, n, seed=5) for n in range(1, 11)]
    for smaller, larger in itertools.pairwise(chosen):
        assert larger[: len(smaller)] == smaller
    assert sorted(chosen[-1]) == [100 + i for i in range(10)]


def test_order_does_not_depend_on_the_order_in_the_file() -> None:
    backwards = data([[1]] * 50)
    forwards = choose_labelled(backwards, "10", seed=2)
    backwards.images.reverse()
    assert choose_labelled(backwards, "10", seed=2) == forwards


@pytest.mark.parametrize("seed", range(10))
def test_every_class_is_present_where_the_budget_allows(seed: int) -> None:
    labels = [[1] for _ in range(60)]
    labels[17], labels[33], labels[51] = [1, 2], [3], [4]
    skewed = data(labels)
    chosen = skewed.subset(choose_labelled(skewed, "4", seed=seed))
    assert min(chosen.class_counts().values()) >= 1
    # The images that no class needed follow the hashes.
    order = hash_order(seed, 60)
    rest = [i for i in choose_labelled(skewed, "20", seed=seed) if skewed.annotations[i - 100].labels.tolist() == [1]]
    assert rest == [i for i in order if i in rest]
    too_few = skewed.subset(choose_labelled(skewed, "2", seed=seed))
    assert len(too_few) == 2
    assert sum(count > 0 for count in too_few.class_counts().values()) >= 2


def test_crowds_do_not_make_a_class_present() -> None:
    crowded = data([[1]] * 20)
    other = data([[2]] * 20, crowd=True)
    crowded.annotations[:10] = other.annotations[:10]
    plain = choose_labelled(crowded, "20", seed=0)
    first = next(i for i in hash_order(0, 20) if i >= 110)
    assert plain[0] == first


def test_images_without_objects_can_be_chosen() -> None:
    assert len(choose_labelled(data([[]] * 5), "3")) == 3


# ---- files -------------------------------------------------------------------------------------------------


def test_split_is_written_and_read_back(tmp_path: Path) -> None:
    ids = choose_labelled(PLAIN, "10%", seed=1)
    write_split(tmp_path / "labels.json", Split(ids), PLAIN, "10%", 1)
    assert read_split(tmp_path / "labels.json", PLAIN) == Split(ids)
    assert choose_labelled(PLAIN, str(tmp_path / "labels.json"), seed=99) == ids
    assert parse_budget(tmp_path / "labels.json").file == tmp_path / "labels.json"
    content = json.loads((tmp_path / "labels.json").read_text())
    assert content["labels"] == "10%"
    assert content["seed"] == 1
    assert content["data"] == "train.json"
    assert content["images"][0] == {"id": ids[0], "file_name": f"{int(ids[0]) - 100}.jpg"}


def test_write_refuses_unknown_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.json: has no image with id 5"):
        write_split(tmp_path / "labels.json", Split([5]), PLAIN, Budget("1", count=1), 0)
    assert not (tmp_path / "labels.json").exists()


def test_plain_list(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[103, 101]")
    assert read_split(tmp_path / "ids.json", PLAIN).ids == [103, 101]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"split\.json: not JSON .*; expected a split"),
        ("{}", r"split\.json: has no list of images; expected a split"),
        ("[]", r"split\.json: names no image"),
        (
            "[100, 7, 8]",
            r"split\.json: 2 of its 3 images are not in train\.json: 7, 8; it was made from other data",
        ),
        ('{"images": [{"file_name": "0.jpg"}]}', r"split\.json: entry 0 has no id; expected a split"),
        (
            '{"images": [{"id": 100, "file_name": "9.jpg"}]}',
            r"1 of its 1 images .*: 100 \(9\.jpg\); it was made",
        ),
        ("[100, 100]", r"split\.json: names an image twice"),
        ("[1, 2, 3, 4, 5, 6, 7]", r"7 of its 7 .*: 1, 2, 3, 4, 5 and 2 more; it was"),
    ],
)
def test_split_files_that_do_not_fit(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_split(tmp_path / "split.json", PLAIN)


# ---- K boxes of each class -----------------------------------------------------------------------------------


def crowded(seed: int = 0, images: int = 40) -> DetectionData:
    """Several objects an image, of four classes; some images are empty."""
    return data([[1 + b % 4 for b in hashlib.sha256(bytes([seed, i])).digest()[: i % 7]] for i in range(images)])


def plain_shots(of: DetectionData, shots: int, seed: int) -> set[tuple[int, int]]:
    """(image id, object's number) of the boxes that the rule takes."""
    taken = set()
    for label in range(1, 5):
        boxes = [
            (hashlib.sha256(f"{seed}:{image.file_name}:{number}".encode()).hexdigest(), image.id, number)
            for image, objects in zip(of.images, of.annotations, strict=True)
            for number, own in zip(objects.ids.tolist(), objects.labels.tolist(), strict=True)
            if own == label
        ]
        taken |= {(image_id, number) for _, image_id, number in sorted(boxes)[:shots]}
    return taken


def boxes_of(split: Split) -> set[tuple[int, int]]:
    return {(i, number) for i in split.ids for number in split.objects[i]}


@pytest.mark.parametrize("shots", [1, 2, 10])
@pytest.mark.parametrize("seed", [0, 7])
def test_shots_are_boxes_not_images(shots: int, seed: int) -> None:
    many = crowded()
    split = choose(many, f"{shots}shot", seed)
    assert split == choose_shots(many, shots, seed)
    assert boxes_of(split) == plain_shots(many, shots, seed)
    chosen = split.of(many)
    assert chosen.class_counts() == {f"class{k}": shots for k in range(1, 5)}
    assert all(len(objects) for objects in chosen.annotations)
    assert sum(len(a) for a in many.annotations) > 4 * shots  # and the data are as they were


def test_more_shots_hold_the_fewer_and_seeds_differ() -> None:
    many = crowded()
    assert boxes_of(choose_shots(many, 2, 3)) < boxes_of(choose_shots(many, 5, 3))
    assert boxes_of(choose_shots(many, 2, 3)) != boxes_of(choose_shots(many, 2, 4))


def test_shots_are_the_same_everywhere() -> None:
    # Literals, for the reason above.
    assert choose_shots(crowded(), 1, 0).objects == {104: [3], 131: [1, 3], 132: [2]}
    backwards = crowded()
    backwards.images.reverse()
    backwards.annotations.reverse()
    assert choose_shots(backwards, 1, 0) == choose_shots(crowded(), 1, 0)


def test_too_few_boxes_and_doubtful_numbers() -> None:
    with pytest.raises(DataError, match=r"train\.json: has fewer than 2 boxes of class2 \(0\), class3 \(1\), class4"):
        choose_shots(data([[1, 1], [3]]), 2)
    with pytest.raises(DataError, match=r"fewer than 1 boxes of class1 \(0\)"):  # crowds are no labels
        choose_shots(data([[1, 2, 3, 4]], crowd=True), 1)
    twice = data([[1, 2, 3, 4]])
    twice.annotations[0].ids = np.array([1, 1, 2, 3])
    with pytest.raises(DataError, match=r"two annotations of image 0\.jpg have the same id"):
        choose_shots(twice, 1)


def test_shots_are_written_and_read_back(tmp_path: Path) -> None:
    many = crowded()
    split = choose_shots(many, 3, 1)
    write_split(tmp_path / "labels.json", split, many, "3shot", 1)
    assert read_split(tmp_path / "labels.json", many) == split
    assert choose(many, tmp_path / "labels.json") == split
    content = json.loads((tmp_path / "labels.json").read_text())
    assert content["images"][0]["annotations"] == split.objects[split.ids[0]]
    assert content["sha256"] == split.digest(many) != Split(split.ids).digest(many)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("[5]", r"split\.json: train\.json: image 0\.jpg has no object numbered 5; the split was made from other data"),
        ('"all"', r"split\.json: entry 0 has \"annotations\" 'all'; expected a list of their ids"),
    ],
)
def test_objects_that_do_not_fit(tmp_path: Path, kept: str, message: str) -> None:
    (tmp_path / "split.json").write_text(f'{{"images": [{{"id": 100, "annotations": {kept}}}]}}')
    with pytest.raises(DataError, match=message):
        read_split(tmp_path / "split.json", PLAIN)


# ---- two parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_every_class_is_on_both_sides(seed: int) -> None:
    labels = [[1]] * 80
    labels[3], labels[50] = [2, 1], [2]  # just enough of the rare ones
    labels[9], labels[10], labels[70] = [3, 4], [3], [4]
    skewed = data(labels)
    first, second = divide(skewed, 0.8, seed)
    assert (len(first), len(second)) == (64, 16)
    assert sorted(first.ids + second.ids) == [100 + i for i in range(80)]
    for part in (first, second):
        assert min(part.of(skewed).class_counts().values()) >= 1
    # What no class decides is as the hashes have it.
    plain = [i for i in hash_order(seed, 80) if labels[i - 100] == [1]]
    assert sorted(i for i in second.ids if i in plain) == sorted(plain[: sum(i in plain for i in second.ids)])
    assert divide(skewed, 0.8, seed + 1)[1] != second


def test_parts_that_can_not_be() -> None:
    with pytest.raises(DataError, match=r"train\.json: only one image has class2; expected two, one for each part"):
        divide(data([[1], [1], [2], [1]]), 0.5)
    with pytest.raises(DataError, match=r"1 of its 5 images can't be set apart .*; got a part without class"):
        divide(data([[1], [1], [2], [2], []]), 0.8)


# ---- a split as a data set -----------------------------------------------------------------------------------


def photos(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (20, 20)).save(folder / name)


def two_halves(root: Path) -> DetectionData:
    """Two COCO files of one data set; what they hold together."""
    many = crowded(images=20)
    for part, indices in (("a", range(10)), ("b", range(10, 20))):
        half = many.subset([100 + i for i in indices])
        photos(root / part / "photos", [image.file_name for image in half.images])
        (root / f"{part}.json").write_text(json.dumps(half.to_coco()))
    return many


def test_a_split_with_its_origin_is_a_data_set(tmp_path: Path) -> None:
    many = two_halves(tmp_path / "data")
    origin = Origin(tmp_path / "data", (Source("a.json", "a/photos"), Source("b.json", "b/photos")))
    (tmp_path / "splits").mkdir()
    path = tmp_path / "splits" / "train.json"
    write_split(path, Split([115, 103]), many, "2", 0, origin, protocol="mine")
    assert json.loads(path.read_text())["root"] == "../data"
    loaded = load_detection_data(path)
    assert loaded.source == path
    assert [image.id for image in loaded.images] == [115, 103]
    assert loaded.images[0].path.resolve() == (tmp_path / "data" / "b" / "photos" / "15.jpg").resolve()
    assert loaded.annotations[1].labels.tolist() == many.annotations[3].labels.tolist()

    ids = json.loads((tmp_path / "data" / "a.json").read_text())["annotations"]
    wanted = [a["id"] for a in ids if a["image_id"] == 103][1:]
    write_split(path, Split([103], {103: wanted}), many, "shots", 0, origin)
    shots = load_detection_data(path)
    assert shots.annotations[0].ids.tolist() == wanted
    assert choose(shots, "all").of(shots).annotations[0].labels.tolist() == many.annotations[3].labels.tolist()[1:]

    (tmp_path / "data" / "a" / "photos" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 1 images are missing .*\(3\.jpg\)"):
        load_detection_data(path)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"train\.json: its data are not in .*data \(no .*a\.json\)\. Write it again for"
    ):
        load_detection_data(path)


def test_halves_that_do_not_fit_together(tmp_path: Path) -> None:
    many = two_halves(tmp_path)
    origin = Origin(tmp_path, (Source("a.json", "a/photos"), Source("a.json", "a/photos")))
    write_split(tmp_path / "train.json", Split([100]), many, "1", 0, origin)
    with pytest.raises(DataError, match=r"train\.json: several of its files have an image with id 100"):
        load_detection_data(tmp_path / "train.json")
    content = json.loads((tmp_path / "b.json").read_text())
    content["categories"][0]["name"] = "other"
    (tmp_path / "b.json").write_text(json.dumps(content))
    origin = Origin(tmp_path, (Source("a.json", "a/photos"), Source("b.json", "b/photos")))
    write_split(tmp_path / "train.json", Split([100]), many, "1", 0, origin)
    with pytest.raises(DataError, match=r"a\.json and .*b\.json have different categories; expected the same"):
        load_detection_data(tmp_path / "train.json")
