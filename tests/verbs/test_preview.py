import io
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import headstart
from headstart.cli import app
from headstart.datasets.image_set import ImageSet
from headstart.errors import DataError, SettingsError
from headstart.proposals import ProposalSettings
from headstart.proposals.store import Row, schema_for, table_of, write_rows
from headstart.verbs import preview as module
from headstart.verbs.preview import preview

GROUP = 7  # rows in a row group of these files


def row(number, rng, size=(120, 90)):
    """An image with ``number % 9`` more boxes than one; every fifth is unreadable, every eleventh fell back."""
    name = f"{number:03d}.png"
    if number % 5 == 4:
        return Row(name, 10, error="empty file (zero bytes)")
    corner = rng.uniform(0, 40, (1 + number % 9, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 50, corner.shape)], 1).astype(np.float32)
    return Row(name, 10, *size, boxes, 50, "ratio" if number % 11 == 3 else "")


def write(path, rows):
    meta = {"settings": ProposalSettings().model_dump(), "engine": "opencv", "engine_version": "1"}
    groups = [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]
    schema = schema_for(meta)
    write_rows(path, iter([table_of(group, schema) for group in groups]), schema)
    return path


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [row(i, rng) for i in range(100)]


@pytest.fixture
def file(tmp_path, rows):
    return write(tmp_path / "p.parquet", rows)


@pytest.fixture
def photos(tmp_path, rows):
    folder = tmp_path / "photos"
    folder.mkdir()
    for each in rows:
        if each.error is None:
            Image.new("RGB", (120, 90), (0, 0, 40)).save(folder / each.image)
    return folder


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_picture_beside_the_file(file, photos):
    out = preview(file, photos)
    assert out == file.with_suffix(".png")
    picture = pixels(out)
    assert picture.shape[1] == module.WIDTH
    assert picture.shape[0] > 4 * module.CAPTION_HEIGHT + module.HISTOGRAM_HEIGHT
    assert sorted(path.name for path in file.parent.iterdir()) == ["p.parquet", "p.png", "photos"]


def test_it_is_a_verb():
    assert headstart.preview is preview


def test_it_repeats_and_follows_its_seed(file, photos, tmp_path):
    first = preview(file, photos, tmp_path / "a.png").read_bytes()
    assert preview(file, photos, tmp_path / "b.png").read_bytes() == first
    assert preview(file, photos, tmp_path / "c.png", seed=1).read_bytes() != first


def test_counts_are_those_of_a_plain_count(file, rows):
    facts = module._facts(file)
    good = [each for each in rows if each.error is None]
    assert (facts.images, facts.failures) == (len(good), len(rows) - len(good)) == (80, 20)
    assert facts.fallbacks == sum(each.fallback != "" for each in good)
    lengths = [len(each.boxes) for each in good]
    assert facts.per_image.tolist() == [lengths.count(k) for k in range(max(lengths) + 1)]
    sizes = [int(((x2 - x1) * (y2 - y1)) ** 0.5) for each in good for x1, y1, x2, y2 in each.boxes.astype(float)]
    assert facts.sizes.tolist() == [sizes.count(k) for k in range(max(sizes) + 1)]
    assert facts.proposals == sum(lengths)


def test_the_sample_is_spread_over_all_usable_images(file, rows):
    good = [each.image for each in rows if each.error is None]
    facts = module._facts(file)
    names = [each["image"] for each in module._sample(facts, 8, np.random.default_rng(3))]
    assert [good.index(name) // 10 for name in names] == list(range(8))
    assert [each["image"] for each in module._sample(facts, 80, np.random.default_rng(3))] == good


def test_only_row_groups_with_a_chosen_image_are_read(file, monkeypatch):
    facts = module._facts(file)
    read, original = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda f, i, *a: read.append(i) or original(f, i, *a))
    list(module._sample(facts, 3, np.random.default_rng(0)))
    assert len(read) <= 3 < pq.ParquetFile(file).num_row_groups


