from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from headstart.datasets.detection import load_detection_data
from headstart.errors import DataError


def thing(name: str, box: tuple[object, ...], extra: str = "") -> str:
    corners = "".join(f"<{c}>{v}</{c}>" for c, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox>{extra}</object>"


def xml(name: str, *objects: str, size: str | None = "<width>60</width><height>40</height>") -> str:
    sized = f"<size>{size}<depth>3</depth></size>" if size is not None else ""
    return f"<annotation><filename>{name}</filename>{sized}{''.join(objects)}</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three images: a cat and a dog, a difficult horse, nothing."""
    root = tmp_path / "VOC"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for stem in ("a", "b", "c"):
        Image.new("RGB", (60, 40)).save(root / "JPEGImages" / f"{stem}.jpg")
    (root / "Annotations" / "a.xml").write_text(
        xml("a.jpg", thing("dog", (1, 1, 20, 30)), thing("cat", (5.5, 6, 60, 40)))
    )
    (root / "Annotations" / "b.xml").write_text(xml("b.jpg", thing("horse", (3, 3, 9, 9), "<difficult>1</difficult>")))
    (root / "Annotations" / "c.xml").write_text(xml("c.jpg"))
    (root / "ImageSets" / "Main" / "val.txt").write_text("c\na\n\n")
    (root / "ImageSets" / "Main" / "dog_val.txt").write_text("a  1\nc -1\n")
    return root


def test_reads_a_folder(voc: Path) -> None:
    data = load_detection_data(voc)
    assert [i.id for i in data.images] == ["a", "b", "c"]
    assert data.images[0].path == voc / "JPEGImages" / "a.jpg"
    assert (data.images[0].width, data.images[0].height) == (60, 40)
    # VOC counts pixels from 1 and includes the last.
    assert data.annotations[0].boxes.tolist() == [[0, 0, 20, 30], [4.5, 5, 60, 40]]
    assert [data.categories[k - 1].name for k in data.annotations[0].labels] == ["dog", "cat"]
    assert len(data.annotations[2]) == 0
    assert not data.has_masks


def test_difficult_objects_are_ignored_not_lost(voc: Path) -> None:
    data = load_detection_data(voc)
    assert data.annotations[1].iscrowd.tolist() == [True]
    assert data.class_counts()["horse"] == 0
    assert data.to_coco()["annotations"][2]["iscrowd"] == 1
    assert data.notes == [
        "VOC: difficult objects: ignored in evaluation, no target in training: 1 (object 1, horse, of b.xml)"
    ]


def test_categories_are_vocs_own_or_the_sorted_names(voc: Path) -> None:
    names = [c.name for c in load_detection_data(voc).categories]
    assert len(names) == 20
    assert names[0] == "aeroplane"
    assert names[11] == "dog"
    (voc / "Annotations" / "c.xml").write_text(xml("c.jpg", thing("zebra", (1, 1, 9, 9))))
    assert [c.name for c in load_detection_data(voc).categories] == ["cat", "dog", "horse", "zebra"]
    # A list of some images has the classes of all, so that train and val agree.
    subset = load_detection_data(voc / "ImageSets" / "Main" / "dog_val.txt")
    assert [c.name for c in subset.categories] == ["cat", "dog", "horse", "zebra"]


def test_image_lists(voc: Path) -> None:
    assert [i.id for i in load_detection_data(voc / "ImageSets" / "Main" / "val.txt").images] == ["c", "a"]
    assert [i.id for i in load_detection_data(voc / "ImageSets" / "Main" / "dog_val.txt").images] == [
        "a",
        "c",
    ]


def test_a_folder_of_xml_beside_the_images(voc: Path) -> None:
    for file in (voc / "JPEGImages").iterdir():
        file.rename(voc / "Annotations" / file.name)
    data = load_detection_data(voc / "Annotations")
    assert data.images[0].path == voc / "Annotations" / "a.jpg"
    assert len(data) == 3


def test_images_given_by_the_caller(voc: Path, tmp_path: Path) -> None:
    (voc / "JPEGImages").rename(tmp_path / "photos")
    assert load_detection_data(voc, tmp_path / "photos").images[0].path == tmp_path / "photos" / "a.jpg"
    with pytest.raises(DataError, match=r"VOC: 3 of 3 images are missing .*\(a\.jpg, b\.jpg, c\.jpg\); looked in"):
        load_detection_data(voc)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_detection_data(voc, tmp_path / "nowhere")


def test_file_names_that_are_wrong_or_absent(voc: Path) -> None:
    (voc / "Annotations" / "a.xml").write_text(xml("C:\\photos\\a.png", thing("dog", (1, 1, 20, 30))))
    (voc / "Annotations" / "c.xml").write_text("<annotation><size></size></annotation>")
    data = load_detection_data(voc)
    assert [i.file_name for i in data.images] == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("size", [None, "<width>0</width><height>0</height>", ""])
def test_size_from_the_image(voc: Path, size: str | None) -> None:
    (voc / "Annotations" / "a.xml").write_text(xml("a.jpg", thing("dog", (1, 1, 20, 30)), size=size))
    assert load_detection_data(voc).images[0].width == 60


def test_boxes_are_checked_as_for_coco(voc: Path) -> None:
    (voc / "Annotations" / "a.xml").write_text(
        xml(
            "a.jpg",
            thing("dog", (9, 9, 5, 20)),
            thing("dog", (100, 1, 120, 9)),
            thing("dog", (30, 30, 90, 90)),
        )
    )
    data = load_detection_data(voc)
    assert data.annotations[0].boxes.tolist() == [[29, 29, 60, 40]]
    for note in (
        "VOC: boxes of zero or negative size left out: 1 (object 1, dog, of a.xml)",
        "VOC: boxes outside their image left out: 1 (object 2, dog, of a.xml)",
        "VOC: boxes cut at the edge of their image: 1 (object 3, dog, of a.xml)",
    ):
        assert note in data.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation><object>", r"a\.xml: not XML \(.*line 1.*\); expected a Pascal VOC annotation"),
        ("", r"a\.xml: not XML"),
        ("<svg></svg>", r"a\.xml: begins with <svg>; expected a Pascal VOC <annotation>"),
        (xml("a.jpg", "<object></object>"), r"a\.xml: object 1 has no <name>; expected its class"),
        (
            xml("a.jpg", thing("dog", (1, 1, 5, 5)), "<object><name>cat</name></object>"),
            r"a\.xml: object 2 \(cat\) has no <xmin> in <bndbox>; expected <xmin>, <ymin>, <xmax>, <ymax>",
        ),
        (
            xml("a.jpg", thing("dog", (1, "nan", 5, 5))),
            r"a\.xml: object 1 \(dog\) has <ymin> 'nan'; expected",
        ),
        (
            xml("a.jpg", thing("dog", (1, 1, "wide", 5))),
            r"a\.xml: object 1 \(dog\) has <xmax> 'wide'; expected",
        ),
        (
            xml("a.jpg", size="<width>x</width><height>4</height>"),
            r"a\.xml: <size> is not a number; expected",
        ),
    ],
)
def test_structural_problems(voc: Path, content: str, message: str) -> None:
    (voc / "Annotations" / "a.xml").write_text(content)
    with pytest.raises(DataError, match=message):
        load_detection_data(voc)


def test_lists_and_folders_that_do_not_fit(voc: Path, tmp_path: Path) -> None:
    listed = voc / "ImageSets" / "Main" / "val.txt"
    listed.write_text("a\nz\n")
    with pytest.raises(DataError, match=r"val\.txt: names images without an annotation file in .*: z"):
        load_detection_data(listed)
    listed.write_text("\n")
    with pytest.raises(DataError, match=r"val\.txt: is empty; expected the name of an image in each line"):
        load_detection_data(listed)
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"val\.txt: is not text"):
        load_detection_data(listed)
    (tmp_path / "stray.txt").write_text("a")
    with pytest.raises(DataError, match=r"stray\.txt: no folder .*Annotations; expected VOC's ImageSets/Main/"):
        load_detection_data(tmp_path / "stray.txt")
    with pytest.raises(DataError, match=r"JPEGImages: holds no \.xml file; expected Pascal VOC annotations"):
        load_detection_data(voc / "JPEGImages")
    for file in (voc / "Annotations").glob("[ab].xml"):
        file.unlink()
    with pytest.raises(DataError, match=r"Annotations: no file holds an <object>; expected at least one"):
        load_detection_data(voc)
