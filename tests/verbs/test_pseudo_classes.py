"""Pseudo classes: K-means on crops, the labels' way through views into the detector's matching."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import headstart
from headstart import detectors
from headstart.engine import TrainSettings
from headstart.errors import ImageError
from headstart.methods.aligndet import AlignDet
from headstart.methods.crops import describe
from headstart.verbs import pseudo_classes as module
from headstart.verbs.pseudo_classes import PseudoClasses, cluster, nearest

SMALL = {
    **{"backbone": "test_resnet", "num_queries": 8, "width": 32, "heads": 4, "encoder_layers": 1},
    **{"decoder_layers": 2, "feedforward": 24, "short_side_px": 64, "long_side_px": 96},
}
COLOURS = {"red": [220, 30, 20], "green": [20, 200, 40], "blue": [10, 40, 230]}


class Flags:
    """Images of one colour a half; proposals in the left and in the right half. Image 2 can't be read, 4 has none."""

    names = (("red", "green"), ("green", "blue"), ("red", "red"), ("blue", "red"), ("blue", "blue"), ("green", "red"))
    count = len(names)

    def plain(self, index: int, short_side_px: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 2:
            raise ImageError("2.jpg: broken")
        image = np.zeros((64, 96, 3), np.uint8)
        left, right = self.names[index]
        image[:, :48], image[:, 48:] = COLOURS[left], COLOURS[right]
        boxes = np.array([[2, 2, 40, 60], [50, 4, 90, 50], [8, 10, 30, 30]], np.float32)
        return image, boxes[:0] if index == 4 else boxes

    def expected(self) -> list[str]:
        return [self.names[i][side] for i in range(self.count) if i not in (2, 4) for side in (0, 1, 0)]


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return detectors.build(detectors.parse_settings({"name": "deformable_detr", **SMALL}))


def made(detector, folder: Path, clusters: int, workers: int = 0, seed: int = 0) -> PseudoClasses:
    settings = TrainSettings(workers=workers, seed=seed)
    return PseudoClasses.at(folder, detector, Flags(), Flags.count, clusters, 32, settings, show=False)


@pytest.mark.parametrize("seen", [200, 1])
def test_what_looks_alike_is_of_one_class(detector, tmp_path, seen, monkeypatch):
    """Three colours, three clusters: a label a colour; also of those proposals that K-means was not shown."""
    monkeypatch.setattr(module, "SEEN", 4 if seen == 1 else seen)
    detector.train()
    labels = made(detector, tmp_path, 3)
    assert detector.training
    found = [labels.of(i).tolist() for i in range(Flags.count)]
    assert [len(of) for of in found] == [3, 3, 0, 3, 0, 3]
    flat = [label for of in found for label in of]
    assert set(flat) == {1, 2, 3}
    pairs = set(zip(Flags().expected(), flat, strict=True))
    assert len(pairs) == 3, "a colour, a label"
    centres = np.load(tmp_path / "pseudo_classes" / "centres.npy")
    image, boxes = Flags().plain(3, 64)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    described = describe(detector.eval(), pixels, [torch.from_numpy(boxes)], px=32).numpy()
    by_hand = [min(range(3), key=lambda c: float(((row - centres[c]) ** 2).sum())) + 1 for row in described]
    assert by_hand == found[3]


def test_they_are_made_once_whatever_the_workers_and_travel_as_a_path(detector, tmp_path, monkeypatch):
    one, two = made(detector, tmp_path / "one", 2), made(detector, tmp_path / "two", 2, workers=1)
    for i in range(Flags.count):
        np.testing.assert_array_equal(one.of(i), two.of(i))
        np.testing.assert_array_equal(one.of(i), pickle.loads(pickle.dumps(one)).of(i))
    monkeypatch.setattr(module, "_make", None)
    made(detector, tmp_path / "one", 2)
    assert not list(tmp_path.glob("*/.tmp*"))


def test_fewer_proposals_than_clusters(detector, tmp_path):
    labels = made(detector, tmp_path, 256)
    flat = np.concatenate([labels.of(i) for i in range(Flags.count)])
    assert flat.min() == 1
    assert flat.max() <= len(flat) <= 256


def test_centres_are_k_means():
    """Lloyd's fixed point: each centre is the mean of the rows nearest to it."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(90, 5)).astype(np.float32) + 4 * rng.integers(0, 3, (90, 1))
    centres = cluster(rows, 3, seed=0)
    labels = nearest(rows, centres)
    for c in range(3):
        np.testing.assert_allclose(rows[labels == c + 1].mean(axis=0), centres[c], atol=1e-4)
    np.testing.assert_array_equal(cluster(rows, 3, seed=0), centres)
    assert cluster(rows[:0], 3, seed=0).shape == (0, 5)
    assert nearest(rows[:0], centres).shape == (0,)
    assert cluster(np.repeat(rows[:2], 5, axis=0), 3, seed=0).shape == (2, 5)


# ---- a whole run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proposals(scenes, tmp_path_factory):
    return headstart.propose(scenes / "unlabelled", tmp_path_factory.mktemp("p") / "p.parquet", progress=False).path


def pretrain(scenes, proposals, out, family="detr", **changes):
    settings = {f"detector.{k}": v for k, v in SMALL.items()}
    settings |= {"method.hidden": 16, "method.dim": 8, "method.K": 6, "method.clusters": 5, "method.crop_px": 32}
    settings |= {"train.workers": 0, "train.amp": "off", "train.checkpoint_every": 1}
    common = {"start": "scratch", "max_steps": 3, "batch_size": 2, "device": "cpu", "show": False}
    return headstart.pretrain(
        family, scenes / "unlabelled", "aligndet", out=out, proposals=proposals, settings=settings,
        **{**common, **changes},
    )  # fmt: skip


def test_an_image_that_had_no_labels_made_is_left_out(scenes, proposals, tmp_path, monkeypatch):
    """It could not be read then, and can be now."""
    from headstart.verbs.pretrain import _Loader

    real, broken = _Loader.plain, []

    def unreadable_once(self, index, short_side_px):
        if index == 1 and self.classes is None:
            broken.append(index)
            raise ImageError("1.jpg: broken")
        return real(self, index, short_side_px)

    monkeypatch.setattr(_Loader, "plain", unreadable_once)
    done = pretrain(scenes, proposals, tmp_path / "run", max_steps=30)
    assert broken
    assert done.summary.finished
    (problem,) = done.summary.unreadable.values()
    assert "but 0 pseudo classes" in problem


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_labels_reach_the_matching(family, scenes, proposals, tmp_path, monkeypatch):
    """Each box that the detector is asked to match carries the label its proposal has in the file."""
    from headstart.proposals.store import ProposalStore

    seen = []
    real = AlignDet.targets

    def spy(self, teacher, views):
        seen.append([(view.images, view.boxes, view.ids, view.labels, view.targets()) for view in views])
        return real(self, teacher, views)

    monkeypatch.setattr(AlignDet, "targets", spy)
    done = pretrain(scenes, proposals, tmp_path / "run", family)
    assert done.summary.finished
    last = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]
    assert all(name in last for name in ('"contrast"', '"class"', '"l1"', '"giou"'))
    labels, store = PseudoClasses(tmp_path / "run" / "pseudo_classes"), ProposalStore.open(proposals)
    assert len(labels._labels) == sum(len(store.boxes(i)) for i in range(len(store)))
    everyones = [labels.of(i) for i in range(len(store))]
    for views in seen:
        (_, _, ids, first, targets), (_, _, _, second, _) = views
        assert torch.equal(first, second), "the same proposals in both views"
        for row, own, of_image in zip(ids, first, targets, strict=True):
            k = int((row >= 0).sum())
            assert of_image["labels"].tolist() == own[:k].tolist()
            assert any(
                len(of) > int(row[:k].max()) and of[row[:k].numpy()].tolist() == own[:k].tolist() for of in everyones
            )
    kept = {key.split(".")[0] for key in load_file(done.weights)}
    assert {"backbone", "input_proj", "transformer", "query_embed", "bbox_embed"} == kept


def test_a_stopped_run_keeps_its_pseudo_classes(scenes, proposals, tmp_path, monkeypatch):
    whole = pretrain(scenes, proposals, tmp_path / "whole")
    real = AlignDet.momentum

    def stop(self, step, total_steps):
        if step == 0 and total_steps > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, total_steps)

    monkeypatch.setattr(AlignDet, "momentum", stop)
    assert pretrain(scenes, proposals, tmp_path / "cut").summary.steps == 1
    monkeypatch.undo()
    monkeypatch.setattr(module, "_make", None)
    again = pretrain(scenes, proposals, tmp_path / "cut", resume=True)
    expected, found = load_file(whole.weights), load_file(again.weights)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    shutil.rmtree(tmp_path / "cut")