def test_boxes_lie_where_they_belong(tmp_path):
    """A dark photo, one box in it: its four edges come out bright at the place the box has in the photo."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "photos/000.png")
    box = np.array([[50, 25, 150, 75]], np.float32)
    file = write(tmp_path / "p.parquet", [Row("000.png", 10, 200, 100, box, 1)])
    picture = pixels(preview(file, tmp_path / "photos"))
    width = module._tile_width()
    bright = (picture[:, : module.MARGIN + width] > 200).sum(axis=2) == 2  # yellow: red and green, no blue
    y, x = np.nonzero(bright)
    scale = width / 200
    assert x.min() - module.MARGIN == pytest.approx(50 * scale, abs=3)
    assert x.max() - module.MARGIN == pytest.approx(150 * scale, abs=3)
    assert y.max() - y.min() == pytest.approx(50 * scale, abs=4)
    assert not bright[(y.min() + y.max()) // 2, (x.min() + x.max()) // 2]


@pytest.mark.parametrize("level", [0, 128, 255])
def test_lines_stand_out_from_dark_grey_and_light_photos(tmp_path, level):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (200, 100), (level,) * 3).save(tmp_path / "photos/000.png")
    boxes = np.array([[10 + 10 * i, 10, 20 + 24 * i, 90] for i in range(1, 7)], np.float32)
    file = write(tmp_path / "p.parquet", [Row("000.png", 10, 200, 100, boxes, 6)])
    picture = pixels(preview(file, tmp_path / "photos"))[: -module.HISTOGRAM_HEIGHT]
    photo = picture[:, module.MARGIN : module.MARGIN + module._tile_width()]
    inside = photo[np.abs(photo - 255).sum(axis=2).any(axis=1)]  # without the margins
    luminance = inside @ (0.2126, 0.7152, 0.0722)
    assert (np.abs(luminance - level) > 80).mean() > 0.02


@pytest.mark.parametrize(
    ("boxes", "fallback", "text"),
    [
        (1, "", "1 box"),
        (4, "", "4 boxes"),
        (9, "", "6 of 9 boxes"),
        (9, "ratio", "6 of 9 boxes (aspect rule only)"),
        (1, "whole_image", "no box: the whole image"),
    ],
)
def test_captions(photos, boxes, fallback, text):
    found = np.tile(np.array([[0, 0, 60, 60]], np.float32), (boxes, 1)).tolist()
    values = {"image": "000.png", "width": 120, "height": 90, "boxes": found, "fallback": fallback}
    assert module._tile(ImageSet(photos), values, 6, np.random.default_rng(0)).caption == text


def test_images_that_are_gone_are_shown_as_such(file, photos):
    for path in sorted(photos.iterdir())[::2]:
        path.unlink()
    assert preview(file, photos).exists()
    for path in photos.iterdir():
        path.unlink()
    Image.new("RGB", (60, 40)).save(photos / "another.png")
    with pytest.raises(DataError, match=r"photos: none of 24 images of .*p\.parquet can be read, .*no such file"):
        preview(file, photos)


def test_images_in_tar_shards(rows, photos, tmp_path):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as shard:
        for path in sorted(photos.iterdir()):
            shard.add(path, path.name)
    packed = [replace(each, image=f"0.tar/{each.image}") for each in rows]
    file = write(tmp_path / "q.parquet", packed)
    tiles = module._sample(module._facts(file), 5, np.random.default_rng(0))
    images = ImageSet(tmp_path / "shards")
    assert all(module._tile(images, each, 6, np.random.default_rng(0)).picture is not None for each in tiles)
    assert preview(file, tmp_path / "shards").exists()


def test_names_of_any_length_and_script(tmp_path, recwarn):
    folder = tmp_path / "photos"
    names = ["$x_1$.png", "写真/一.png", "a/" * 60 + "end.png", "W" * 120 + ".png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(folder / name)
    box = np.array([[0, 0, 30, 30]], np.float32)
    file = write(tmp_path / "p.parquet", [Row(name, 1, 60, 40, box, 1) for name in sorted(names)])
    preview(file, folder)
    assert not recwarn.list


def test_long_names_keep_their_end():
    figure = Figure(dpi=module.DPI, figsize=(5, 5))
    module.FigureCanvasAgg(figure)
    text = figure.text(0, 0, "a/" * 60 + "end.png", size=6.5)
    module._shorten(text, figure)
    assert text.get_text().startswith("…")
    assert text.get_text().endswith("/end.png")
    assert text.get_window_extent().width <= module._tile_width()


def bars(counts, offset=0.5):
    axes = Figure().add_subplot()
    module._histogram(axes, np.array(counts), offset, "", "", "")
    return axes, [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]


def test_bars_of_small_whole_numbers_stand_on_them():
    _, drawn = bars([0, 3, 5, 2])
    assert drawn == [(-0.5, 1, 0), (0.5, 1, 3), (1.5, 1, 5), (2.5, 1, 2)]


def test_ranges_far_from_zero_start_where_they_start():
    counts = np.zeros(151, np.int64)
    counts[97:] = 1
    _, drawn = bars(counts, 0.0)
    assert (drawn[0][0], drawn[-1][0]) == (96, 150)
    assert sum(height for *_, height in drawn) == 54


def test_wide_ranges_get_bins_of_a_round_width_and_lose_nothing():
    counts = np.random.default_rng(0).integers(0, 9, 733)
    _, drawn = bars(counts, 0.0)
    assert {width for _, width, _ in drawn} == {20}
    assert len(drawn) <= module.MAX_BINS + 1
    assert [height for *_, height in drawn[:3]] == [counts[k : k + 20].sum() for k in (0, 20, 40)]
    assert sum(height for *_, height in drawn) == counts.sum()


def test_a_few_very_large_values_are_left_out_and_named():
    counts = np.zeros(5001, np.int64)
    counts[10:30] = 100
    counts[5000] = 2
    axes, drawn = bars(counts)
    assert sum(height for *_, height in drawn) == 2000
    assert drawn[-1][0] + drawn[-1][1] < 40
    assert any("not shown: 0.10% above" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize(("least", "step"), [(0.2, 1), (1, 1), (1.1, 2), (2.3, 5), (7, 10), (130, 200)])
def test_round_steps(least, step):
    assert module._step(least) == step


def test_what_is_refused(file, photos, tmp_path):
    with pytest.raises(SettingsError, match=r"a\.jpg: the preview is a PNG picture"):
        preview(file, photos, tmp_path / "a.jpg")
    with pytest.raises(SettingsError, match="count=0"):
        preview(file, photos, count=0)
    with pytest.raises(DataError, match="no such file"):
        preview(tmp_path / "none.parquet", photos)
    pq.write_table(pq.read_table(file).select(["image"]), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other\.parquet: a Parquet file, but not one"):
        preview(tmp_path / "other.parquet", photos)
    bad = write(tmp_path / "bad.parquet", [Row("a.png", 1, error="empty file")])
    with pytest.raises(DataError, match="none of its 1 images could be used"):
        preview(bad, photos)


def test_the_command_draws_for_new_and_for_finished_proposals(photos, tmp_path):
    def call(*options):
        arguments = ["propose", str(photos), "--workers", "0", "--out", str(tmp_path / "q.parquet"), *options]
        return CliRunner().invoke(app, arguments, catch_exceptions=False).output

    assert str(tmp_path / "q.png") in call("--engine", "random", "--preview")
    (tmp_path / "q.png").unlink()
    call("--engine", "random")
    assert not (tmp_path / "q.png").exists()
    assert str(tmp_path / "my.png") in call("--engine", "random", "--preview-out", str(tmp_path / "my.png"))
    assert not (tmp_path / "q.png").exists()
    assert Image.open(io.BytesIO((tmp_path / "my.png").read_bytes())).size[0] == module.WIDTH


def test_the_commands_preset_gives_way_to_options_and_set(photos, tmp_path):
    def settings(*options):
        out = tmp_path / f"{len(options)}.parquet"
        arguments = ["propose", str(photos), "--workers", "0", "--out", str(out), "--preset", "updetr", *options]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
        return module.metadata_of(out, pq.read_schema(out))["settings"]

    assert settings()["random_boxes"] == 10
    assert settings("--set", "random_boxes=3")["random_boxes"] == 3
    chosen = settings("--engine", "random", "--set", "aspect_max=2", "--set", "size_max=0.5")
    assert (chosen["engine"], chosen["aspect_max"], chosen["size_max"], chosen["random_boxes"]) == (
        "random",
        2,
        0.5,
        10,
    )


def test_the_title_says_how_the_boxes_were_made(tmp_path):
    meta = {
        "settings": ProposalSettings(preset="detreg", nms_iou=None).model_dump(),
        "engine": "opencv",
        "engine_version": "1+x",
    }
    facts = module._Facts(
        tmp_path / "p.parquet", meta, np.array([900, 100]), 7, 25, np.array([0]), np.array([5, 12000])
    )
    text = "\n".join(module._title(facts, 6))
    assert "p.parquet: 1,000 images, 12,005 proposals" in text
    assert "2.5% of the images needed a fallback" in text
    assert "7 could not be read" in text
    assert "opencv 1+x: " in text
    assert "aspect_max=null" in text  # off, where it is on by default
    assert "squash_px=128" in text
    assert "nms_iou" not in text
