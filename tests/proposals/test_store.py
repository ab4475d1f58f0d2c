import multiprocessing
import pickle
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headstart.errors import DataError
from headstart.proposals import ProposalSettings, store
from headstart.proposals.store import COLUMNS, ProposalStore, Row, schema_for, table_of, write_rows

METADATA = {"settings": ProposalSettings(scale=123).model_dump(), "engine": "opencv", "engine_version": "1"}


def some_rows(count=50, seed=0):
    """Every fifth image is unusable; the others have 1 to 7 boxes."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        if i % 5 == 3:
            rows.append(Row(f"sub/{i:03d}.jpg", 12, error="truncated"))
        else:
            boxes = rng.uniform(0, 40, (rng.integers(1, 8), 4)).astype(np.float32)
            rows.append(Row(f"sub/{i:03d}.jpg", 12, 60 + i, 40 + i, boxes, 9, ["", "ratio"][i % 2]))
    return rows


def write(path, rows, group=7):
    schema = schema_for(METADATA)
    table = table_of(rows, schema)
    write_rows(path, (table.slice(i, group) for i in range(0, len(rows), group)), schema)
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "p.parquet", some_rows())


@pytest.fixture(params=["memory", "cache"])
def opened(request, file, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROW_GROUP", 11)  # several batches in the cache, not those of the file
    return ProposalStore.open(file, tmp_path / "cache" if request.param == "cache" else None)


def test_gives_back_what_was_written(opened):
    usable = [row for row in some_rows() if row.error is None]
    assert len(opened) == len(usable) == 40
    assert list(opened.images) == [row.image for row in usable]
    for i, row in enumerate(usable):
        np.testing.assert_array_equal(opened.boxes(i), row.boxes)
        assert opened.boxes(i).dtype == np.float32
        assert opened.size(i) == (row.width, row.height)
    assert opened.failures == {row.image: "truncated" for row in some_rows() if row.error}
    assert opened.settings["scale"] == 123
    with pytest.raises(IndexError):
        opened.boxes(40)


def test_boxes_are_views_into_arrows_memory(opened):
    chunks = opened._table["boxes"].chunks
    buffers = [chunk.values.values.buffers()[1] for chunk in chunks]
    for i in range(len(opened)):
        boxes = opened.boxes(i)
        address = boxes.__array_interface__["data"][0]
        assert any(b.address <= address and address + boxes.nbytes <= b.address + b.size for b in buffers)
        assert not boxes.flags.writeable


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_cached_store_reads_from_the_mapped_file(file, tmp_path):
    before = pa.total_allocated_bytes()
    opened = ProposalStore(file, tmp_path / "cache")
    (cached,) = (tmp_path / "cache").iterdir()
    maps = Path("/proc/self/maps").read_text().splitlines()
    addresses = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps if str(cached) in line]
    address = opened.boxes(17).__array_interface__["data"][0]
    assert any(start <= address < stop for start, stop in addresses)
    assert pa.total_allocated_bytes() - before < 4096


def test_an_image_takes_few_bytes(tmp_path):
    """Of a mapped store's own memory; so that many data workers can open it."""
    rows = some_rows(200)
    kept = []
    for count in (10_000, 40_000):
        many = [replace(rows[i % 200], image=f"{i:06d}.jpg") for i in range(count)]
        file = write(tmp_path / f"{count}.parquet", many, group=4096)
        ProposalStore(file, tmp_path / "cache")
        arrow = pa.total_allocated_bytes()
        tracemalloc.start()
        opened = ProposalStore(file, tmp_path / "cache")
        for i in range(0, len(opened), 100):
            assert opened.images[i] == f"{i // 4 * 5 + [0, 1, 2, 4][i % 4]:06d}.jpg"
            assert len(opened.boxes(i))
        kept.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow)
        tracemalloc.stop()
    assert (kept[1] - kept[0]) / 30_000 < 6


def test_cache_is_written_once_and_anew_for_a_new_file(file, tmp_path):
    cache = tmp_path / "cache"
    ProposalStore(file, cache)
    (first,) = cache.iterdir()
    stamp = first.stat().st_mtime_ns
    ProposalStore(file, cache)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [stamp]
    write(file, some_rows(seed=1))
    expected = next(row for row in some_rows(seed=1) if row.error is None)
    np.testing.assert_array_equal(ProposalStore(file, cache).boxes(0), expected.boxes)


def _boxes_there(opened, i):
    return opened.boxes(i).copy(), opened.boxes(i).flags.owndata, opened.images[i]


def test_pickles_as_paths_and_opens_again_in_a_spawned_worker(tmp_path):
    rows = some_rows(2000)
    opened = ProposalStore(write(tmp_path / "p.parquet", rows), tmp_path / "cache")
    assert len(pickle.dumps(opened)) < 1000  # the boxes alone are 100 times that
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        boxes, owned, image = pool.submit(_boxes_there, opened, 77).result()
    np.testing.assert_array_equal(boxes, opened.boxes(77))
    assert image == opened.images[77]
    assert not owned


def test_check_images_names_what_differs(file, tmp_path):
    opened = ProposalStore(file)
    folder = tmp_path / "photos"
    for row in some_rows():
        (folder / row.image).parent.mkdir(parents=True, exist_ok=True)
        (folder / row.image).write_bytes(bytes(12))
    opened.check_images(folder)  # the unusable ones belong to it, too
    (folder / "sub/004.jpg").unlink()
    (folder / "new.png").write_bytes(bytes(12))
    (folder / "sub/007.jpg").write_bytes(bytes(13))
    with pytest.raises(DataError) as error:
        opened.check_images(folder)
    assert "1 images of the folder are not in the file: new.png" in str(error.value)
    assert "1 images of the file are not in the folder: sub/004.jpg" in str(error.value)
    assert "1 images have the same name but another content: sub/007.jpg (12 bytes then, 13 now)" in str(error.value)
    assert f"`headstart propose {folder} --out {file}` brings it up to date" in str(error.value)
    for row in some_rows():
        (folder / row.image).unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"50 images of the file are .*, \.\.\.\. Use the file that was made for them"):
        opened.check_images(folder)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    elif how == "other":
        content = b"%PDF-1.4 " + bytes(3000)
    elif how == "one byte":
        content[60] ^= 0xFF  # in the first column's first page
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "other", "one byte"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_damaged_file_is_named(file, tmp_path, how, cached):
    damage(file, how)
    with pytest.raises(DataError, match=r"p\.parquet: truncated, damaged"):
        ProposalStore(file, tmp_path / "cache" if cached else None)
    assert not [*tmp_path.glob("cache/*")]


def test_other_parquet_files_are_refused(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1], "b": [2]}), path)
    with pytest.raises(DataError, match=r"other\.parquet: a Parquet file, but not one .* \(columns: a, b\)"):
        ProposalStore(path)
    pq.write_table(COLUMNS.empty_table(), path)  # the columns without the settings
    with pytest.raises(DataError, match="not one that"):
        ProposalStore(path)


def test_missing_file_and_file_without_usable_images(tmp_path):
    with pytest.raises(DataError, match="no such file; `headstart propose` makes it"):
        ProposalStore(tmp_path / "none.parquet")
    path = write(tmp_path / "p.parquet", [row for row in some_rows() if row.error])
    with pytest.raises(DataError, match="none of its 10 images could be used"):
        ProposalStore(path)
