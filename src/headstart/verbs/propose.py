"""A folder of images -> a file of proposals. Can be killed at any moment and called again.

Finished images are kept in ``<out>.parts/``, a small Parquet file every few seconds. A call does the images
that are neither there nor in a finished ``out`` (new, changed, or unreadable before) and at the end copies
all rows, in the order of their names, into ``out``. What an image gets depends on its pixels, its path and
the settings alone, so that the table does not depend on workers, order or interruptions.
"""

from __future__ import annotations

import contextlib
import glob
import multiprocessing
import os
import shutil
import signal
import threading
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from headstart import boxes as box_ops
from headstart import console
from headstart.datasets.images import decode, list_images, size_of
from headstart.errors import DataError, ImageError, RunError
from headstart.files import TEMPORARY_PREFIX, clear_leftovers
from headstart.proposals import ProposalEngine, ProposalSettings
from headstart.proposals.filters import FALLBACKS
from headstart.proposals.finder import Finder
from headstart.proposals.store import (
    ROW_GROUP,
    ProposalFile,
    Row,
    readable,
    schema_for,
    table_of,
    write_rows,
)

__all__ = ["ProposalSettings", "ProposeSummary", "propose"]

PART_IMAGES = 512
PART_SECONDS = 10.0  # at most this much work of all workers is lost when everything is killed
CHUNK = 8  # images a worker is handed at a time
EARLY_CHECK_IMAGES = 50


