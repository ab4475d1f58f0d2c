"""The one arrow back: every few epochs the detector makes new boxes, and views are made of those until the next time.

``priors/000120.parquet`` in the run folder holds the boxes in force from step 120 on. It is a proposals file
(:mod:`headstart.proposals.store`) with one column more, ``scores``, so whatever reads proposals reads it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from headstart import __version__, distributed
from headstart.console import notes, progress
from headstart.datasets.image_set import ImageSet
from headstart.engine import TrainSettings, worker_count, worker_init
from headstart.errors import ImageError, RunError
from headstart.methods.method import Method, Net, Priors, collate_views
from headstart.proposals.store import ROW_GROUP, ProposalStore, readable, schema_for, write_rows
from headstart.views import View, resize_short

FOLDER = "priors"  # in the run folder
PIXELS = 8_000_000  # of a batch: eight images of 800 x 1333
SCORES = pa.field("scores", pa.list_(pa.float32()))


@dataclass
class Boxes:
    """Boxes of n images in flat arrays; image i's are rows ``starts[i]`` to ``starts[i + 1]``.

    Attributes:
        sizes: (n, 2) int32, width and height of the upright original, px; 0 where it can't be read.
        boxes, scores: (m, 4) and (m,) float32, xyxy in those px.
    """

    sizes: np.ndarray
    counts: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], self.counts.cumsum()])

    def of(self, i: int) -> slice:
        return slice(self.starts[i], self.starts[i + 1])

    def take(self, order: np.ndarray) -> Boxes:
        counts = self.counts[order]
        # Row by row: where the image's begin, and how far into them.
        rows = np.repeat(self.starts[order] - (counts.cumsum() - counts), counts) + np.arange(counts.sum())
        return Boxes(self.sizes[order], counts, self.boxes[rows], self.scores[rows])

    @classmethod
    def join(cls, some: Sequence[Boxes]) -> Boxes:
        return cls(*(np.concatenate([getattr(b, k) for b in some]) for k in ("sizes", "counts", "boxes", "scores")))

    @classmethod
    def none(cls) -> Boxes:
        return cls(np.zeros((0, 2), np.int32), np.zeros(0, np.int64), np.zeros((0, 4), "f"), np.zeros(0, "f"))

    @classmethod
    def read(cls, file: Path) -> Boxes:
        """Raises: DataError where ``file`` is damaged or gone."""
        with readable(file):
            table = pq.read_table(file, columns=["width", "height", "boxes", "scores"]).combine_chunks()
        lists = table["boxes"].combine_chunks()
        return cls(
            np.stack([table["width"].to_numpy(), table["height"].to_numpy()], axis=1),
            np.diff(lists.offsets.to_numpy()).astype(np.int64),
            lists.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4),
            table["scores"].combine_chunks().flatten().to_numpy(zero_copy_only=False),
        )

    def tables(self, images: ImageSet, problems: Mapping[int, str], schema: pa.Schema) -> Iterator[pa.Table]:
        """Rows as :mod:`headstart.proposals.store` has them, a row group at a time; ``problems``: of image i."""
        for first in range(0, len(self.counts), ROW_GROUP):
            some = self.take(np.arange(first, min(first + ROW_GROUP, len(self.counts))))
            n = len(some.counts)
            offsets = pa.array(some.starts, pa.int32())
            flat = pa.FixedSizeListArray.from_arrays(pa.array(some.boxes.ravel(), pa.float32()), 4)
            columns = {
                "image": images.names[first : first + n],
                "width": some.sizes[:, 0],
                "height": some.sizes[:, 1],
                "bytes": images.sizes(np.arange(first, first + n)),
                "boxes": pa.ListArray.from_arrays(offsets, flat),
                "n_raw": some.counts,
                "fallback": [""] * n,
                "error": [problems.get(i) for i in range(first, first + n)],
                "scores": pa.ListArray.from_arrays(offsets, pa.array(some.scores, pa.float32())),
            }
            arrays = [pa.array(columns[f.name], f.type) for f in schema]
            yield pa.Table.from_arrays(arrays, schema=schema)


class Refresh:
    """A job's ``renew``: boxes of all images, made by the detector before the first step and every ``every`` steps.

    Args:
        student: what :meth:`Method.refresh` is given.
        run: run folder.
        cache: folder where data workers share the boxes.
        use: is handed the boxes that are in force from now on; image i of ``images`` is their row i.
    """

    def __init__(
        self,
        method: Method,
        student: Net,
        images: ImageSet,
        every: int,
        run: Path,
        cache: Path,
        settings: TrainSettings,
        use: Callable[[ProposalStore], None],
        show: bool,
    ) -> None:
        self.method, self.student, self.images, self.every = method, student, images, every
        self.folder, self.cache, self.settings, self.use, self.show = run / FOLDER, cache, settings, use, show
        self.at = -1  # the step that the boxes in force were made at

    def file(self, step: int) -> Path:
        return self.folder / f"{step:06d}.parquet"

    def __call__(self, done: int) -> bool:
        """
        Raises:
            RunError: the boxes that were in force when the run was stopped, or would be ``before``, are gone.
        """
        at = done // self.every * self.every
        if at == self.at:
            return False
        # As the first process sees it, or some would not take part.
        if not distributed.gather(self.file(at).is_file())[0]:
            needed = at - self.every if at == done else at
            if needed >= 0 and not self.file(needed).is_file():
                raise RunError(f"{self.file(needed)}: is gone, so the run can't go on from step {done}; start it anew")
            self.make(at)
        self.at = at
        self.use(ProposalStore.open(self.file(at), cache=self.cache))
        return True

    def make(self, step: int) -> None:
        before = Boxes.read(self.file(step - self.every)) if step else None
        short, long = self.student.detector.input_px
        size = max(1, min(16, PIXELS // (short * long)))
        # The same batches however many processes share them: how images are padded depends on their neighbours.
        batches = [list(range(i, min(i + size, len(self.images)))) for i in range(0, len(self.images), size)]
        mine = batches[distributed.rank() :: distributed.world()]
        everyones = distributed.gather(self._share(mine, before, (short, long)))
        order = np.argsort(np.concatenate([index for index, _, _ in everyones]))
        found = Boxes.join([boxes for _, boxes, _ in everyones]).take(order)
        problems = {i: problem for _, _, theirs in everyones for i, problem in theirs.items()}
        if distributed.is_main():
            metadata = {
                "settings": {"engine": self.method.name, "refresh_steps": self.every},
                "engine": self.method.name,
                "engine_version": f"step {step}",
                "folder": str(self.images.path),
                "headstart": __version__,
            }
            schema = schema_for(metadata).append(SCORES)
            write_rows(self.file(step), found.tables(self.images, problems, schema), schema)
            if self.show:
                mean = len(found.boxes) / max(1, len(found.counts))
                notes.print(f"step {step}: {mean:.1f} boxes an image, made by the detector: {self.file(step)}")
        distributed.barrier()

    def _share(
        self, batches: list[list[int]], before: Boxes | None, input_px: tuple[int, int]
    ) -> tuple[np.ndarray, Boxes, dict[int, str]]:
        """Which of this process's images it is, their boxes, and what is wrong with those that can't be read."""
        device = next(self.student.parameters()).device
        workers = worker_count(self.settings, device)
        loader = DataLoader(
            _Plain(self.images, input_px),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_together,
            worker_init_fn=worker_init if workers else None,
            generator=torch.Generator(),
        )
        self.student.eval()
        indices, parts = [np.zeros(0, np.int64)], [Boxes.none()]
        problems: dict[int, str] = {}
        show = self.show and distributed.is_main()
        with progress("boxes", sum(map(len, batches)), "images", show) as bar:
            for samples, images, sizes in loader:
                seen = [sample for sample in samples if sample.view_size is not None]
                found = []
                if seen:
                    old = None if before is None else [_scaled_down(before, sample) for sample in seen]
                    priors = self.method.refresh(self.student, images.to(device), sizes.to(device), old)
                    found = [_scaled_up(p, sample) for p, sample in zip(priors, seen, strict=True)]
                for sample in samples:
                    if sample.view_size is None:
                        notes.print(f"no boxes: {sample.problem}", markup=False, soft_wrap=True)
                        problems[sample.index] = sample.problem
                        seen.append(sample)
                        found.append(Boxes(np.zeros((1, 2), np.int32), np.zeros(1, np.int64), *_nothing()))
                # An object a batch, not an image: there may be millions.
                indices.append(np.array([sample.index for sample in seen], np.int64))
                parts.append(Boxes.join(found))
                bar.advance(len(samples))
        return np.concatenate(indices), Boxes.join(parts), problems


@dataclass
class _Sample:
    """An image's number, its size and that of what the detector sees, both (width, height) px; None: unreadable."""

    index: int
    size: tuple[int, int] = (0, 0)
    view_size: tuple[int, int] | None = None
    problem: str = ""


