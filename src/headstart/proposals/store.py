"""The proposals file: Parquet, one row an image, read back as views into memory-mapped Arrow data.

Columns: image (its name in the :class:`headstart.datasets.image_set.ImageSet`), width, height (px, after EXIF
rotation), bytes (of the file), boxes (list of 4 float32, xyxy in those px), n_raw (boxes before the filter),
fallback ("" or "ratio", "any_box", "whole_image"), error (why the image can't be used, or null). The schema's
metadata holds, as JSON under b"headstart": settings, engine, engine_version, folder, headstart (the version that
wrote it).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headstart.datasets.image_set import ImageSet, Names
from headstart.errors import DataError
from headstart.files import replacing

METADATA_KEY = b"headstart"
ROW_GROUP = 4096  # rows held in memory at a time while a file is written or copied
CACHED_BYTES = 64 << 20  # of row groups, while parts are joined
NAMED = 5  # images that an error names

COLUMNS = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("bytes", pa.int64()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("n_raw", pa.int32()),
        pa.field("fallback", pa.string()),
        pa.field("error", pa.string()),
    ]
)


@dataclass
class Row:
    """One image's proposals, or the reason why there are none (then ``error`` is set and the sizes are 0)."""

    image: str
    bytes: int | None
    width: int = 0
    height: int = 0
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    n_raw: int = 0
    fallback: str = ""
    error: str | None = None


def table_of(rows: list[Row], schema: pa.Schema) -> pa.Table:
    counts = np.array([len(row.boxes) for row in rows], np.int64)
    values = np.concatenate([row.boxes for row in rows]).astype(np.float32).ravel()
    offsets = pa.array(np.concatenate([[0], counts.cumsum()]), pa.int32())
    boxes = pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(pa.array(values), 4))
    columns = {
        name: pa.array([getattr(row, name) for row in rows], schema.field(name).type)
        for name in COLUMNS.names
        if name != "boxes"
    }
    return pa.table([columns.get(name, boxes) for name in COLUMNS.names], schema=schema)


def write_rows(path: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Write ``tables``, a row group each, under a temporary name that becomes ``path`` when all is written.

    Raises:
        RunError: the disk is full or not writable.
    """
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in tables:
            writer.write_table(table)


@dataclass(frozen=True)
class Keys:
    """What tells rows apart, of some rows that follow each other."""

    first: int  # row
    images: pa.Array  # (n,) string
    bytes: np.ndarray  # (n,) int64, of the image's file; -1: not known
    reasons: np.ndarray  # (n,) uint32: a checksum of why the image can't be used; 0: it can


class ProposalFile:
    """A finished proposals file or a part of one. Its rows are read when asked for.

    Raises (also from ``read_keys`` and ``rows``):
        DataError: truncated, damaged, or not a proposals file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._readable(), self._open() as handle:
            self.metadata = metadata_of(path, handle.schema_arrow)
            groups = range(handle.num_row_groups)
            counts = np.array([handle.metadata.row_group(group).num_rows for group in groups], np.int64)
        self.starts = np.concatenate([[0], counts.cumsum()])  # first row of each row group, and the end

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read_keys(self) -> Iterator[Keys]:
        with self._readable(), self._open() as handle:
            first = 0
            for batch in handle.iter_batches(ROW_GROUP, columns=["image", "bytes", "error"]):
                errors = batch.column("error")
                reasons = np.zeros(len(batch), np.uint32)
                for i in np.flatnonzero(errors.is_valid().to_numpy(zero_copy_only=False)):
                    reasons[i] = zlib.crc32(errors[int(i)].as_py().encode()) or 1
                sizes = batch.column("bytes").fill_null(-1).to_numpy()
                yield Keys(first, batch.column("image"), sizes, reasons)
                first += len(batch)

    def rows(self, start: int, stop: int, cache: OrderedDict) -> pa.Table:
        """Rows [start, stop). ``cache`` keeps the last row groups of all files that are being merged."""
        tables = []
        while start < stop:
            group = int(np.searchsorted(self.starts, start, "right")) - 1
            first, end = int(self.starts[group]), int(self.starts[group + 1])
            taken = min(stop, end) - start
            tables.append(self._group(group, cache).slice(start - first, taken))
            start += taken
        return pa.concat_tables(tables)

    def _group(self, group: int, cache: OrderedDict) -> pa.Table:
        key = (self.path, group)
        if key not in cache:
            with self._readable(), self._open() as handle:
                cache[key] = handle.read_row_group(group)
            while len(cache) > 1 and sum(table.nbytes for table in cache.values()) > CACHED_BYTES:
                cache.popitem(last=False)
        cache.move_to_end(key)
        return cache[key]

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, memory_map=True, page_checksum_verification=True)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        with readable(self.path):
            yield


