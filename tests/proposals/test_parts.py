from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from headstart.datasets import image_set
from headstart.datasets.image_set import ImageSet
from headstart.errors import RunError, SettingsError
from headstart.proposals.parts import Parts, Rows, Share
from headstart.proposals.store import ProposalFile, Row, schema_for, table_of, write_rows

SCHEMA = schema_for({"settings": {}, "engine_version": "1"})


# Shares


@pytest.mark.parametrize(("value", "text"), [("0/3", "0/3"), (" 2 / 3 ", "2/3"), ((1, 3), "1/3"), ("0/1", "0/1")])
def test_a_share_is_i_of_n(value, text):
    assert str(Share.parse(value)) == text


@pytest.mark.parametrize(
    "value", ["3/3", "-1/3", "1", "a/b", "1/0", "0/0", "", "1/2/3", (3, 3), (-1, 2), (1,), 1, (0.0, 2)]
)
def test_other_shares_are_refused(value):
    with pytest.raises(SettingsError, match="expected i/n with i from 0 to n-1; for three jobs 0/3, 1/3 and 2/3"):
        Share.parse(value)


@pytest.mark.parametrize(("images", "of"), [(10, 3), (3, 10), (1, 1), (1000, 7), (5, 5)])
def test_shares_are_equal_blocks_that_leave_nothing_out(images, of):
    places = np.arange(images)
    blocks = [places[Share(i, of).block(images)] for i in range(of)]
    assert np.concatenate(blocks).tolist() == places.tolist()
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    some = places[::2]
    expected = {f"{i}/{of}": n for i, block in enumerate(blocks) if (n := int(np.isin(block, some).sum()))}
    assert Share(0, of).counts(some, images) == expected


# Rows


@pytest.fixture
def photos(tmp_path: Path) -> ImageSet:
    for i in range(10):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / f"photos/{i}.jpg").write_bytes(bytes(100 + i))
    return ImageSet(tmp_path / "photos")


def row(i: int, mark: int = 0, error: str | None = None, size: int | None = None) -> Row:
    boxes = np.full((2, 4), mark, np.float32)
    return Row(f"{i}.jpg", 100 + i if size is None else size, 40, 30, boxes, 9, error=error)


def part(path: Path, rows: list[Row]) -> ProposalFile:
    write_rows(path, iter([table_of(rows, SCHEMA)]), SCHEMA)
    return ProposalFile(path)


def marks(rows: Rows) -> list[float]:
    table = pa.concat_tables(rows.in_order(SCHEMA))
    assert table["image"].to_pylist() == list(rows.images.names)
    return [boxes[0][0] for boxes in table["boxes"].to_pylist()]


def test_rows_come_in_order_from_wherever_they_are(photos, tmp_path):
    rows = Rows(photos)
    rows.add(part(tmp_path / "a", [row(i, 1) for i in (1, 2, 3, 7)]))
    assert rows.pending().tolist() == [0, 4, 5, 6, 8, 9]
    assert rows.pending(slice(4, 9)).tolist() == [4, 5, 6, 8]
    rows.add(part(tmp_path / "b", [row(i, 2) for i in (0, 2, 4, 6)]))
    rows.add(part(tmp_path / "c", [row(i, 3) for i in (5, 8, 9)]))
    assert rows.pending().tolist() == []
    assert marks(rows) == [2, 1, 1, 1, 2, 3, 2, 1, 3, 3]


