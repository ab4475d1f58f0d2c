"""Images -> a file of proposals. Can be killed at any moment and called again; can be shared by a cluster's jobs.

Finished images are kept in ``<out>.parts/``, a small Parquet file every few seconds. A call does the images
that are neither there nor in a finished ``out`` (new, changed, or unreadable before) and at the end copies
all rows, in the order of their names, into ``out``. What an image gets depends on its pixels, its name and
the settings alone, so that the table does not depend on workers, shards, order or interruptions.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
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
from headstart.datasets.image_set import ImageSet
from headstart.errors import DataError, ImageError, RunError
from headstart.files import replacing
from headstart.proposals import READ_BY, ProposalEngine, ProposalSettings
from headstart.proposals.filters import FALLBACKS
from headstart.proposals.finder import Finder
from headstart.proposals.parts import INDEX_PREFIX, PART_PREFIX, Parts, Rows, Share
from headstart.proposals.store import (
    NAMED,
    ROW_GROUP,
    ProposalFile,
    Row,
    readable,
    schema_for,
    table_of,
    write_rows,
)

__all__ = ["ProposalSettings", "ProposeSummary", "ShardSummary", "propose"]

PART_IMAGES = 2048
PART_SECONDS = 5.0  # at most this much work of all workers is lost when everything is killed
CHUNK = 8  # images a worker is handed at a time
CHUNK_SECONDS = 1.0  # after which it returns what it has
EARLY_CHECK_IMAGES = 50
SLOW_JOIN_IMAGES = 50_000  # from here on joining takes seconds, and shows how far it is
SHOWN = 10  # images that a summary names
# Settings that change no boxes. The version of the engine names its weights, wherever they lie.
NO_MATTER = {"max_unreadable", "features_weights", "features_backbone"}
UNUSABLE_SUFFIX = ".unusable.tsv"  # of the list of all others, beside the file


@dataclass(frozen=True)
class ProposeSummary:
    """What a proposals file holds."""

    path: Path
    images: int  # usable ones, with at least one box each
    boxes_per_image: dict[str, float]  # mean, median, min, max
    fallbacks: dict[str, int]  # images for which no box passed the filter, by what was done instead
    unusable_images: int
    failures: dict[str, str]  # image -> why it can't be used; the first ``SHOWN`` of them
    failures_file: Path | None  # all of them, where there are more: a line each, image and reason between a tab
    seconds: float  # of this call
    new_images: int  # done by this call
    gone_images: int  # of an earlier call, no longer there: left out
    size_counts: tuple[int, ...]  # boxes with sqrt(wh)/sqrt(WH) in [0, .1), [.1, .2) ... [.9, 1]

    def table(self) -> Table:
        table = _two_columns("Proposals")
        table.add_row("images", f"{self.images:,}")
        numbers = self.boxes_per_image
        table.add_row(
            "boxes an image",
            f"mean {numbers['mean']:.1f}, median {numbers['median']:g}, min {numbers['min']:g}, max {numbers['max']:g}",
        )
        table.add_row("box size", self._histogram())
        used = [f"{name}: {count:,}" for name, count in self.fallbacks.items() if count]
        table.add_row("filter fell back", ", ".join(used) or "never")
        _add_failures(table, self.unusable_images, self.failures, self.failures_file)
        if self.gone_images:
            table.add_row("no longer there", f"{self.gone_images:,} images of an earlier call, left out")
        table.add_row("this call", _pace(self.new_images, self.seconds))
        table.add_row("file", _plain(self.path))
        return table

    def _histogram(self) -> str:
        highest = max(max(self.size_counts), 1)
        bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // highest)] for count in self.size_counts)
        return f"0 |{bars}| 1   sqrt(box area / image area)"


@dataclass(frozen=True)
class ShardSummary:
    """What a job with ``shard`` did, while other shards are not finished."""

    path: Path  # of the file that is not there yet
    parts: Path
    shard: str  # "i/n"
    images: int  # of this shard
    new_images: int  # done by this call
    unusable_images: int  # of this shard
    failures: dict[str, str]  # image -> why it can't be used; the first ``SHOWN`` of them
    missing_images: int  # of all images
    missing: dict[str, int] = field(default_factory=dict)  # shard -> its images without a row
    unlisted_images: int = 0  # with a row from another job, added after this one had listed the images
    seconds: float = 0.0  # of this call

    def table(self) -> Table:
        table = _two_columns(f"Proposals, shard {self.shard}")
        table.add_row("images", f"{self.images:,} of this shard")
        _add_failures(table, self.unusable_images, self.failures, None)
        table.add_row("this call", _pace(self.new_images, self.seconds))
        if self.missing_images:
            shown = [f"{shard}: {count:,}" for shard, count in list(self.missing.items())[:SHOWN]]
            more = f", and {len(self.missing) - SHOWN} more shards" if len(self.missing) > SHOWN else ""
            table.add_row("still missing", f"{self.missing_images:,} images ({', '.join(shown)}{more})")
            text = (
                "The job that finishes last writes the file. If jobs died: start them again, or call without --shard."
            )
        else:
            table.add_row("not listed here", f"{self.unlisted_images:,} images that other jobs found later")
            text = "Call without --shard to write the file."
        table.add_row("parts", _plain(self.parts))
        table.add_row("next", text)
        return table


def _two_columns(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _add_failures(table: Table, count: int, failures: dict[str, str], file: Path | None) -> None:
    if not count:
        return
    lines = [f"{count:,}, left out", *(f"{name}: {reason}" for name, reason in failures.items())]
    if count > len(failures):
        lines.append(f"... and {count - len(failures):,} more" + (f"; all of them: {file}" if file else ""))
    table.add_row("can't be used", "\n".join(_plain(line) for line in lines))


def _pace(images: int, seconds: float) -> str:
    pace = f", {seconds / images:.3f} s an image" if images else ""
    return f"{images:,} images in {console.short_time(seconds)}{pace}"


def _plain(text: Path | str) -> str:
    return str(text).replace("[", r"\[")


def propose(
    images: Path | str | ImageSet,
    out: Path | str | None = None,
    *,
    settings: ProposalSettings | None = None,
    workers: int | None = None,
    shard: tuple[int, int] | str | None = None,
    progress: bool = True,
) -> ProposeSummary | ShardSummary:
    """Find boxes in every image under ``images`` and keep them in one Parquet file.

    A call continues what an earlier one has left, whether that was interrupted or finished.

    Args:
        images: folder, searched recursively, .tar shards in it included; or one .tar file; or what an ImageSet has
            found there already.
        out: the file; default ``<images>.proposals.parquet`` beside the folder.
        settings: default: the paper's.
        workers: processes; default one a core; 0 works in this process.
        shard: "i/n" or (i, n), i from 0 to n-1: do the i-th of n equal shares of the images, for the jobs of a
            cluster that share ``out``. The job that finishes last joins all shares into ``out``; should jobs have
            died, a call without ``shard`` does what is missing and joins. Any n goes with any other.
        progress: show a progress bar, and what is wrong with shards of tar files.

    Returns:
        ProposeSummary: of ``out``. With ``shard`` and without other jobs' shares yet, a ShardSummary.

    Raises:
        DataError: no images, too many that can't be read, a damaged file, or one of other images.
        RunError: ``out`` was made with other settings, another process is writing it, or the disk is full.
        SettingsError: the engine can't work here, or ``shard`` is not one of n.
    """
    start = time.monotonic()
    share = None if shard is None else Share.parse(shard)
    finder = Finder(settings or ProposalSettings())
    engine = finder.engine  # here first: what is wrong with it is said once, not by every worker
    found = images if isinstance(images, ImageSet) else ImageSet(images, progress)
    if progress and found is not images:
        found.print_notes()
    out = default_out(found.path) if out is None else Path(out)
    if out.is_dir():
        raise RunError(f"{out}: is a folder; expected a file name such as {out / 'proposals.parquet'}")
    making = _Making(found, finder, out, _metadata(finder.settings, engine, found.path), share, progress)

    if not making.parts.exists() and out.exists():
        rows = making.rows(making.block, retry=True)
        if not len(rows.pending(making.block)) and not rows.gone:
            making.check_unreadable(rows, slice(None), out, finished=True)
            return _summary(out, time.monotonic() - start, 0, 0)
        del rows

    try:
        with making.parts.writing(share), _shared(found, making.parts.path):
            rows = making.rows(making.block, retry=True)
            making.check_unreadable(rows, making.block, making.parts.path)
            new = making.work(rows, workers)
            gone = rows.gone
            if share is None:
                making.check_unreadable(rows, making.block, making.parts.path, finished=True)
                making.join(rows)
            else:
                del rows
                unfinished = making.join_if_last(new)
                if unfinished is not None:
                    return replace(unfinished, seconds=time.monotonic() - start)
        making.parts.clean()
    except KeyboardInterrupt:
        console.notes.print(
            f"Stopped. What is done is saved in {making.parts}; the same command goes on from there.",
            markup=False,
        )
        raise
    return _summary(out, time.monotonic() - start, new, gone)


def default_out(images: Path) -> Path:
    images = images.resolve()
    return images.with_name(f"{images.name}.proposals.parquet")


@dataclass
class _Making:
    """One call: which images, with what, where to."""

    images: ImageSet
    finder: Finder
    out: Path
    metadata: dict[str, Any]
    share: Share | None
    progress: bool

    def __post_init__(self) -> None:
        self.parts = Parts(self.out)
        self.block = slice(None) if self.share is None else self.share.block(len(self.images))

    def rows(self, check: slice, retry: bool) -> Rows:
        """What is done; ``check`` and ``retry`` as in :meth:`Rows.add`, the latter for the finished file's rows.

        Raises:
            DataError: a damaged file, or one of other images.
            RunError: made with other settings.
        """
        while True:
            files = [self.out] * self.out.exists() + self.parts.files()
            rows = Rows(self.images)
            try:
                for path in files:
                    file = ProposalFile(path)
                    # A failure may have been a disk that was away for a moment: a later call tries again.
                    again = path == self.out and file.metadata["engine_version"] == self.metadata["engine_version"]
                    rows.add(file, check, retry and again)
            except DataError:
                if all(path.exists() for path in files):
                    raise
                continue  # another job has joined parts in this moment: their rows are in ``out`` now
            if rows.gone and not rows.known:
                raise DataError(
                    f"{self.out}: belongs to other images ({', '.join(sorted(rows.first_gone))}, ...), of which none "
                    f"is in {self.images.path}. Choose another --out."
                )
            _check_same(rows.files, self.metadata, len(rows.pending(check)) > 0)
            return rows

    def work(self, rows: Rows, workers: int | None) -> int:
        """Do what ``rows`` lacks of ``block``, writing a part every few seconds. Returns the number of images."""
        pending = rows.pending(self.block)
        if not len(pending):
            return 0
        workers = min(_cores() if workers is None else workers, -(-len(pending) // CHUNK))
        schema = schema_for(self.metadata)
        waiting: list[Row] = []
        last_part = time.monotonic()

        def save() -> None:
            nonlocal last_part
            if waiting:
                part = self.parts.path / f"{PART_PREFIX}{uuid.uuid4().hex}.parquet"
                write_rows(part, iter([table_of(sorted(waiting, key=lambda row: row.image), schema)]), schema)
                waiting.clear()
                rows.add(ProposalFile(part), check=slice(0))
            last_part = time.monotonic()

        done, failed = rows.done(self.block), rows.failed(self.block)
        limit = self.finder.settings.max_unreadable
        chunks = ([self.images.names[int(i)] for i in pending[k : k + CHUNK]] for k in range(0, len(pending), CHUNK))
        if workers == 0:
            results = _in_this_process(chunks, self.images, self.finder)
        else:
            results = _in_processes(chunks, self.images, self.finder, workers)
        description = "proposals" if self.share is None else f"proposals, shard {self.share}"
        with (
            console.progress(description, len(pending), "images", show=self.progress) as bar,
            contextlib.closing(results),
        ):
            try:
                for some in results:
                    waiting += some
                    done += len(some)
                    failed += sum(row.error is not None for row in some)
                    bar.advance(len(some), f"{failed:,} can't be used" if failed else None)
                    too_many = done >= EARLY_CHECK_IMAGES and failed > limit * done
                    if too_many or len(waiting) >= PART_IMAGES or time.monotonic() - last_part > PART_SECONDS:
                        save()
                        self.check_unreadable(rows, self.block, self.parts.path)
            finally:  # whatever stops it, Ctrl-C included
                save()
        return len(pending)

    def join_if_last(self, new: int) -> ShardSummary | None:
        """Join when no image is missing; else say what is.

        Each job comes here after its last part is written, and one at a time: the last one sees all parts.
        """
        assert self.share is not None
        with self.parts.joining(self.progress):
            rows = self.rows(check=slice(0), retry=False)
            if not len(rows.pending()) and self.parts.files():
                rows = self.rows(check=slice(None), retry=False)  # the file shall be of the images as they are now
            missing, unlisted = rows.pending(), rows.gone - rows.gone_from(self.out)
            if not len(missing) and not unlisted:
                self.check_unreadable(rows, slice(None), self.parts.path, finished=True)
                self.join(rows)
                return None
            return ShardSummary(
                path=self.out,
                parts=self.parts.path,
                shard=str(self.share),
                images=len(range(*self.block.indices(len(self.images)))),
                new_images=new,
                unusable_images=rows.failed(self.block),
                failures=rows.first_failures(self.block, SHOWN),
                missing_images=len(missing),
                missing=self.share.counts(missing, len(self.images)),
                unlisted_images=unlisted,
            )

    def join(self, rows: Rows) -> None:
        """All rows into ``out``, if it has not got them yet; then the parts can go."""
        finished = next((file for file in rows.files if file.path == self.out), None)
        if finished is None or rows.differ_from(finished):
            # As the rows were made, which may be by an earlier version when none was to be made now.
            metadata = {**self.metadata, "engine_version": rows.files[0].metadata["engine_version"]}
            _check_same(rows.files, metadata, True)  # jobs that began at once did not see each other's parts
            schema = schema_for(metadata)
            show = self.progress and len(self.images) >= SLOW_JOIN_IMAGES
            with console.progress("joining", len(self.images), "images", show=show) as bar:
                write_rows(self.out, _counted(rows.in_order(schema), bar), schema)
        _list_unusable(self.out, rows.failed())
        self.parts.remove([file.path for file in rows.files if file.path != self.out])

    def check_unreadable(self, rows: Rows, block: slice, saved: Path, finished: bool = False) -> None:
        seen, failed = rows.done(block), rows.failed(block)
        share = self.finder.settings.max_unreadable
        if failed <= share * seen or (seen < EARLY_CHECK_IMAGES and not finished):
            return
        shown = rows.first_failures(block, NAMED)
        first = "".join(f"\n  {name}: {reason}" for name, reason in shown.items())
        raise DataError(
            f"{self.images.path}: {failed} of {seen} images can't be used, more than the share "
            f"max_unreadable={share:g}:{first}{', ...' if failed > len(shown) else ''}\n"
            f"Mend or remove them, or allow more (max_unreadable={min(1.0, failed / seen + 0.05):.2f}), "
            f"and call again: what is done is saved in {saved}."
        )


def _counted(tables: Iterator[pa.Table], bar: console.Bar) -> Iterator[pa.Table]:
    for table in tables:
        yield table
        bar.advance(len(table))


def _in_this_process(chunks: Iterator[list[str]], images: ImageSet, finder: Finder) -> Generator[list[Row], None, None]:
    for chunk in chunks:
        for name in chunk:
            yield [_row(images, name, finder)]


def _in_processes(
    chunks: Iterator[list[str]], images: ImageSet, finder: Finder, workers: int
) -> Generator[list[Row], None, None]:
    """Rows as they come. An image that kills its worker (out of memory, a library's crash) is a failure."""
    unfinished = True
    while unfinished:
        running: dict[Future, list[str]] = {}
        with _pool(images, finder, workers) as pool:
            try:
                while unfinished or running:
                    while unfinished and len(running) < 3 * workers:
                        chunk = next(chunks, None)
                        if chunk is None:
                            unfinished = False
                        else:
                            running[_submit(pool, chunk)] = chunk
                    done = wait(running, timeout=CHUNK_SECONDS, return_when=FIRST_COMPLETED).done
                    if not done:
                        yield []  # so that what is there gets written, however slow the next image is
                    for future in done:
                        rows = future.result()
                        chunk = running.pop(future)
                        if rest := chunk[len(rows) :]:
                            running[_submit(pool, rest)] = rest
                        yield rows
            except BrokenProcessPool:
                pass
        suspects = [name for chunk in running.values() for name in chunk]
        while suspects:  # one at a time, to tell the culprit from those it took along
            with _pool(images, finder, 1) as pool:
                try:
                    while suspects:
                        yield _submit(pool, suspects[:1]).result()
                        suspects.pop(0)
                except BrokenProcessPool:
                    name = suspects.pop(0)
                    reason = "its worker process died (out of memory, or a crash in a library)"
                    yield [Row(name, images.bytes_of(name), error=reason)]


@contextlib.contextmanager
def _pool(images: ImageSet, finder: Finder, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Workers started by spawn: a fork would inherit locks from the threads of torch and OpenCV."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (images, finder, stop))
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


_worker: tuple[ImageSet, Finder, Event]


def _start_worker(images: ImageSet, finder: Finder, stop: Event) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it can't be blocked
    threading.Thread(target=_die_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    _worker = (images, finder, stop)


def _die_with_parent() -> None:
    """A worker waits for work on a pipe that it holds open itself: without this, kill -9 would orphan it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(names: list[str]) -> list[Row]:
    """Rows of the first of ``names``: of as many as take a moment, since a kill loses what has not been returned."""
    images, finder, stop = _worker
    rows: list[Row] = []
    end = time.monotonic() + CHUNK_SECONDS
    for name in names:
        if stop.is_set() or (rows and time.monotonic() > end):
            break
        rows.append(_row(images, name, finder))
    return rows


def _row(images: ImageSet, name: str, finder: Finder) -> Row:
    file_bytes = images.bytes_of(name)
    try:
        width, height = images.size_of(name)
        found = finder(images.decode(name, finder.decode_px(width, height)), width, height, name)
    except ImageError as error:
        return Row(name, file_bytes, error=str(error).removeprefix(f"{images.source(name)}: "))
    except Exception as error:  # whatever one image does to a library, the others are still to be done
        return Row(name, file_bytes, error=f"{finder.settings.engine} failed ({type(error).__name__}: {error})")
    return Row(name, file_bytes, width, height, found.boxes, found.n_raw, found.fallback)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _shared(images: ImageSet, folder: Path) -> Iterator[None]:
    """Keep the list of images in a file while workers read it."""
    if images.index is not None:
        yield
        return
    file = folder / f"{INDEX_PREFIX}{uuid.uuid4().hex}.arrow"
    try:
        images.share(file)
        yield
    finally:
        file.unlink(missing_ok=True)


def _metadata(settings: ProposalSettings, engine: ProposalEngine, images: Path) -> dict[str, Any]:
    try:
        headstart_version = version("headstart")
    except PackageNotFoundError:
        headstart_version = "not installed"
    return {
        "settings": settings.model_dump(),
        "engine": engine.name,
        "engine_version": engine.version,
        "folder": images.resolve().name,
        "headstart": headstart_version,
    }


def _check_same(files: Iterable[ProposalFile], metadata: dict[str, Any], pending: bool) -> None:
    """Rows made in two ways must not get into one table."""
    for file in files:
        old, new = dict(file.metadata["settings"]), dict(metadata["settings"])
        # A finished file stays usable when the library behind the engine is upgraded, but not with other weights.
        if pending or old.get("engine") == new["engine"] == "attention":
            old["engine_version"] = file.metadata["engine_version"]
            new["engine_version"] = metadata["engine_version"]
        different = [
            f"{key} is {old.get(key, 'not set')} there and {new.get(key, 'not set')} now"
            for key in sorted({*old, *new} - NO_MATTER)
            if old.get(key) != new.get(key) and new["engine"] in READ_BY.get(key, (new["engine"],))
        ]
        if different:
            raise RunError(
                f"{file.path}: was made with other settings: {'; '.join(different)}. "
                "Use the same settings, choose another --out, or delete it."
            )


def _failures(path: Path) -> Iterator[tuple[str, str]]:
    """(image, why it can't be used) of a finished file."""
    with readable(path), pq.ParquetFile(path, memory_map=True) as reader:
        for batch in reader.iter_batches(ROW_GROUP, columns=["image", "error"]):
            failed = batch.filter(batch.column("error").is_valid())
            yield from zip(failed.column("image").to_pylist(), failed.column("error").to_pylist(), strict=True)


def _unusable_file(out: Path) -> Path:
    return out.with_name(out.name + UNUSABLE_SUFFIX)


def _list_unusable(out: Path, count: int) -> None:
    """Beside ``out``, where a summary does not show them all."""
    if count <= SHOWN:
        _unusable_file(out).unlink(missing_ok=True)
        return
    with replacing(_unusable_file(out)) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for name, reason in _failures(out):
            line = "\t".join(text.translate(_ONE_CELL) for text in (name, reason))
            handle.write(f"{line}\n")


_ONE_CELL = {ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"}


def _summary(path: Path, seconds: float, new: int, gone: int) -> ProposeSummary:
    images, sizes = 0, np.zeros(10, np.int64)
    with_boxes, fallbacks = Counter[int](), Counter[str]()  # images by number of boxes, by fallback
    with readable(path), pq.ParquetFile(path, memory_map=True) as reader:
        for batch in reader.iter_batches(ROW_GROUP, columns=["width", "height", "boxes", "fallback", "error"]):
            images += len(batch)
            rows = batch.filter(batch.column("error").is_null())
            fallbacks.update(fallback for fallback in rows.column("fallback").to_pylist() if fallback)
            lengths = rows.column("boxes").value_lengths().to_numpy(zero_copy_only=False)
            with_boxes.update(lengths.tolist())
            xyxy = rows.column("boxes").flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
            image_area = rows.column("width").to_numpy().astype(np.float64) * rows.column("height").to_numpy()
            relative = np.sqrt(box_ops.area(xyxy) / np.repeat(image_area, lengths))
            sizes += np.histogram(relative, bins=10, range=(0, 1 + 1e-6))[0]
    unusable = images - with_boxes.total()
    return ProposeSummary(
        path=path,
        images=with_boxes.total(),
        boxes_per_image=_statistics(with_boxes),
        fallbacks={name: fallbacks[name] for name in FALLBACKS},
        unusable_images=unusable,
        failures=dict(itertools.islice(_failures(path), SHOWN)) if unusable else {},
        failures_file=_unusable_file(path) if unusable > SHOWN and _unusable_file(path).exists() else None,
        seconds=seconds,
        new_images=new,
        gone_images=gone,
        size_counts=tuple(int(count) for count in sizes),
    )


def _statistics(counts: Counter[int]) -> dict[str, float]:
    """Mean, median, least and most of numbers of which each came ``counts[number]`` times."""
    if not counts:
        return {"mean": 0.0, "median": 0.0, "min": 0.0, "max": 0.0}
    numbers = np.array(sorted(counts))
    ends = np.cumsum([counts[number] for number in numbers])  # of the runs of equal numbers, sorted
    middle = [numbers[np.searchsorted(ends, place, "right")] for place in ((ends[-1] - 1) // 2, ends[-1] // 2)]
    return {
        "mean": sum(number * count for number, count in counts.items()) / counts.total(),
        "median": float(np.mean(middle)),
        "min": float(numbers[0]),
        "max": float(numbers[-1]),
    }
