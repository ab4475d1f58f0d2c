"""Where the boxes come from: a file, or the data workers themselves."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import headstart
from headstart.datasets.image_set import ImageSet
from headstart.errors import ImageError, RunError
from headstart.methods.soco import SoCo
from headstart.proposals import ProposalSettings
from headstart.proposals.finder import Finder
from headstart.proposals.selective_search import SelectiveSearch
from headstart.proposals.store import ProposalStore
from headstart.verbs.pretrain import _FromFile, _OnTheFly

SOCO = {"method.view_px": 64, "method.hidden": 32, "method.dim": 16, "train.workers": 0, "train.amp": "off"}


@pytest.fixture(scope="module")
def photos(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small PNGs, and JPEGs that are decoded at a reduced size."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    shutil.copytree(scenes / "unlabelled", folder)
    for i, size in enumerate([(1400, 900), (900, 1500)]):
        grey = np.random.default_rng(i).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"large{i}.jpg"), cv2.resize(grey, size, interpolation=cv2.INTER_NEAREST))
    return folder


@pytest.fixture
def go(photos, tiny, tmp_path):
    """Pretrain for five steps of four images."""

    def call(name="run", proposals="on-the-fly", images=photos, resume=False, **settings):
        detector = {f"detector.{k}": v for k, v in tiny.items() if k != "backbone"}
        return headstart.pretrain(
            "faster_rcnn",
            images,
            out=tmp_path / name,
            backbone="resnet18",
            proposals=proposals,
            max_steps=5,
            batch_size=4,
            settings={**SOCO, **detector, "proposals.scale": 100, **settings},
            resume=resume,
            show=False,
        )

    return call


def same_weights(a, b):
    a, b = load_file(a.weights), load_file(b.weights)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 100},
        {"scale": 100, "long_side_px": 400, "nms_iou": 0.5},
        {"engine": "random", "seed": 3},
        {"preset": "detreg"},
        {"preset": "updetr"},
    ],
)
def test_on_the_fly_gives_the_very_boxes_of_the_file(photos, tmp_path, settings):
    settings = ProposalSettings(**settings)
    file = headstart.propose(photos, tmp_path / "p.parquet", settings=settings, workers=0, progress=False).path
    store = ProposalStore.open(file)
    kept, found = _FromFile(store), _OnTheFly(ImageSet(photos), Finder(settings))
    assert len(store) > 10
    for i in range(len(store)):
        assert kept(i)[1] == found(i)[1]
        np.testing.assert_array_equal(kept(i)[0], found(i)[0])


def test_on_the_fly_trains_as_with_a_file_and_writes_none(go, tmp_path):
    whole = go("file", tmp_path / "p.parquet")
    fly = go("fly")
    assert same_weights(whole, fly)
    assert not list(fly.path.rglob("*.parquet"))
    assert not Path("on-the-fly").exists()
    data = json.loads((fly.path / "run.json").read_text())["data"]
    assert data["proposals"] == "on-the-fly"
    assert data["proposal_engine"] == "selective_search 1"


def test_on_the_fly_resumes_to_the_same_numbers_also_in_workers(go, monkeypatch):
    whole = go("whole")
    momentum = SoCo.momentum

    def interrupted(self, step, total):
        if step == 3:
            raise KeyboardInterrupt
        return momentum(self, step, total)

    monkeypatch.setattr(SoCo, "momentum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go("cut", **{"train.checkpoint_every": 2, "train.workers": 1})
    monkeypatch.undo()
    resumed = go("cut", resume=True, **{"train.checkpoint_every": 2, "train.workers": 1})
    assert same_weights(whole, resumed)


def test_an_engine_that_changed_is_not_resumed_with(go, monkeypatch):
    init = SelectiveSearch.__init__

    def newer(self, *args):
        init(self, *args)
        self.version = "2"

    go()
    monkeypatch.setattr(SelectiveSearch, "__init__", newer)
    with pytest.raises(RunError, match=r"data\.proposal_engine: was 'selective_search 1.*now 'selective_search 2'"):
        go(resume=True)


def test_images_that_fail_are_skipped_and_named(go, photos, tmp_path, monkeypatch):
    folder = tmp_path / "bad"
    shutil.copytree(photos, folder)
    cv2.imwrite(str(folder / "odd.png"), np.zeros((33, 39, 3), np.uint8))
    search = SelectiveSearch.__call__

    def fragile(self, image, rng):
        if image.shape[1] == 39:
            raise RuntimeError("odd width")
        return search(self, image, rng)

    monkeypatch.setattr(SelectiveSearch, "__call__", fragile)
    images = ImageSet(folder)
    with pytest.raises(ImageError, match=r"bad/odd\.png: selective_search failed \(RuntimeError: odd width\)"):
        _OnTheFly(images, Finder(ProposalSettings()))(images.names.index("odd.png"))
    summary = go(images=folder).summary
    assert summary.finished
    assert set(summary.unreadable) == {"odd.png"}  # 20 samples of 15 images: each was seen


def test_on_the_fly_from_a_tar_shard_too(photos, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as shard:
        for path in sorted(photos.iterdir()):
            shard.add(path, path.name)
    find = Finder(ProposalSettings(scale=100))
    plain, packed = _OnTheFly(ImageSet(photos), find), _OnTheFly(ImageSet(tmp_path / "all.tar"), find)
    for i in range(len(plain.images)):
        np.testing.assert_array_equal(plain(i)[0], packed(i)[0])


def test_an_image_without_boxes_is_one_box_as_in_the_file(tmp_path):
    cv2.imwrite(str(tmp_path / "plain.png"), np.zeros((40, 50, 3), np.uint8))
    boxes, width = _OnTheFly(ImageSet(tmp_path), Finder(ProposalSettings(preset="soco_code", side_min_px=45)))(0)
    np.testing.assert_array_equal(boxes, [[0, 0, 50, 40]])
    assert width == 50