def test_rows_of_other_content_do_not_count_where_it_is_checked(photos, tmp_path):
    file = part(tmp_path / "a", [row(i, 1, size=7 if i in (2, 8) else None) for i in range(10)])
    rows = Rows(photos)
    rows.add(file)
    assert rows.pending().tolist() == [2, 8]
    unchecked = Rows(photos)
    unchecked.add(file, check=slice(5, 10))
    assert unchecked.pending().tolist() == [8]
    rows.add(part(tmp_path / "b", [row(i, 2) for i in (2, 3, 8)]))
    assert marks(rows) == [1, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def test_a_failure_gives_way_to_what_comes_later(photos, tmp_path):
    rows = Rows(photos)
    first = part(tmp_path / "a", [row(i, 1, error="broken" if i < 3 else None) for i in range(10)])
    rows.add(first, retry=True, check=slice(0, 2))
    assert rows.pending().tolist() == [0, 1]
    rows.add(part(tmp_path / "b", [row(0, 2), row(1, 2, error="broken"), row(2, 2), row(3, 2, error="broken")]))
    assert rows.failed() == 1
    assert rows.first_failures(slice(None), 5) == {"1.jpg": "broken"}
    assert rows.first_failures(slice(2, 10), 5) == {}
    assert marks(rows) == [2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert rows.differ_from(first)


def test_failing_again_is_no_difference_unless_for_another_reason(photos, tmp_path):
    finished = part(tmp_path / "a", [row(i, 1, error="broken" if i == 4 else None) for i in range(10)])
    for reason, differs in (("broken", False), ("gone", True), (None, True)):
        rows = Rows(photos)
        rows.add(finished, retry=True)
        rows.add(part(tmp_path / f"b{reason}", [row(4, 2, error=reason)]))
        assert rows.differ_from(finished) is differs
    shorter = part(tmp_path / "c", [row(i, 1) for i in range(9)])
    assert rows.differ_from(shorter)


def test_rows_of_images_that_are_not_there_are_counted(photos, tmp_path):
    rows = Rows(photos)
    rows.add(part(tmp_path / "a", [row(i, 1) for i in (1, 10, 11)]))
    assert rows.known == 1
    assert rows.gone == 2
    assert rows.first_gone == ["10.jpg", "11.jpg"]
    rows.add(part(tmp_path / "b", [row(i, 1) for i in (2, 12)]))
    assert (rows.gone, rows.gone_from(tmp_path / "a"), rows.gone_from(tmp_path / "b")) == (3, 2, 1)


def test_an_images_state_takes_few_bytes(tmp_path, monkeypatch):
    import tracemalloc

    kept = []
    for count in (10_000, 40_000):
        names = [f"folder/image_{i:08d}.jpg" for i in range(count)]
        monkeypatch.setattr(image_set, "_files", lambda folder, names=names: iter(names))
        found = ImageSet(tmp_path)
        boxes = np.zeros((1, 4), np.float32)
        files = []
        for first in range(0, count, 2000):
            files.append(
                part(
                    tmp_path / f"{count}-{first}", [Row(name, -1, 9, 9, boxes) for name in names[first : first + 2000]]
                )
            )
        arrow = pa.total_allocated_bytes()
        tracemalloc.start()
        rows = Rows(found)
        for file in files:
            rows.add(file, check=slice(0))
        kept.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow)
        for table in rows.in_order(SCHEMA):
            assert len(table) <= 4096
        tracemalloc.stop()
        assert not len(rows.pending())
    assert (kept[1] - kept[0]) / 30_000 < 14


# Locks


def test_shares_write_side_by_side_and_each_once(tmp_path):
    parts = Parts(tmp_path / "p.parquet")
    with parts.writing(Share(0, 3)), Parts(tmp_path / "p.parquet").writing(Share(1, 3)):
        with pytest.raises(RunError, match="another process is making shard 1/3"), parts.writing(Share(1, 3)):
            pass
        with pytest.raises(RunError, match="another process is making these proposals"), parts.writing(None):
            pass
        with parts.writing(Share(0, 2)):
            pass
    with parts.writing(None):
        with pytest.raises(RunError, match="another process is making these"), parts.writing(Share(0, 3)):
            pass
        with pytest.raises(RunError, match="another process is making these"), parts.writing(None):
            pass
    parts.clean()
    assert list(tmp_path.iterdir()) == []


def test_jobs_join_one_after_the_other(tmp_path, capsys):
    parts = Parts(tmp_path / "p.parquet")
    order = []

    def join():
        with Parts(tmp_path / "p.parquet").joining(show=True):
            order.append("second")

    other = threading.Thread(target=join)
    with parts.joining(show=True):
        other.start()
        end = time.monotonic() + 20
        while "waiting" not in capsys.readouterr().err:
            assert time.monotonic() < end
            time.sleep(0.01)
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def test_cleaning_leaves_others_work_alone(tmp_path):
    parts = Parts(tmp_path / "p.parquet")
    with parts.writing(Share(0, 2)):
        part(parts.path / "part-1.parquet", [row(1)])
        parts.clean()
        assert parts.files() != []
        parts.remove(parts.files())
        unfinished = parts.path / ".tmp-part-2.parquet-1-00000000"
        unfinished.write_bytes(b"")
        parts.clean()
        assert unfinished.exists()
        with pytest.raises(RunError, match="another process is making shard 0/2"), parts.writing(Share(0, 2)):
            pass
    parts.clean()
    assert not parts.exists()


def test_a_killed_process_leaves_no_lock_and_its_leftovers_go(tmp_path):
    parts = Parts(tmp_path / "p.parquet")
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path / "p.parquet",))
    process.start()
    end = time.monotonic() + 20
    while not (parts.path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(RunError, match="another process"), parts.writing(Share(1, 2)):
        pass
    process.kill()
    process.join()
    (tmp_path / ".tmp-p.parquet-12-0123abcd").write_bytes(b"")
    (tmp_path / ".tmp-p.parquet-mine").write_bytes(b"")
    (parts.path / ".tmp-part-x.parquet-12-0123abcd").write_bytes(b"")
    (parts.path / "images-1.arrow").write_bytes(b"")
    with parts.writing(None):
        assert {path.name for path in parts.path.iterdir()} == {"lock", "lock-1-of-2", "ready"}
    assert {path.name for path in tmp_path.iterdir()} == {"p.parquet.parts", ".tmp-p.parquet-mine"}


def _hold(out: Path) -> None:
    parts = Parts(out)
    with parts.writing(Share(1, 2)):
        (parts.path / "ready").write_bytes(b"")
        time.sleep(60)


def test_a_lock_on_a_file_that_was_removed_keeps_nobody_out(tmp_path, monkeypatch):
    """Between opening the file and locking it, its folder is cleaned up by the job that joined."""
    import fcntl

    parts, flock, calls = Parts(tmp_path / "p.parquet"), fcntl.flock, []

    def slow(handle, mode):
        if not calls:
            calls.append(mode)
            Parts(tmp_path / "p.parquet").clean()
            assert not parts.exists()
        flock(handle, mode)

    monkeypatch.setattr(fcntl, "flock", slow)
    with parts.writing(Share(0, 2)):
        with pytest.raises(RunError, match="shard 0/2"), Parts(tmp_path / "p.parquet").writing(Share(0, 2)):
            pass
        with pytest.raises(RunError, match="another process"), Parts(tmp_path / "p.parquet").writing(None):
            pass


def test_without_locks_it_works_and_says_so(tmp_path, monkeypatch, capsys):
    import fcntl

    def no_locks(handle, mode):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    parts = Parts(tmp_path / "p.parquet")
    with parts.writing(Share(0, 2)), parts.joining(show=True):
        unfinished = parts.path / ".tmp-part-2.parquet-1-00000000"
        unfinished.write_bytes(b"")  # of another job, perhaps
        parts.clean()
        assert unfinished.exists()
    assert capsys.readouterr().err.count("this file system has no locks") == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    parts = Parts(tmp_path / "file/p.parquet")
    with pytest.raises(RunError, match=r"parquet\.parts: can't be written .* another --out"), parts.writing(None):
        pass
