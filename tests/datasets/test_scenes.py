from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from headstart.datasets import images, scenes
from headstart.datasets.image_set import ImageSet
from headstart.errors import RunError, SettingsError

SIZES = {"unlabelled": 5, "train": 4, "val": 6}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> scenes.ScenesSummary:
    return scenes.make_scenes(tmp_path_factory.mktemp("made") / "scenes", **SIZES, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files(made: scenes.ScenesSummary) -> None:
    assert len(ImageSet(made.path / "unlabelled")) == 5
    assert len(ImageSet(made.path / "train" / "images")) == 4
    assert len(ImageSet(made.path / "val" / "images")) == 6
    for name in ImageSet(made.path).names:
        assert images.decode(made.path / name).shape == (96, 96, 3)
    assert json.loads((made.path / "scenes.json").read_text())["finished"]
    assert made.images == SIZES


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools.*")
def test_coco_files_hold_what_was_drawn(made: scenes.ScenesSummary) -> None:
    coco = COCO(str(made.path / "val.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(scenes.CLASSES)
    for i, image in enumerate(coco.loadImgs(coco.getImgIds())):
        assert image["file_name"] == f"val_{i:06d}.jpg"
        assert (made.path / "val" / "images" / image["file_name"]).is_file()
        scene = scenes.draw_scene("val", i)
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert [a["category_id"] for a in annotations] == scene.labels.tolist()
        for annotation, mask in zip(annotations, scene.masks, strict=True):
            assert np.array_equal(coco.annToMask(annotation), mask)
            ys, xs = np.nonzero(mask)
            left, top = xs.min(), ys.min()
            assert annotation["bbox"] == [left, top, xs.max() + 1 - left, ys.max() + 1 - top]
            assert annotation["area"] == mask.sum()
    assert sum(made.objects["val"].values()) == len(coco.anns)
    assert len(set(coco.anns)) == len(json.loads((made.path / "val.json").read_text())["annotations"])


def test_rerun_is_identical_and_images_do_not_depend_on_their_number(
    made: scenes.ScenesSummary, tmp_path: Path
) -> None:
    before = contents(made.path)
    again = scenes.make_scenes(tmp_path / "again", **SIZES, progress=False)
    assert contents(again.path) == before
    more = scenes.make_scenes(tmp_path / "more", unlabelled=7, train=1, val=0, progress=False)
    after = contents(more.path)
    for name in ("unlabelled/unlabelled_000004.jpg", "train/images/train_000000.jpg"):
        assert after[name] == before[name]
    assert not (more.path / "val.json").exists()


def test_images_of_other_splits_and_seeds_differ() -> None:
    first = scenes.draw_scene("train", 0).image
    for other in (
        scenes.draw_scene("val", 0),
        scenes.draw_scene("train", 1),
        scenes.draw_scene("train", 0, seed=1),
    ):
        assert not np.array_equal(first, other.image)


def test_objects_are_visible_apart_and_varied() -> None:
    drawn = [scenes.draw_scene("train", i) for i in range(150)]
    labels = np.concatenate([s.labels for s in drawn])
    share = np.bincount(labels, minlength=7)[1:] / len(labels)
    assert (share > 0.1).all()  # classes are about equally frequent
    sides = []
    for scene in drawn:
        assert len(scene.labels) == len(scene.masks)
        assert scene.masks.sum(axis=0).max(initial=0) <= 1  # a pixel shows one object
        sides += [max(cv2.boundingRect(m)[2:]) / 96 for m in scene.masks]
    assert np.quantile(sides, 0.05) < 0.25
    assert np.quantile(sides, 0.95) > 0.4
    assert max(sides) < 0.6


def test_no_object_is_mostly_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    wholes: list[float] = []
    draw = scenes._object

    def recording(rng: np.random.Generator, size_px: int, label: int) -> scenes._Shape:
        shape = draw(rng, size_px, label)
        wholes.append(float(shape.alpha.sum()))
        return shape

    # Big objects only, so that they do hide each other.
    monkeypatch.setattr(scenes, "OBJECT_SCALE", (0.45, 0.5))
    monkeypatch.setattr(scenes, "_object", recording)
    shares = []
    for i in range(60):
        wholes.clear()
        scene = scenes.draw_scene("train", i)
        if len(wholes) == len(scene.masks):  # none was refused: they are parallel
            shares += [m.sum() / whole for m, whole in zip(scene.masks, wholes, strict=True)]
    assert len(shares) > 40
    assert min(shares) > scenes.MIN_VISIBLE - 0.05  # a pixel counts when at least half covered
    assert min(shares) < 0.7


def test_shapes_have_their_shape() -> None:
    """Share of the bounding circle a class fills, against plane geometry; only the ring has a hole."""
    rng = np.random.default_rng(0)
    filled = {}
    for label, name in enumerate(scenes.CLASSES):
        shapes = [scenes._object(rng, 400, label) for _ in range(30)]
        filled[name] = np.median([s.alpha.sum() / (np.pi * s.radius_px**2) for s in shapes])
        mask = (shapes[0].alpha > 0.5).astype(np.uint8)
        _, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        assert hierarchy.shape[1] == (2 if name == "ring" else 1)
    assert filled["disc"] == pytest.approx(1, abs=0.03)
    assert filled["square"] == pytest.approx(2 / np.pi, abs=0.03)
    assert filled["triangle"] == pytest.approx(3 * np.sqrt(3) / 4 / np.pi, abs=0.03)
    assert filled["ring"] == pytest.approx(1 - 0.535**2, abs=0.08)


def test_objects_stand_out_for_selective_search() -> None:
    """Boxes of OpenCV's Selective Search find most objects that are large enough to be used as proposals."""
    found = []
    for i in range(25):
        scene = scenes.draw_scene("unlabelled", i)
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(np.ascontiguousarray(scene.image[:, :, ::-1]))
        search.switchToSelectiveSearchFast(500, 500, 0.9)
        x, y, w, h = search.process().astype(float).T
        for mask in scene.masks:
            left, top, width, height = cv2.boundingRect(mask)
            if width * height < (0.3 * 96) ** 2:
                continue
            overlap_x = np.minimum(x + w, left + width) - np.maximum(x, left)
            overlap_y = np.minimum(y + h, top + height) - np.maximum(y, top)
            overlap = overlap_x.clip(0) * overlap_y.clip(0)
            found.append((overlap / (w * h + width * height - overlap)).max() > 0.5)
    assert len(found) > 20
    assert np.mean(found) > 0.75


def test_other_sizes() -> None:
    assert scenes.draw_scene("train", 0, size_px=160).image.shape == (160, 160, 3)
    assert scenes.draw_scene("train", 0, size_px=scenes.MIN_SIZE_PX).masks.shape[1:] == (48, 48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val": -1}, "val=-1: expected a number of images"),
        ({"size_px": 20}, "size_px=20: expected at least 48 pixels"),
        ({"seed": -3}, "seed=-3: expected 0 or more"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        scenes.make_scenes(tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()


def test_nobodys_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(RunError, match="already holds train, not written by scenes; choose another --out"):
        scenes.make_scenes(tmp_path, unlabelled=1, train=1, val=1)
    assert (tmp_path / "train" / "mine.jpg").read_bytes() == b"precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file; expected a folder"):
        scenes.make_scenes(tmp_path / "file")


def test_a_killed_call_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = scenes.draw_scene

    def killed(split: str, index: int, *, size_px: int, seed: int) -> scenes.Scene:
        if (split, index) == ("train", 1):
            raise KeyboardInterrupt
        return draw(split, index, size_px=size_px, seed=seed)

    monkeypatch.setattr(scenes, "draw_scene", killed)
    with pytest.raises(KeyboardInterrupt):
        scenes.make_scenes(tmp_path, unlabelled=2, train=3, val=1, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scenes.json", "unlabelled"]
    assert not json.loads((tmp_path / "scenes.json").read_text())["finished"]
    monkeypatch.undo()
    (tmp_path / "notes.txt").write_text("mine")
    scenes.make_scenes(tmp_path, unlabelled=2, train=3, val=1, progress=False)
    smaller = scenes.make_scenes(tmp_path, unlabelled=1, train=3, val=0, progress=False)
    assert (tmp_path / "notes.txt").exists()
    assert len(ImageSet(tmp_path / "unlabelled")) == 1
    assert not (tmp_path / "val").exists()
    assert smaller.table().row_count == 3


def test_most_objects_wear_their_classes_texture(monkeypatch: pytest.MonkeyPatch) -> None:
    worn: list[object] = []
    paint = scenes._paint

    def recording(*arguments: object) -> None:
        if len(arguments) > 3:  # an object; clutter names no pattern
            worn.append(arguments[3])
        paint(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scenes, "_paint", recording)
    labels = np.concatenate([scenes.draw_scene("train", i).labels for i in range(100)])
    typical = [scenes._TEXTURES[scenes.CLASSES[k - 1]] is w for k, w in zip(labels, worn, strict=True)]
    assert np.mean(typical) == pytest.approx(scenes.TYPICAL_TEXTURE, abs=0.07)
    assert len(set(scenes._TEXTURES.values())) == len(scenes.CLASSES)
