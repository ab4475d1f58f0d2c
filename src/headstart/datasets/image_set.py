"""All images under a path, plain files and members of tar shards, by name; a few bytes of memory each."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headstart import console
from headstart.datasets import images, shards
from headstart.datasets.images import IMAGE_SUFFIXES
from headstart.datasets.shards import Member
from headstart.errors import DataError
from headstart.files import replacing

SHARD_SUFFIX = ".tar"
SLOW_S = 2.0  # a listing that takes longer shows how far it is
STAT_THREADS = 16  # on a cluster's file system each stat waits for the network
SHOWN = 10  # of many notes
BATCH = 1 << 16  # names that are Python objects at a time


class Names(Sequence[str]):
    """A sequence of strings in Arrow's memory: the text and 8 bytes each; in Python's they take 50 more.

    Args:
        text: the strings.
        rows: those of them, in this order, that the sequence consists of; all by default.
    """

    def __init__(self, text: pa.Array | pa.ChunkedArray, rows: np.ndarray | None = None) -> None:
        chunks = text.chunks if isinstance(text, pa.ChunkedArray) else [text]
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._starts = [0]
        for chunk in self._chunks:
            self._starts.append(self._starts[-1] + len(chunk))
        self._rows = rows

    def __len__(self) -> int:
        return self._starts[-1] if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"place {index} of {len(self)} names")
        row = index % len(self) if self._rows is None else int(self._rows[index])
        chunk = bisect_right(self._starts, row) - 1
        return self._chunks[chunk][row - self._starts[chunk]].as_py()

    def __iter__(self) -> Iterator[str]:
        if self._rows is not None:
            yield from (self[i] for i in range(len(self)))
            return
        for chunk in self._chunks:
            for start in range(0, len(chunk), BATCH):
                yield from chunk.slice(start, BATCH).to_pylist()


class ImageSet:
    """The images under a folder with all its subfolders, those in its tar shards among them; or of one tar shard.

    An image's name is its path relative to the folder, /-separated; in a shard it is the shard's path followed by
    the path in the shard, ``train/shard-000.tar/inside/photo.jpg``. ``names`` are sorted. Hidden files and folders
    are left out. Links are followed, and each real folder is listed once, so that a link to a parent does not lead
    in circles. A pickled set carries its index; after :meth:`share` it carries the name of a file instead.

    Args:
        path: a folder, or a .tar file.
        progress: show how far the listing is when it takes long.

    Raises:
        DataError: nothing is there, it can't be listed, or it holds no image.
    """

    def __init__(self, path: Path | str, progress: bool = False) -> None:
        self.path = Path(path)
        self.notes: list[str] = []  # what is wrong with shards, for people to read
        self.index: Path | None = None
        if not self.path.exists():
            raise DataError(f"{self.path}: no such folder; expected a folder of images, or a .tar file of them")
        if self.path.is_dir():
            self._base = self.path
            table = self._list(progress)
        else:
            self._base = self.path.parent
            table = self._read_one(progress)
        self._open(table)

    def _open(self, table: pa.Table) -> None:
        self._table = table
        self._tars = json.loads(table.schema.metadata[b"shards"])
        self.names = Names(table["name"])
        self._places = {
            name: table[name].combine_chunks().to_numpy() for name in ("shard", "offset", "size") if self._tars
        }

    def __len__(self) -> int:
        return len(self.names)

    def print_notes(self) -> None:
        """What is wrong with shards, the first few, for who waits."""
        for note in self.notes[:SHOWN]:
            console.notes.print(note, markup=False, soft_wrap=True)
        if len(self.notes) > SHOWN:
            console.notes.print(f"... and {len(self.notes) - SHOWN:,} more shards with something wrong")

    def decode(self, name: str, short_side_px: int | None = None) -> np.ndarray:
        """As :func:`headstart.datasets.images.decode`."""
        return images.decode(self.source(name), short_side_px)

    def size_of(self, name: str) -> tuple[int, int]:
        """As :func:`headstart.datasets.images.size_of`."""
        return images.size_of(self.source(name))

    def bytes_of(self, name: str) -> int | None:
        """Size of the image's file or member; None for a file that is no longer there."""
        source = self.source(name)
        return source.size if isinstance(source, Member) else _file_size(str(source))

    def source(self, name: str) -> Path | Member:
        """Where the image is: what ``images.decode`` takes. A name that is not in the set is taken for a file's."""
        if self._tars:
            place = bisect_left(self.names, name)
            if place < len(self.names) and self.names[place] == name and self._places["shard"][place] >= 0:
                shard = self._tars[self._places["shard"][place]]
                inside = name[len(shard) + 1 :]
                offset, size = int(self._places["offset"][place]), int(self._places["size"][place])
                return Member(self._base / shard, inside, offset, size)
        return self._base / name

    def sizes(self, places: np.ndarray | None = None) -> np.ndarray:
        """(n,) int64: bytes of the images at ``places`` in ``names``, of all by default; -1 where a file is gone."""
        if places is None:
            places = np.arange(len(self))
        sizes = self._places["size"][places] if self._tars else np.full(len(places), -1, np.int64)
        plain = np.flatnonzero(self._places["shard"][places] < 0) if self._tars else np.arange(len(places))
        base = str(self._base)
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            for start in range(0, len(plain), BATCH):
                these = plain[start : start + BATCH]
                paths = [f"{base}/{self.names[int(place)]}" for place in places[these]]
                found = pool.map(_file_sizes, (paths[i : i + 256] for i in range(0, len(paths), 256)))
                sizes[these] = [size for some in found for size in some]
        return sizes

    def locate(self, names: pa.Array) -> np.ndarray:
        """(n,) int64: the places of ``names`` in ``self.names``; -1 for those that are not there."""
        if not len(names):
            return np.zeros(0, np.int64)
        ends = pc.min_max(names)
        first = bisect_left(self.names, ends["min"].as_py())
        stop = bisect_right(self.names, ends["max"].as_py())
        # Among the few between the ends: a table of all names would have to be made for every call.
        here = self._table["name"].slice(first, stop - first).combine_chunks()
        found = pc.index_in(names.cast(pa.large_string()), value_set=here)
        return np.where(found.is_null(), -1, found.fill_null(0).to_numpy().astype(np.int64) + first)

    def share(self, file: Path) -> None:
        """Move the index into an Arrow file, from which this and other processes map it.

        Raises:
            RunError: it can't be written.
        """
        with replacing(file) as temporary, pa.ipc.new_file(str(temporary), self._table.schema) as writer:
            writer.write_table(self._table)
        self.adopt(file)
        pa.default_memory_pool().release_unused()  # what sorting needed

    def adopt(self, file: Path) -> None:
        """Use the index that another process shared."""
        self.index = file
        self._open(pa.ipc.open_file(pa.memory_map(str(file))).read_all())

    def __getstate__(self) -> dict[str, Any]:
        state = {"path": self.path, "_base": self._base, "notes": self.notes, "index": self.index}
        return state if self.index is not None else {**state, "_table": self._table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.index is not None:
            self.adopt(self.index)
        else:
            self._open(self._table)

    def _list(self, progress: bool) -> pa.Table:
        listed, kinds, tars, packed = _Listed(), Counter[str](), [], []
        for name in _files(self._base):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                if not _is_unicode(name):
                    raise DataError(f"{self.path}: the file name {name!r} is not valid UTF-8; rename it")
                listed.add(name)
                continue
            kinds[suffix or "no suffix"] += 1
            if suffix == SHARD_SUFFIX:
                tars.append(name)
            elif name.lower().endswith(shards.COMPRESSED_SUFFIXES):
                packed.append(name)
        expected = f"{' '.join(sorted(IMAGE_SUFFIXES))}, also in .tar files"
        if not listed.count and not kinds:
            raise DataError(f"{self.path}: is empty; expected images ({expected})")
        self._read(sorted(tars), listed, progress)
        for name in sorted(packed):
            self.notes.append(str(shards.compressed(self._base / name)))
        if not listed.count:
            said = "".join(f"\n  {note}" for note in self.notes[:SHOWN])
            holds = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5))
            raise DataError(
                f"{self.path}: has {sum(kinds.values())} files ({holds}) but no image; expected {expected}{said}"
            )
        return self._finished(listed, sorted(tars))

    def _read_one(self, progress: bool) -> pa.Table:
        name = self.path.name
        if name.lower().endswith(shards.COMPRESSED_SUFFIXES):
            raise shards.compressed(self.path)
        if self.path.suffix.lower() != SHARD_SUFFIX:
            raise DataError(f"{self.path}: is a file; expected a folder of images, or a .tar file of them")
        listed = _Listed()
        self._read([name], listed, progress)
        if not listed.count:
            said = "".join(f"\n  {note}" for note in self.notes[:SHOWN])
            raise DataError(f"{self.path}: holds no image; expected {' '.join(sorted(IMAGE_SUFFIXES))}{said}")
        return self._finished(listed, [name])

    def _read(self, tars: list[str], listed: _Listed, progress: bool) -> None:
        total = sum(_file_size(str(self._base / name)) or 0 for name in tars)
        with _late_progress(total, progress) as reached:
            before = 0
            for number, name in enumerate(tars):
                path = self._base / name
                if not _is_unicode(name):
                    raise DataError(f"{self.path}: the file name {name!r} is not valid UTF-8; rename it")
                try:
                    found = shards.images_in(path, IMAGE_SUFFIXES, self.notes.append, partial(reached, before))
                    for inside, offset, size in found:
                        listed.add(f"{name}/{inside}", number, offset, size)
                except DataError as error:  # the others are still good
                    self.notes.append(str(error))
                before += _file_size(str(path)) or 0

    def _finished(self, listed: _Listed, tars: list[str]) -> pa.Table:
        table, twice = listed.sorted_table(tars)
        if twice:
            self.notes.append(
                f"{self.path}: {twice:,} names are twice in their shard; the later one counts, as when it is unpacked"
            )
        return table