@dataclass(frozen=True)
class ProposeSummary:
    """What a proposals file holds."""

    path: Path
    images: int  # usable ones, with at least one box each
    boxes_per_image: dict[str, float]  # mean, median, min, max
    fallbacks: dict[str, int]  # images for which no box passed the filter, by what was done instead
    failures: dict[str, str]  # image -> reason
    seconds: float  # of this call
    new_images: int  # done by this call
    gone_images: int  # of an earlier call, no longer in the folder: left out
    size_counts: tuple[int, ...]  # boxes with sqrt(wh)/sqrt(WH) in [0, .1), [.1, .2) ... [.9, 1]

    def table(self) -> Table:
        table = Table(title="Proposals", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row("images", f"{self.images:,}")
        numbers = self.boxes_per_image
        table.add_row(
            "boxes an image",
            f"mean {numbers['mean']:.1f}, median {numbers['median']:g}, min {numbers['min']:g}, max {numbers['max']:g}",
        )
        table.add_row("box size", self._histogram())
        used = [f"{name}: {count:,}" for name, count in self.fallbacks.items() if count]
        table.add_row("filter fell back", ", ".join(used) or "never")
        if self.failures:
            shown = [f"{name}: {reason}" for name, reason in list(self.failures.items())[:10]]
            more = len(self.failures) - len(shown)
            lines = [f"{len(self.failures):,}, left out", *shown] + [f"... and {more:,} more"] * (more > 0)
            table.add_row("can't be used", "\n".join(line.replace("[", r"\[") for line in lines))
        if self.gone_images:
            table.add_row("no longer there", f"{self.gone_images:,} images of an earlier call, left out")
        pace = f", {self.seconds / self.new_images:.3f} s an image" if self.new_images else ""
        table.add_row("this call", f"{self.new_images:,} images in {console.short_time(self.seconds)}{pace}")
        table.add_row("file", str(self.path).replace("[", r"\["))
        return table

    def _histogram(self) -> str:
        highest = max(max(self.size_counts), 1)
        bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // highest)] for count in self.size_counts)
        return f"0 |{bars}| 1   sqrt(box area / image area)"


def propose(
    images: Path | str,
    out: Path | str | None = None,
    *,
    settings: ProposalSettings | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> ProposeSummary:
    """Find boxes in every image under ``images`` and keep them in one Parquet file.

    A call continues what an earlier one has left, whether that was interrupted or finished.

    Args:
        images: folder, searched recursively.
        out: the file; default ``<images>.proposals.parquet`` beside the folder.
        settings: default: the paper's.
        workers: processes; default one a core; 0 works in this process.
        progress: show a progress bar.

    Raises:
        DataError: no images, too many that can't be read, a damaged file, or one of other images.
        RunError: ``out`` was made with other settings, another process is writing it, or the disk is full.
        SettingsError: the engine can't work here.
    """
    start = time.monotonic()
    folder = Path(images)
    settings = settings or ProposalSettings()
    finder = Finder(settings)
    engine = finder.engine  # here first: what is wrong with it is said once, not by every worker
    names = list_images(folder)
    out = default_out(folder) if out is None else Path(out)
    if out.is_dir():
        raise RunError(f"{out}: is a folder; expected a file name such as {out / 'proposals.parquet'}")
    parts = out.with_name(out.name + ".parts")
    metadata = _metadata(settings, engine, folder)

    earlier = [ProposalFile(out)] if out.exists() else []
    if not parts.exists() and earlier:
        state = _State(earlier, out, folder, names, engine.version)
        _check_same(earlier, metadata, state.pending)
        if not state.pending and not state.gone:
            _check_unreadable(state, folder, settings, out, finished=True)
            return _summary(out, time.monotonic() - start, 0, 0)

    with _only_writer(parts):
        try:
            clear_leftovers(parts)
            for leftover in out.parent.glob(f"{TEMPORARY_PREFIX}{glob.escape(out.name)}-*-????????"):
                leftover.unlink()
            files = [out] * out.exists() + sorted(parts.glob("*.parquet"))
            state = _State([ProposalFile(file) for file in files], out, folder, names, engine.version)
            _check_same(state.files, metadata, state.pending)
            _check_unreadable(state, folder, settings, parts)
            _work(state, folder, finder, workers, progress, parts, metadata)
            _check_unreadable(state, folder, settings, parts, finished=True)
            if state.differs_from_finished():
                schema = schema_for(metadata)
                write_rows(out, state.rows_in_order(schema), schema)
            shutil.rmtree(parts)
        except KeyboardInterrupt:
            console.notes.print(
                f"Stopped. What is done is saved in {parts}; the same command goes on from there.",
                markup=False,
            )
            raise
    return _summary(out, time.monotonic() - start, state.new, state.gone)


def default_out(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.proposals.parquet")


class _State:
    """Which image's row is where, and which images are still to be done."""

    def __init__(
        self, files: list[ProposalFile], out: Path, folder: Path, names: list[str], engine_version: str
    ) -> None:
        self.files = files
        self.out = out
        self.names = names
        self.new = 0
        self.place: dict[str, tuple[int, int]] = {}  # image -> file, row
        self.failures: dict[str, str] = {}
        listed = set(names)
        gone = set()
        for index, file in enumerate(files):
            # A failure may have been a disk that was away for a moment: a later call tries again.
            again = file.path == out and file.metadata["engine_version"] == engine_version
            for row, (name, size, error) in enumerate(zip(file.images, file.bytes, file.errors, strict=True)):
                if name not in listed:
                    gone.add(name)
                elif size == _file_size(folder / name) and not (again and error is not None):
                    self._add(name, index, row, error)
        if gone and listed.isdisjoint(name for file in files for name in file.images):
            raise DataError(
                f"{out}: belongs to other images ({', '.join(sorted(gone)[:5])}, ...), of which none is in "
                f"{folder}. Choose another --out."
            )
        self.gone = len(gone)
        self.pending = [name for name in names if name not in self.place]

    def _add(self, name: str, index: int, row: int, error: str | None) -> None:
        self.place[name] = (index, row)
        self.failures.pop(name, None)
        if error is not None:
            self.failures[name] = error

    def add_part(self, path: Path) -> None:
        self.files.append(ProposalFile(path))
        for row, (name, error) in enumerate(zip(self.files[-1].images, self.files[-1].errors, strict=True)):
            self._add(name, len(self.files) - 1, row, error)
        self.new += len(self.files[-1].images)

    def differs_from_finished(self) -> bool:
        """Whether ``out`` has to be written. That failures failed again is no reason: caches stay good."""
        if not self.files or self.files[0].path != self.out or self.files[0].images != self.names:
            return True
        return any(
            self.place[name][0] != 0 and (error is None or error != self.failures.get(name))
            for name, error in zip(self.files[0].images, self.files[0].errors, strict=True)
        )

    def rows_in_order(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows by name, ``ROW_GROUP`` at a time: however many there are, few are in memory."""
        cache: OrderedDict = OrderedDict()
        for first in range(0, len(self.names), ROW_GROUP):
            runs: list[list[int]] = []  # [file, start, stop] of rows that follow each other in a file
            for name in self.names[first : first + ROW_GROUP]:
                index, row = self.place[name]
                if runs and runs[-1][0] == index and runs[-1][2] == row:
                    runs[-1][2] += 1
                else:
                    runs.append([index, row, row + 1])
            tables = [self.files[index].rows(start, stop, cache) for index, start, stop in runs]
            yield pa.concat_tables(tables).replace_schema_metadata(schema.metadata).combine_chunks()


def _work(
    state: _State,
    folder: Path,
    finder: Finder,
    workers: int | None,
    progress: bool,
    parts: Path,
    metadata: dict[str, Any],
) -> None:
    """Do ``state.pending``, writing a part every few seconds."""
    pending = state.pending
    if not pending:
        return
    workers = min(_cores() if workers is None else workers, -(-len(pending) // CHUNK))
    schema = schema_for(metadata)
    waiting: list[Row] = []
    last_part = time.monotonic()

    def save() -> None:
        nonlocal last_part
        if waiting:
            part = parts / f"part-{uuid.uuid4().hex}.parquet"
            rows = sorted(waiting, key=lambda row: row.image)
            write_rows(part, iter([table_of(rows, schema)]), schema)
            waiting.clear()
            state.add_part(part)
        last_part = time.monotonic()

    results = (
        _in_this_process(pending, folder, finder) if workers == 0 else _in_processes(pending, folder, finder, workers)
    )
    with (
        console.progress("proposals", len(pending), "images", show=progress) as bar,
        contextlib.closing(results),
    ):
        try:
            for rows in results:
                waiting += rows
                seen = len(state.place) + len(waiting)
                failed = len(state.failures) + sum(row.error is not None for row in waiting)
                bar.advance(len(rows), f"{failed} can't be used" if failed else None)
                too_many = seen >= EARLY_CHECK_IMAGES and failed > finder.settings.max_unreadable * seen
                if too_many or len(waiting) >= PART_IMAGES or time.monotonic() - last_part > PART_SECONDS:
                    save()
                    _check_unreadable(state, folder, finder.settings, parts)
        finally:  # whatever stops it, Ctrl-C included
            save()


def _in_this_process(pending: list[str], folder: Path, finder: Finder) -> Generator[list[Row], None, None]:
    for name in pending:
        yield [_row(folder, name, finder)]


def _in_processes(pending: list[str], folder: Path, finder: Finder, workers: int) -> Generator[list[Row], None, None]:
    """Rows as they come. An image that kills its worker (out of memory, a library's crash) is a failure."""
    chunks = deque(pending[i : i + CHUNK] for i in range(0, len(pending), CHUNK))
    while chunks:
        running: dict[Future, list[str]] = {}
        with _pool(folder, finder, workers) as pool:
            try:
                while chunks or running:
                    while chunks and len(running) < 3 * workers:
                        running[_submit(pool, chunks[0])] = chunks[0]
                        chunks.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        rows = future.result()
                        del running[future]
                        yield rows
            except BrokenProcessPool:
                pass
        suspects = [name for chunk in running.values() for name in chunk]
        while suspects:  # one at a time, to tell the culprit from those it took along
            with _pool(folder, finder, 1) as pool:
                try:
                    while suspects:
                        yield _submit(pool, suspects[:1]).result()
                        suspects.pop(0)
                except BrokenProcessPool:
                    name = suspects.pop(0)
                    reason = "its worker process died (out of memory, or a crash in a library)"
                    yield [Row(name, _file_size(folder / name), error=reason)]


@contextlib.contextmanager
def _pool(folder: Path, finder: Finder, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Workers started by spawn: a fork would inherit locks from the threads of torch and OpenCV."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (folder, finder, stop))
    try:
        try:
            _submit(pool, []).result()
        except BrokenProcessPool:
            raise RunError(
                "The worker processes can't start (see above). In a script of your own, call headstart below "
                '`if __name__ == "__main__":`, as Python asks of all programs with worker processes; '
                "or work in one process: workers=0."
            ) from None
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, names: list[str]) -> Future:
    """Hand over ``names``. This may start a process, which inherits that Ctrl-C is blocked: the parent alone
    answers it, also while workers are still importing."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return pool.submit(_do, names)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_do, names)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[Path, Finder, Event]


def _start_worker(folder: Path, finder: Finder, stop: Event) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it can't be blocked
    threading.Thread(target=_die_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    _worker = (folder, finder, stop)


def _die_with_parent() -> None:
    """A worker waits for work on a pipe that it holds open itself: without this, kill -9 would orphan it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(names: list[str]) -> list[Row]:
    folder, finder, stop = _worker
    return [_row(folder, name, finder) for name in names if not stop.is_set()]


def _row(folder: Path, name: str, finder: Finder) -> Row:
    path = folder / name
    file_bytes = _file_size(path)
    try:
        width, height = size_of(path)
        found = finder(decode(path, finder.decode_px(width, height)), width, height, name)
    except ImageError as error:
        return Row(name, file_bytes, error=str(error).removeprefix(f"{path}: "))
    except Exception as error:  # whatever one image does to a library, the others are still to be done
        return Row(name, file_bytes, error=f"{finder.settings.engine} failed ({type(error).__name__}: {error})")
    return Row(name, file_bytes, width, height, found.boxes, found.n_raw, found.fallback)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _file_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@contextlib.contextmanager
def _only_writer(parts: Path) -> Iterator[None]:
    """Hold a lock in ``parts`` (made if need be); it goes with the process, however that ends."""
    try:
        parts.mkdir(parents=True, exist_ok=True)
        handle = open(parts / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"{parts}: can't be written ({error.strerror}). Choose another --out.") from error
    with handle:
        try:
            import fcntl
        except ImportError:  # Windows
            pass
        else:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{parts}: another process is making these proposals. Wait for it.") from None
            except OSError:
                pass  # a file system without locks
        yield


def _metadata(settings: ProposalSettings, engine: ProposalEngine, folder: Path) -> dict[str, Any]:
    try:
        headstart_version = version("headstart")
    except PackageNotFoundError:
        headstart_version = "not installed"
    return {
        "settings": settings.model_dump(),
        "engine": engine.name,
        "engine_version": engine.version,
        "folder": folder.resolve().name,
        "headstart": headstart_version,
    }


def _check_same(files: Iterable[ProposalFile], metadata: dict[str, Any], pending: list[str]) -> None:
    """Rows made in two ways must not get into one table."""
    for file in files:
        old, new = dict(file.metadata["settings"]), dict(metadata["settings"])
        if pending:  # a finished file stays usable when the library behind the engine is upgraded
            old["engine_version"] = file.metadata["engine_version"]
            new["engine_version"] = metadata["engine_version"]
        different = [
            f"{key} is {old.get(key, 'not set')} there and {new.get(key, 'not set')} now"
            for key in sorted({*old, *new} - {"max_unreadable"})
            if old.get(key) != new.get(key)
        ]
        if different:
            raise RunError(
                f"{file.path}: was made with other settings: {'; '.join(different)}. "
                "Use the same settings, choose another --out, or delete it."
            )


def _check_unreadable(
    state: _State, folder: Path, settings: ProposalSettings, saved: Path, finished: bool = False
) -> None:
    seen, failed = len(state.place), len(state.failures)
    if failed <= settings.max_unreadable * seen or (seen < EARLY_CHECK_IMAGES and not finished):
        return
    first = "".join(f"\n  {name}: {reason}" for name, reason in list(state.failures.items())[:5])
    raise DataError(
        f"{folder}: {failed} of {seen} images can't be used, more than the share "
        f"max_unreadable={settings.max_unreadable:g}:{first}{', ...' if failed > 5 else ''}\n"
        f"Mend or remove them, or allow more (max_unreadable={min(1.0, failed / seen + 0.05):.2f}), "
        f"and call again: what is done is saved in {saved}."
    )


def _summary(path: Path, seconds: float, new: int, gone: int) -> ProposeSummary:
    counts, fallbacks, failures = [], Counter[str](), {}
    sizes = np.zeros(10, np.int64)
    with readable(path):
        reader = pq.ParquetFile(path, memory_map=True)
        for batch in reader.iter_batches(ROW_GROUP):
            rows = {name: batch.column(name) for name in batch.schema.names}
            errors = zip(rows["image"].to_pylist(), rows["error"].to_pylist(), strict=True)
            failures.update({name: error for name, error in errors if error is not None})
            fallbacks.update(fallback for fallback in rows["fallback"].to_pylist() if fallback)
            lengths = rows["boxes"].value_lengths().to_numpy(zero_copy_only=False)
            counts.append(lengths[rows["error"].is_null().to_numpy(zero_copy_only=False)])
            xyxy = rows["boxes"].flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
            image_area = rows["width"].to_numpy().astype(np.float64) * rows["height"].to_numpy()
            relative = np.sqrt(box_ops.area(xyxy) / np.repeat(image_area, lengths))
            sizes += np.histogram(relative, bins=10, range=(0, 1 + 1e-6))[0]
    every = np.concatenate(counts) if counts and sum(map(len, counts)) else np.zeros(1, np.int64)
    return ProposeSummary(
        path=path,
        images=reader.metadata.num_rows - len(failures),
        boxes_per_image={
            "mean": float(every.mean()),
            "median": float(np.median(every)),
            "min": float(every.min()),
            "max": float(every.max()),
        },
        fallbacks={name: fallbacks[name] for name in FALLBACKS},
        failures=failures,
        seconds=seconds,
        new_images=new,
        gone_images=gone,
        size_counts=tuple(int(count) for count in sizes),
    )