class ProposalStore:
    """Proposals of all usable images, in the order of their names.

    Without ``cache`` the file is decompressed into this process's memory. With it, the rows are written once
    as an Arrow file into the folder ``cache`` and mapped from there: processes that open the same file share
    its pages, and memory stays flat. A pickled store is its two paths; the file is opened again on arrival.

    Raises:
        DataError: no such file, truncated, damaged, not a proposals file, or without one usable image.
    """

    def __init__(self, path: Path | str, cache: Path | str | None = None) -> None:
        self.path = Path(path)
        self.cache = None if cache is None else Path(cache)
        with readable(self.path):
            if self.cache is None:
                handle = pq.ParquetFile(self.path, memory_map=True, page_checksum_verification=True)
                self.metadata = metadata_of(self.path, handle.schema_arrow)
                table = handle.read()
            else:
                table = _mapped(self.path, self.cache)
                self.metadata = metadata_of(self.path, table.schema)
        self._table = table
        # 4 bytes an image. All else stays in Arrow's memory, which processes share where it is mapped.
        self._rows = np.flatnonzero(table["error"].is_null().to_numpy()).astype(np.uint32)
        if len(self._rows) == 0:
            raise DataError(f"{self.path}: none of its {len(table)} images could be used")
        # Views into the Arrow buffers, one set a chunk: boxes(i) then costs a search and two slices.
        batches = [batch for batch in table.to_batches() if len(batch)]
        self._starts = [0]
        for batch in batches:
            self._starts.append(self._starts[-1] + len(batch))
        self._width = [batch.column("width").to_numpy() for batch in batches]
        self._height = [batch.column("height").to_numpy() for batch in batches]
        self._offsets = [batch.column("boxes").offsets.to_numpy() for batch in batches]
        self._values = [_floats(batch.column("boxes")) for batch in batches]

    @classmethod
    def open(cls, path: Path | str, cache: Path | str | None = None) -> ProposalStore:
        return cls(path, cache)

    @property
    def settings(self) -> dict[str, Any]:
        """What the boxes were made with: a dumped :class:`headstart.proposals.ProposalSettings`."""
        return self.metadata["settings"]

    @cached_property
    def images(self) -> Names:
        """Names of the usable images."""
        return Names(self._table["image"], self._rows)

    @cached_property
    def failures(self) -> dict[str, str]:
        """Images that can't be used -> the reason."""
        failed = self._table.select(["image", "error"]).filter(self._table["error"].is_valid())
        return dict(zip(failed["image"].to_pylist(), failed["error"].to_pylist(), strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def boxes(self, i: int) -> np.ndarray:
        """(n, 4) float32 xyxy in px of the upright original, n >= 1. A read-only view: copy to change it."""
        chunk, place = self._place(i)
        offsets = self._offsets[chunk]
        return self._values[chunk][offsets[place] : offsets[place + 1]]

    def usable(self, row: int) -> int | None:
        """The usable image that a row of the file is; None: none."""
        i = int(np.searchsorted(self._rows, row))
        return i if i < len(self._rows) and self._rows[i] == row else None

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of the upright original, px."""
        chunk, place = self._place(i)
        return int(self._width[chunk][place]), int(self._height[chunk][place])

    def _place(self, i: int) -> tuple[int, int]:
        row = int(self._rows[i])
        chunk = bisect_right(self._starts, row) - 1
        return chunk, row - self._starts[chunk]

    def check_images(self, images: ImageSet | Path | str) -> None:
        """Raises: DataError when these are not the images of the file, by name and size, naming the first few."""
        images = images if isinstance(images, ImageSet) else ImageSet(images)
        inside = np.zeros(len(images), bool)
        gone, changed = _Few(), _Few()
        for batch in self._table.select(["image", "bytes"]).to_batches(ROW_GROUP):
            names, sizes = batch.column("image"), batch.column("bytes").fill_null(-1).to_numpy()
            places = images.locate(names)
            here = places >= 0
            inside[places[here]] = True
            gone.add(names, ~here)
            now = np.full(len(places), -1, np.int64)
            now[here] = images.sizes(places[here])
            changed.add(names, here & (now != sizes), (sizes, now))
        new = _Few(int((~inside).sum()), [images.names[int(i)] for i in np.flatnonzero(~inside)[:NAMED]])
        problems = [
            f"{few.count:,} images {text}: {', '.join(few.shown)}{', ...' if few.count > len(few.shown) else ''}"
            for few, text in (
                (new, "of the folder are not in the file"),
                (gone, "of the file are not in the folder"),
                (changed, "have the same name but another content"),
            )
            if few.count
        ]
        if problems:
            update = f"`headstart propose {images.path} --out {self.path}` brings it up to date"
            raise DataError(
                f"{self.path} does not belong to the images in {images.path}: {'; '.join(problems)}. "
                f"{'Use the file that was made for them' if not inside.any() else update}."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


@dataclass
class _Few:
    """How many, and the first few by name."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, names: pa.Array, which: np.ndarray, sizes: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Args: sizes: in bytes, then and now."""
        self.count += int(which.sum())
        for i in np.flatnonzero(which)[: NAMED - len(self.shown)]:
            remark = "" if sizes is None else f" ({sizes[0][i]:,} bytes then, {sizes[1][i]:,} now)"
            self.shown.append(names[int(i)].as_py() + remark)


def schema_for(metadata: dict[str, Any]) -> pa.Schema:
    return COLUMNS.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})


