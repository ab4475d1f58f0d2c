from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from headstart import console
from headstart.datasets import image_set
from headstart.datasets.image_set import ImageSet, Names, find
from headstart.errors import DataError, ImageError


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (20 + seed, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def pack(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Plain files, and two shards."""
    root = tmp_path / "photos"
    root.mkdir()
    (root / "b.jpg").write_bytes(jpeg(0))
    (root / "z.jpg").write_bytes(jpeg(1))
    pack(root / "m/s-0.tar", [("y.jpg", jpeg(2)), ("y.txt", b"words"), ("sub/x.jpg", jpeg(3))])
    pack(root / "s-1.tar", [("0.jpg", jpeg(4)), ("empty.jpg", b""), ("text.jpg", b"these are words")])
    return root


NAMES = ["b.jpg", "m/s-0.tar/sub/x.jpg", "m/s-0.tar/y.jpg", "s-1.tar/0.jpg", "s-1.tar/empty.jpg", "s-1.tar/text.jpg"]
NAMES.append("z.jpg")
SEEDS = {"b.jpg": 0, "z.jpg": 1, "m/s-0.tar/y.jpg": 2, "m/s-0.tar/sub/x.jpg": 3, "s-1.tar/0.jpg": 4}


def check_contents(found: ImageSet) -> None:
    assert list(found.names) == NAMES
    for name, seed in SEEDS.items():
        content = jpeg(seed)
        expected = np.asarray(Image.open(io.BytesIO(content)))
        assert np.array_equal(found.decode(name), expected)
        assert found.size_of(name) == (30, 20 + seed)
        assert found.bytes_of(name) == len(content)
    assert [found.sizes()[NAMES.index(name)] for name in SEEDS] == [len(jpeg(seed)) for seed in SEEDS.values()]


def test_plain_files_and_shards_are_read_alike(mixed: Path) -> None:
    before = sorted(mixed.rglob("*"))
    found = ImageSet(mixed)
    assert found.notes == []
    assert len(found) == 7
    check_contents(found)
    assert sorted(mixed.rglob("*")) == before  # nothing is unpacked


def test_bad_members_are_named(mixed: Path) -> None:
    found = ImageSet(mixed)
    for name, why in (("empty", r"empty \(zero bytes\)"), ("text", "not an image of a known format; .*b'these are w")):
        with pytest.raises(ImageError, match=rf"s-1\.tar/{name}\.jpg: {why}"):
            found.decode(f"s-1.tar/{name}.jpg")
    shard = mixed / "s-1.tar"
    shard.write_bytes(shard.read_bytes()[:900])
    for use in (found, ImageSet(mixed)):  # listed before it was cut, and after
        with pytest.raises(ImageError, match=r"s-1\.tar/0\.jpg: cut off"):
            use.decode("s-1.tar/0.jpg")
    assert "s-1.tar: is cut off at byte 900" in ImageSet(mixed).notes[0]
    with pytest.raises(ImageError, match=r"m/s-0\.tar/none\.jpg: "):
        found.decode("m/s-0.tar/none.jpg")
    (mixed / "z.jpg").unlink()
    assert found.bytes_of("z.jpg") is None
    assert found.sizes()[-1] == -1


def test_one_shard_is_a_set_of_its_own(mixed: Path) -> None:
    found = ImageSet(mixed / "m/s-0.tar")
    assert list(found.names) == ["s-0.tar/sub/x.jpg", "s-0.tar/y.jpg"]
    assert list(found.names) == list(ImageSet(mixed / "m").names)
    assert found.size_of("s-0.tar/y.jpg") == (30, 22)


def test_a_folder_may_be_called_like_a_shard(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar/a.jpg").write_bytes(jpeg(0))
    assert list(ImageSet(tmp_path).names) == ["x.tar/a.jpg"]
    assert ImageSet(tmp_path).size_of("x.tar/a.jpg") == (30, 20)


def test_of_two_members_with_one_name_the_later_counts(tmp_path: Path) -> None:
    pack(tmp_path / "s.tar", [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("a.jpg", jpeg(2)), ("a.jpg", jpeg(3))])
    found = ImageSet(tmp_path)
    assert list(found.names) == ["s.tar/a.jpg", "s.tar/b.jpg"]
    assert found.size_of("s.tar/a.jpg") == (30, 23)
    assert "2 names are twice in their shard; the later one counts" in found.notes[0]


def test_compressed_shards_are_named(mixed: Path) -> None:
    (mixed / "more.tar.gz").write_bytes(b"\x1f\x8b")
    (mixed / "s-9.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    found = ImageSet(mixed)
    assert list(found.names) == NAMES
    assert all("is compressed" in note and "Decompress it" in note for note in found.notes)
    assert len(found.notes) == 2
    for name in ("more.tar.gz", "s-9.tar"):
        with pytest.raises(DataError, match=rf"{name}(: holds no image(.|\n)*{name})?: is compressed"):
            ImageSet(mixed / name)
    (mixed / "texts").mkdir()
    (mixed / "texts/x.tgz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"has 1 files \(1 x \.tgz\) but no image(.|\n)*x\.tgz: is compressed"):
        ImageSet(mixed / "texts")


def test_of_many_notes_the_first_are_shown(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(13):
        (mixed / f"bad-{i:02d}.tar").write_bytes(b"")
    found = ImageSet(mixed)
    found.print_notes()
    shown = capsys.readouterr().err
    assert "bad-09.tar: not a tar file" in shown
    assert "bad-10.tar" not in shown
    assert "... and 3 more" in shown


def test_what_links_lead_to_is_not_read_from_a_shard(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(0))
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/s.tar", "w") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../secret.jpg"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"no image(.|\n)*s\.tar: left out 1 links"):
        ImageSet(tmp_path / "shards")


def _seen_by_worker(found: ImageSet) -> tuple[list[str], list[int]]:
    check_contents(found)
    return list(found.names), found.sizes().tolist()


@pytest.mark.parametrize("shared", [False, True])
def test_a_set_opens_again_in_a_spawned_worker(mixed: Path, tmp_path: Path, shared: bool) -> None:
    found = ImageSet(mixed)
    expected = found.sizes().tolist()
    if shared:
        found.share(tmp_path / "index.arrow")
        assert len(pickle.dumps(found)) < 600
        check_contents(found)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_seen_by_worker, found).result() == (NAMES, expected)


def test_forked_workers_do_not_disturb_each_other(mixed: Path) -> None:
    """They would, did they share a file's position."""
    found = ImageSet(mixed)
    found.decode("s-1.tar/0.jpg")
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        for result in [pool.submit(_seen_by_worker, found) for _ in range(30)]:
            assert result.result()[0] == NAMES


def test_places_of_names(mixed: Path) -> None:
    found = ImageSet(mixed)
    wanted = ["z.jpg", "a", "s-1.tar/0.jpg", "s-1.tar", "zz", "b.jpg"]
    assert found.locate(pa.array(wanted)).tolist() == [6, -1, 3, -1, -1, 0]
    assert found.locate(pa.array(["a"])).tolist() == [-1]
    assert found.locate(pa.array([], pa.string())).tolist() == []
    assert found.locate(pa.array(NAMES)).tolist() == list(range(7))
    assert found.sizes(np.array([6, 2])).tolist() == [len(jpeg(1)), len(jpeg(2))]


def test_an_image_is_found_without_the_others(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ImageSet(mixed)
    monkeypatch.setattr(image_set, "_files", None)
    for name in NAMES:
        assert find(mixed, name) == found.source(name)
    assert find(mixed / "m/s-0.tar", "s-0.tar/y.jpg") == found.source("m/s-0.tar/y.jpg")
    assert find(mixed, "none.tar/x.jpg") == mixed / "none.tar/x.jpg"


def test_names_are_a_sequence() -> None:
    text = pa.chunked_array([pa.array(["a", "b"]), pa.array([], pa.string()), pa.array(["c", "d", "e"])])
    for names, expected in (
        (Names(text), list("abcde")),
        (Names(text.combine_chunks()), list("abcde")),
        (Names(text, np.array([4, 1, 2], np.uint32)), list("ebc")),
    ):
        assert list(names) == [names[i] for i in range(len(names))] == expected
        assert names[-1] == expected[-1]
        assert names[1:3] == expected[1:3]
        assert "c" in names
        assert names.index("c") == expected.index("c")
        for place in (len(expected), -len(expected) - 1):
            with pytest.raises(IndexError):
                names[place]


def fake_files(count: int) -> Iterator[str]:
    return (f"folder/{i // 1000:03d}/image_{i:08d}.jpg" for i in np.random.default_rng(0).permutation(count))


def test_an_image_takes_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Python's memory none that stays; of Arrow's its name (30 bytes here) and its end."""
    monkeypatch.setattr(image_set, "BATCH", 4096)
    kept, peaks = [], []
    for count in (20_000, 60_000):
        monkeypatch.setattr(image_set, "_files", lambda folder, count=count: fake_files(count))
        arrow = pa.total_allocated_bytes()
        tracemalloc.start()
        found = ImageSet(tmp_path)
        python, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        kept.append(python + pa.total_allocated_bytes() - arrow)
        peaks.append(peak)
        assert len(found) == count
        assert found.names[17] == "folder/000/image_00000017.jpg"
    assert (kept[1] - kept[0]) / 40_000 < 45
    assert (peaks[1] - peaks[0]) / 40_000 < 30  # numpy's permutation among them


def test_a_shared_set_takes_no_memory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_set, "_files", lambda folder: fake_files(20_000))
    before = pa.total_allocated_bytes()
    found = ImageSet(tmp_path)
    assert pa.total_allocated_bytes() - before > 20_000 * 30
    found.share(tmp_path / "index.arrow")
    assert pa.total_allocated_bytes() - before < 10_000
    assert found.names[19_999] == "folder/019/image_00019999.jpg"


def test_a_long_listing_shows_how_far_it_is(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ImageSet(mixed, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(image_set, "SLOW_S", 0)
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0)
    pack(mixed / "s-2.tar", [(f"{i}.jpg", bytes(400_000)) for i in range(10)])
    ImageSet(mixed, progress=True)
    assert "looking through tar shards 2/3 MiB" in capsys.readouterr().err
    ImageSet(mixed)
    assert capsys.readouterr().err == ""


# Plain files


def listed(folder: Path | str) -> list[str]:
    return list(ImageSet(folder).names)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_list_is_recursive_sorted_and_relative(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.JPG", "b/1.png", "a.TIFF", "notes.txt", "b/c/d/x.webp", ".hidden.jpg", ".git/y.jpg")
    touch(tmp_path, "b/._1.png", "no_suffix", "archive.jpg.zip")
    expected = ["a.TIFF", "b/1.png", "b/2.JPG", "b/c/d/x.webp"]
    assert listed(tmp_path) == expected
    assert listed(str(tmp_path)) == expected


def test_list_below_a_hidden_parent(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/photos/a.jpg")
    assert listed(tmp_path / ".cache/photos") == ["a.jpg"]


def test_links_are_followed_once_and_cycles_end(tmp_path: Path) -> None:
    touch(tmp_path, "photos/z/a.jpg", "elsewhere/b.jpg")
    root = tmp_path / "photos"
    (root / "z" / "up").symlink_to(root)
    (root / "a_link_to_z").symlink_to(root / "z")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "file.jpg").symlink_to(tmp_path / "elsewhere" / "b.jpg")
    assert listed(root) == ["file.jpg", "linked/b.jpg", "z/a.jpg"]


def test_list_through_a_link_to_the_folder(tmp_path: Path) -> None:
    touch(tmp_path, "real/a/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert listed(tmp_path / "link") == ["a/1.jpg"]


def test_errors_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: no such folder; expected a folder of images, or a"):
        listed(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: is empty; expected images \(\.bmp .*\.jpg .*also in \.tar files"):
        listed(tmp_path / "empty")
    touch(tmp_path, "texts/a.txt", "texts/b/c.txt", "texts/d.json", "texts/.hidden.jpg", "texts/README")
    with pytest.raises(DataError, match=r"texts: has 4 files \(2 x \.txt, .*1 x no suffix.*\) but no image"):
        listed(tmp_path / "texts")
    with pytest.raises(DataError, match=r"a\.txt: is a file; expected a folder of images"):
        listed(tmp_path / "texts" / "a.txt")


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode elsewhere")
def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    try:
        with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb"):
            pass
    except OSError:
        pytest.skip("this file system refuses such names itself")
    with pytest.raises(DataError, match="not valid UTF-8; rename it"):
        listed(tmp_path)