@dataclass
class _Plain(Dataset):
    """Index -> the image as the detector itself is shown it."""

    images: ImageSet
    input_px: tuple[int, int]

    def __getitem__(self, index: int) -> tuple[_Sample, View | None]:
        name = self.images.names[index]
        try:
            size = self.images.size_of(name)
            image = self.images.decode(name, short_side_px=self.input_px[0])
        except ImageError as error:
            return _Sample(index, problem=str(error)), None
        view = resize_short(View(image, *_no_objects()), *self.input_px)
        return _Sample(index, size, view.size[::-1]), view


def _together(loaded: list[tuple[_Sample, View | None]]) -> tuple[list[_Sample], Tensor | None, Tensor | None]:
    samples, views = zip(*loaded, strict=True)
    readable_ones = [[view] for view in views if view is not None]
    if not readable_ones:
        return list(samples), None, None
    (batch,) = collate_views(readable_ones, 32)
    return list(samples), batch.images, batch.sizes


def _scaled_down(boxes: Boxes, sample: _Sample) -> Priors:
    assert sample.view_size is not None
    rows = boxes.of(sample.index)
    scale = np.float32(np.divide(sample.view_size, sample.size))
    return Priors(torch.from_numpy(boxes.boxes[rows] * np.tile(scale, 2)), torch.from_numpy(boxes.scores[rows].copy()))


def _scaled_up(priors: Priors, sample: _Sample) -> Boxes:
    assert sample.view_size is not None
    scale = np.float32(np.divide(sample.size, sample.view_size))
    boxes = priors.boxes.detach().cpu().float().numpy().reshape(-1, 4) * np.tile(scale, 2)
    scores = priors.scores.detach().cpu().float().numpy()
    return Boxes(np.array([sample.size], np.int32), np.array([len(boxes)], np.int64), boxes, scores)


def _nothing() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)


def _no_objects() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
