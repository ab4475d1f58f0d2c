from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from headstart.datasets.detection import Annotations, Category, DetectionData, ImageRecord
from headstart.datasets.splits import Budget, choose_labelled, parse_budget, read_split, write_split
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
    write_split(tmp_path / "labels.json", ids, PLAIN, "10%", 1)
    assert read_split(tmp_path / "labels.json", PLAIN) == ids
    assert choose_labelled(PLAIN, str(tmp_path / "labels.json"), seed=99) == ids
    assert parse_budget(tmp_path / "labels.json").file == tmp_path / "labels.json"
    content = json.loads((tmp_path / "labels.json").read_text())
    assert content["labels"] == "10%"
    assert content["seed"] == 1
    assert content["data"] == "train.json"
    assert content["images"][0] == {"id": ids[0], "file_name": f"{int(ids[0]) - 100}.jpg"}


def test_write_refuses_unknown_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.json: has no image with id 5"):
        write_split(tmp_path / "labels.json", [5], PLAIN, Budget("1", count=1), 0)
    assert not (tmp_path / "labels.json").exists()


def test_plain_list(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[103, 101]")
    assert read_split(tmp_path / "ids.json", PLAIN) == [103, 101]


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
