"""Pseudo classes of proposals: crops -> what a frozen backbone says of them -> K-means (AlignDet, supplement B.5).

``pseudo_classes/`` in the run folder: ``labels.npy``, those of all images one after the other, from 1; ``starts.npy``,
where each image's begin; ``centres.npy``, of the clusters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from headstart import distributed
from headstart.console import progress
from headstart.detectors.detector import Detector
from headstart.engine import TrainSettings, worker_count, worker_init
from headstart.errors import ImageError
from headstart.files import replacing
from headstart.methods.crops import describe

FOLDER = "pseudo_classes"
SEEN = 200  # proposals a cluster that K-means is shown
JOINED = 4096


class Images(Protocol):
    """Index -> an image (H, W, 3) uint8 and its proposals (n, 4), xyxy in its px."""

    def plain(self, index: int, short_side_px: int) -> tuple[np.ndarray, np.ndarray]: ...


class PseudoClasses:
    """The finished labels. Pickled it is the path; processes share the files' pages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._starts = np.load(folder / "starts.npy", mmap_mode="r")
        self._labels = np.load(folder / "labels.npy", mmap_mode="r")

    def of(self, index: int) -> np.ndarray:
        """(n,) int64 from 1, one a proposal of image ``index``; none where it could not be read."""
        return self._labels[self._starts[index] : self._starts[index + 1]].astype(np.int64)

    def __reduce__(self) -> tuple[type[PseudoClasses], tuple[Path]]:
        return PseudoClasses, (self.folder,)

    @classmethod
    def at(
        cls,
        run: Path,
        detector: Detector,
        images: Images,
        count: int,
        clusters: int,
        crop_px: int,
        settings: TrainSettings,
        show: bool,
    ) -> PseudoClasses:
        """Those of a run's ``count`` images, which the main process makes first where there are none yet."""
        folder = run / FOLDER
        if distributed.is_main() and not folder.is_dir():
            training = detector.training
            detector.eval()
            _make(folder, detector, images, count, clusters, crop_px, settings, show)
            detector.train(training)
        distributed.barrier()
        return cls(folder)


def _make(
    folder: Path,
    detector: Detector,
    images: Images,
    count: int,
    clusters: int,
    crop_px: int,
    settings: TrainSettings,
    show: bool,
) -> None:
    order = np.random.default_rng([settings.seed, 3]).permutation(count)
    counts = np.zeros(count, np.int64)
    sample: list[np.ndarray] = []
    seen, centres = 0, None
    parts: list[np.ndarray] = []  # labels in this order
    with progress("pseudo classes", count, "images", show) as bar:
        for place, (index, described) in enumerate(_described(order, detector, images, crop_px, settings)):
            counts[index] = len(described)
            bar.advance(1)
            # K-means has seen enough long before the last image.
            if centres is None:
                sample.append(described)
                seen += len(described)
                if seen < SEEN * clusters and place + 1 < count:
                    continue
                described = np.concatenate(sample)
                centres = cluster(described, clusters, settings.seed)
            parts.append(nearest(described, centres))
            if len(parts) == JOINED:  # no object an image: there may be millions
                parts = [np.concatenate(parts)]
    starts = np.concatenate([[0], counts.cumsum()])
    begins = np.zeros(count, np.int64)
    begins[order] = counts[order].cumsum() - counts[order]
    rows = np.repeat(begins - starts[:-1], counts) + np.arange(counts.sum())
    assert centres is not None
    with replacing(folder) as temporary:
        temporary.mkdir()
        np.save(temporary / "starts.npy", starts)
        np.save(temporary / "labels.npy", np.concatenate(parts)[rows])
        np.save(temporary / "centres.npy", centres)


def cluster(described: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """(k, C) float32 centres of rows (m, C): k = ``clusters``, or as many as there are different rows; m may be 0."""
    from sklearn.cluster import KMeans  # takes seconds, which runs without pseudo classes need not wait for
    from sklearn.exceptions import ConvergenceWarning

    different = len(np.unique(described, axis=0)) if len(described) < 10 * clusters else clusters
    if not different:
        return described[:0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # rows may be all but the same; so are then centres
        found = KMeans(min(clusters, different), n_init=1, max_iter=100, random_state=seed).fit(described)
    return found.cluster_centers_.astype(np.float32)


def nearest(described: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n,) int32 number of the nearest of ``centres`` to each row, from 1."""
    if not len(described):
        return np.zeros(0, np.int32)
    # |a - b|^2 without |a|^2, which is the same for all centres.
    distances = (centres.astype(np.float64) ** 2).sum(axis=1) - 2 * (described @ centres.T)
    return (distances.argmin(axis=1) + 1).astype(np.int32)


def _described(
    order: Sequence[int] | np.ndarray, detector: Detector, images: Images, crop_px: int, settings: TrainSettings
) -> Iterator[tuple[int, np.ndarray]]:
    """``(index, (n, C))`` of each image in this order; n is 0 where it can't be read."""
    device = next(detector.parameters()).device
    workers = worker_count(settings, device)
    loader = DataLoader(
        _Plain(images, order, detector.input_px[0]),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=worker_init if workers else None,
        generator=torch.Generator(),
    )
    for index, image, boxes in loader:
        pixels = image.to(device).permute(2, 0, 1)[None]
        yield index, describe(detector, pixels, [boxes.to(device)], px=crop_px).cpu().numpy()


class _Plain(Dataset):
    """Place in ``order`` -> (index, image, boxes); one grey pixel without boxes where it can't be read."""

    def __init__(self, images: Images, order: Sequence[int] | np.ndarray, short_side_px: int) -> None:
        self.images, self.order, self.short_side_px = images, order, short_side_px

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[int, Any, Any]:
        index = int(self.order[place])
        try:
            image, boxes = self.images.plain(index, self.short_side_px)
        except ImageError:  # counted where it is trained on
            image, boxes = np.zeros((1, 1, 3), np.uint8), np.zeros((0, 4), np.float32)
        return index, torch.from_numpy(np.array(image)), torch.from_numpy(np.array(boxes))
