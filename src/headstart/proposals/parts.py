"""A proposals file in the making: its parts, who may write them, and which image's row is where.

Finished rows lie in ``<out>.parts/``, a small Parquet file every few seconds, written by one process or by the jobs
of an array, each on its share of the images. Who comes last joins all rows into ``out``, then removes the parts.

The locks go with the process that holds them, however that ends. On a file system without locks (a warning says so)
nobody is refused. Still no row is lost: a part is written once, under a name of its own, and is removed only when all
its rows are in ``out``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from headstart import console
from headstart.datasets.image_set import ImageSet
from headstart.errors import RunError, SettingsError
from headstart.files import TEMPORARY_PREFIX, clear_leftovers
from headstart.proposals.store import NAMED, ROW_GROUP, ProposalFile

PART_PREFIX = "part-"
INDEX_PREFIX = "images-"  # of the lists of images that processes share with their workers
LOCK_PREFIX = "lock"


class Share:
    """Share ``number`` of ``of`` equal shares of all images: a block of them in the order of their names.

    A block, so that its images lie in few tar shards, its rows in few parts, and joining goes from part to part.
    """

    def __init__(self, number: int, of: int) -> None:
        self.number, self.of = number, of

    @classmethod
    def parse(cls, value: Share | tuple[int, int] | str) -> Share:
        """Raises: SettingsError unless ``value`` is "i/n" or (i, n) with 0 <= i < n."""
        if isinstance(value, Share):
            return value
        if isinstance(value, str):
            found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", value)
            pair = (int(found[1]), int(found[2])) if found else None
        else:
            pair = value
        if not (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and all(isinstance(part, int) for part in pair)
            and 0 <= pair[0] < pair[1]
        ):
            raise SettingsError(f"shard {value}: expected i/n with i from 0 to n-1; for three jobs 0/3, 1/3 and 2/3")
        return cls(*pair)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def block(self, images: int) -> slice:
        return slice(images * self.number // self.of, images * (self.number + 1) // self.of)

    def counts(self, places: np.ndarray, images: int) -> dict[str, int]:
        """How many of ``places`` each share has, of those that have any."""
        ends = [images * (i + 1) // self.of for i in range(self.of)]
        counts = np.bincount(np.searchsorted(ends, places, "right"), minlength=self.of)
        return {f"{i}/{self.of}": int(counts[i]) for i in np.flatnonzero(counts)}


class Rows:
    """Where each image's row is; 12 bytes an image.

    Args:
        images: a row belongs to the image of its name, if that still has its size in bytes.
    """

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.files: list[ProposalFile] = []
        self._file = np.full(len(images), -1, np.int32)
        self._row = np.zeros(len(images), np.int32)
        self._reason = np.zeros(len(images), np.uint32)
        self._gone: list[int] = []  # by file: rows of images that are not there
        self.first_gone: list[str] = []
        self.known = 0  # rows of images that are there, whatever their size

    def add(self, file: ProposalFile, check: slice = slice(None), retry: bool = False) -> None:
        """Take up the rows of ``file`` for images that have none yet, or one that says they can't be used.

        Args:
            check: the images whose sizes are compared; looking them up takes long on a cluster's file system.
            retry: leave out rows that say that an image can't be used, within ``check``.
        """
        number = len(self.files)
        self.files.append(file)
        self._gone.append(0)
        start, stop, _ = check.indices(len(self.images))
        for keys in file.read_keys():
            places = self.images.locate(keys.images)
            here = places >= 0
            self._note_gone(keys.images, ~here)
            rows = keys.first + np.flatnonzero(here)
            places, sizes, reasons = places[here], keys.bytes[here], keys.reasons[here]
            checked = (places >= start) & (places < stop)
            valid = np.ones(len(places), bool)
            valid[checked] = sizes[checked] == self.images.sizes(places[checked])
            if retry:
                valid &= ~(checked & (reasons != 0))
            valid &= (self._file[places] < 0) | (self._reason[places] != 0)
            places = places[valid]
            self._file[places], self._row[places], self._reason[places] = number, rows[valid], reasons[valid]

    def _note_gone(self, names: pa.Array, which: np.ndarray) -> None:
        self._gone[-1] += int(which.sum())
        self.known += int((~which).sum())
        for i in np.flatnonzero(which)[: NAMED - len(self.first_gone)]:
            self.first_gone.append(names[int(i)].as_py())

    @property
    def gone(self) -> int:
        """Rows of images that are not there."""
        return sum(self._gone)

    def gone_from(self, path: Path) -> int:
        return sum(count for file, count in zip(self.files, self._gone, strict=True) if file.path == path)

    def pending(self, block: slice = slice(None)) -> np.ndarray:
        """Places of the images without a row, sorted."""
        start = block.indices(len(self.images))[0]
        return np.flatnonzero(self._file[block] < 0) + start

    def done(self, block: slice = slice(None)) -> int:
        return int((self._file[block] >= 0).sum())

    def failed(self, block: slice = slice(None)) -> int:
        """Images that can't be used."""
        return int((self._reason[block] != 0).sum())

    def first_failures(self, block: slice, count: int) -> dict[str, str]:
        """Image -> why it can't be used, of the first ``count``."""
        start = block.indices(len(self.images))[0]
        found = {}
        for place in np.flatnonzero(self._reason[block] != 0)[:count] + start:
            row = int(self._row[place])
            table = self.files[self._file[place]].rows(row, row + 1, OrderedDict())
            found[self.images.names[int(place)]] = table["error"][0].as_py()
        return found

    def differ_from(self, finished: ProposalFile) -> bool:
        """Whether it has to be written anew. That failures failed again is no reason: caches stay good."""
        if len(finished) != len(self.images):
            return True
        number = next((i for i, file in enumerate(self.files) if file.path == finished.path), -1)
        for keys in finished.read_keys():
            here = slice(keys.first, keys.first + len(keys.reasons))
            same = (self._file[here] == number) | ((keys.reasons != 0) & (keys.reasons == self._reason[here]))
            if not same.all() or (self.images.locate(keys.images) != np.arange(here.start, here.stop)).any():
                return True
        return False

    def in_order(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows by name, ``ROW_GROUP`` at a time: however many there are, few are in memory."""
        cache: OrderedDict = OrderedDict()
        for first in range(0, len(self.images), ROW_GROUP):
            file, row = self._file[first : first + ROW_GROUP], self._row[first : first + ROW_GROUP]
            # Rows that follow each other in a file are taken at once.
            breaks = np.flatnonzero((np.diff(file) != 0) | (np.diff(row) != 1)) + 1
            tables = [
                self.files[file[start]].rows(int(row[start]), int(row[stop - 1]) + 1, cache)
                for start, stop in zip([0, *breaks], [*breaks, len(file)], strict=True)
            ]
            yield pa.concat_tables(tables).replace_schema_metadata(schema.metadata).combine_chunks()


class Parts:
    """The folder of parts."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".parts")
        self._locking = True  # until the file system says otherwise
        self._alone = False

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return self.path.exists()

    def files(self) -> list[Path]:
        return sorted(self.path.glob(f"{PART_PREFIX}*.parquet"))

    @contextlib.contextmanager
    def writing(self, share: Share | None) -> Iterator[None]:
        """Write parts: one process alone, or one for each share.

        Raises:
            RunError: another process does the same, or the folder can't be written.
        """
        with contextlib.ExitStack() as stack:
            held = self._lock(stack, LOCK_PREFIX, exclusive=share is None)
            if held and share is not None:
                name = f"{LOCK_PREFIX}-{share.number}-of-{share.of}"
                if not self._lock(stack, name, exclusive=True):
                    raise RunError(f"{self}: another process is making shard {share}. Wait for it.")
            if not held:
                raise RunError(f"{self}: another process is making these proposals. Wait for it.")
            self._alone = share is None
            if self._alone:
                self._clear_leftovers()
            yield

    @contextlib.contextmanager
    def joining(self, show: bool) -> Iterator[None]:
        """Join parts: one job at a time; the others wait. Whoever is last then sees the parts of all."""
        with contextlib.ExitStack() as stack:
            if not self._lock(stack, f"{LOCK_PREFIX}-join", exclusive=True):
                if show:
                    console.notes.print("Another job is joining the shards: waiting for it.")
                self._lock(stack, f"{LOCK_PREFIX}-join", exclusive=True, wait=True)
            yield

    def remove(self, files: list[Path]) -> None:
        """Remove parts whose rows are all in ``out``."""
        for file in files:
            file.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove the folder when it holds no more part and nobody else is at work in it. Whoever is, will."""
        with contextlib.ExitStack() as stack:
            if not self.exists() or self.files() or not self._lock(stack, LOCK_PREFIX, exclusive=True):
                return
            if self.files():
                return
            if self._alone or self._locking:
                self._clear_leftovers()
            # The lock that is held goes last.
            for lock in sorted(self.path.glob(f"{LOCK_PREFIX}*"), key=lambda path: path.name == LOCK_PREFIX):
                lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something of somebody else's is in it
                self.path.rmdir()

    def _clear_leftovers(self) -> None:
        """Of killed processes. Others must not be writing."""
        clear_leftovers(self.path)
        for index in self.path.glob(f"{INDEX_PREFIX}*.arrow"):
            index.unlink(missing_ok=True)
        pattern = re.compile(re.escape(f"{TEMPORARY_PREFIX}{self.out.name}-") + r"\d+-[0-9a-f]{8}")
        for leftover in self.out.parent.iterdir():
            if pattern.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)

    def _lock(self, stack: contextlib.ExitStack, name: str, exclusive: bool, wait: bool = False) -> bool:
        """Hold the lock until ``stack`` closes; False when another process holds it."""
        try:
            import fcntl
        except ImportError:  # Windows
            self._no_locks()
            self._made()
            return True
        path = self.path / name
        mode = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
        while True:
            self._made()
            try:
                handle = open(path, "a+")  # noqa: SIM115 - the stack closes it
            except FileNotFoundError:  # the folder was removed in this moment
                continue
            except OSError as error:
                raise self._unwritable(error) from error
            try:
                fcntl.flock(handle, mode)
            except BlockingIOError:
                handle.close()
                return False
            except OSError:
                self._no_locks()
                stack.enter_context(handle)
                return True
            # Was the file removed between opening and locking it? Then the lock keeps nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                    stack.enter_context(handle)
                    return True
            handle.close()

    def _made(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(f"{self}: can't be written ({error.strerror}). Choose another --out.")

    def _no_locks(self) -> None:
        if self._locking:
            self._locking = False
            console.notes.print(
                f"{self}: this file system has no locks; see to it that no two processes make the same shard.",
                markup=False,
            )