def metadata_of(path: Path, schema: pa.Schema) -> dict[str, Any]:
    metadata = _parsed((schema.metadata or {}).get(METADATA_KEY, b""))
    first = pa.schema(list(schema)[: len(COLUMNS)])  # a detector's own boxes have scores besides
    if not isinstance(metadata, dict) or "settings" not in metadata or not first.equals(COLUMNS):
        raise DataError(
            f"{path}: a Parquet file, but not one that `headstart propose` wrote (columns: "
            f"{', '.join(schema.names[:8])}); expected {', '.join(COLUMNS.names)}"
        )
    return metadata


@lru_cache(16)  # parts of one file, of which there may be thousands, share it
def _parsed(metadata: bytes) -> Any:
    try:
        return json.loads(metadata)
    except ValueError:
        return None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Arrow's many errors while reading ``path`` become one DataError that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `headstart propose` makes it") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{path}: truncated, damaged, or not a Parquet file of proposals ({reason}). "
            "Delete it and call `headstart propose` again: what only it held is made anew."
        ) from error


def _floats(chunk: pa.ListArray) -> np.ndarray:
    values = chunk.values  # the whole child array: offsets count from its beginning, sliced or not
    return values.values.to_numpy(zero_copy_only=True)[4 * values.offset :].reshape(-1, 4)


def _batches(path: Path, source: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    with readable(path):  # named here, or an unreadable source would be taken for an unwritable cache
        yield from source.iter_batches(ROW_GROUP)


def _mapped(path: Path, cache: Path) -> pa.Table:
    """The rows of ``path`` as a memory-mapped Arrow file in ``cache``, written first if it is not there."""
    status = os.stat(path)
    # Another file, or this one written anew, gets another name: a stale copy can't be taken for it.
    key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    target = cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
    if not target.exists():
        source = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        metadata_of(path, source.schema_arrow)
        with replacing(target) as temporary, pa.ipc.new_file(str(temporary), source.schema_arrow) as writer:
            for batch in _batches(path, source):
                writer.write_batch(batch)
    with readable(target):
        return pa.ipc.open_file(pa.memory_map(str(target))).read_all()