def find(path: Path | str, name: str) -> Path | Member:
    """Where an image of ``ImageSet(path)`` is, for a few of them: without listing all the others.

    A name that is nowhere gives the path of the file that is missing.

    Raises:
        DataError: its shard can't be read.
    """
    path = Path(path)
    base = path.parent if path.is_file() else path
    parts = PurePosixPath(name).parts
    for end in range(1, len(parts)):
        shard = base.joinpath(*parts[:end])
        if shard.suffix.lower() == SHARD_SUFFIX and shard.is_file():
            return ImageSet(shard).source("/".join(parts[end - 1 :]))
    return base / name


class _Listed:
    """Names and places as they are found."""

    def __init__(self) -> None:
        self.count = 0
        self._names: list[str] = []
        self._places: list[tuple[int, int, int]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(self, name: str, shard: int = -1, offset: int = -1, size: int = -1) -> None:
        self.count += 1
        self._names.append(name)
        self._places.append((shard, offset, size))
        if len(self._names) == BATCH:
            self._flush()

    def _flush(self) -> None:
        shard, offset, size = np.array(self._places, np.int64).reshape(-1, 3).T
        self._batches.append(
            pa.record_batch(
                {
                    "name": pa.array(self._names, pa.large_string()),
                    "shard": shard.astype(np.int32),
                    "offset": np.ascontiguousarray(offset),
                    "size": np.ascontiguousarray(size),
                }
            )
        )
        self._names, self._places = [], []

    def sorted_table(self, tars: list[str]) -> tuple[pa.Table, int]:
        """By name, and how many were left out since a later one of their shard has the same name."""
        self._flush()
        table = pa.Table.from_batches(self._batches)
        self._batches = []
        if not tars:
            table = table.select(["name"])
        # Arrow's sort is stable and goes by bytes, which for UTF-8 is Python's order.
        table = table.take(pc.sort_indices(table["name"]))
        names = table["name"].combine_chunks()
        last = np.ones(len(names), bool)
        last[:-1] = pc.not_equal(names.slice(0, len(names) - 1), names.slice(1)).to_numpy(zero_copy_only=False)
        if not last.all():
            table = table.filter(pa.array(last))
        table = table.combine_chunks()
        table = table.combine_chunks()
        return table.replace_schema_metadata({b"shards": json.dumps(tars).encode()}), int((~last).sum())


def _files(folder: Path) -> Iterator[str]:
    """Paths of all files that are not hidden, relative to ``folder``, /-separated; in no particular order."""
    seen: set[str] = set()
    real = [str(folder)]
    linked: list[str] = []  # a heap: of two links to a folder the same one counts everywhere
    while real or linked:
        # Real folders first: so a folder's own name wins over a link's.
        parent = real.pop() if real else heapq.heappop(linked)
        identity = os.path.realpath(parent)
        if identity in seen:
            continue
        seen.add(identity)
        relative = Path(parent).relative_to(folder).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not entry.is_dir():
                        yield prefix + entry.name
                    elif entry.is_symlink():
                        heapq.heappush(linked, entry.path)
                    else:
                        real.append(entry.path)
        except OSError as error:
            raise DataError(f"{error.filename or parent}: can't be listed ({error.strerror})") from None


@contextlib.contextmanager
def _late_progress(total_bytes: int, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of the bytes of the shards before and in this one; once this takes a while it shows a bar."""
    start = time.monotonic()
    bar: console.Bar | None = None
    with contextlib.ExitStack() as stack:

        def reached(before: int, here: int) -> None:
            nonlocal bar
            if bar is None:
                if not show or time.monotonic() - start < SLOW_S:
                    return
                bar = stack.enter_context(console.progress("looking through tar shards", total_bytes >> 20, "MiB"))
            if (now := (before + here) >> 20) > bar.done:
                bar.advance(now - bar.done)

        yield reached


def _file_sizes(paths: list[str]) -> list[int]:
    return [-1 if (size := _file_size(path)) is None else size for path in paths]


def _file_size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
