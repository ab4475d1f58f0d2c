"""The return arrow: boxes a detector makes itself, exact to a resume and over processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import headstart
from headstart import methods
from headstart.datasets.image_set import ImageSet
from headstart.errors import RunError
from headstart.proposals.store import ProposalStore
from headstart.verbs.refresh import Boxes

sys.path.insert(0, str(Path(__file__).parent))
import refreshing

SETTINGS = {
    **{"detector.fpn_channels": 8, "detector.short_side_px": 64, "detector.long_side_px": 96},
    **{"train.workers": 0, "train.amp": "off", "train.log_every": 1, "train.checkpoint_every": 1},
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "refreshing", "refreshing:Refreshing")


@pytest.fixture(scope="module")
def photos(scenes, tmp_path_factory) -> Path:
    """Six images, one of another shape, one broken."""
    folder = tmp_path_factory.mktemp("photos")
    files = sorted((scenes / "unlabelled").iterdir())[:6]
    for file in files:
        shutil.copy(file, folder / file.name)
    from PIL import Image

    with Image.open(files[2]) as image:
        image.resize((130, 70)).save(folder / files[2].name)
    (folder / files[4].name).write_bytes(files[4].read_bytes()[:200])
    return folder


def pretrain(photos: Path, out: Path, **changes):
    settings = {**SETTINGS, "train.max_unreadable": 0.5, **changes.pop("settings", {})}
    common = {"start": "scratch", "backbone": "resnet18", "max_steps": 7, "batch_size": 2, "device": "cpu"}
    return headstart.pretrain(
        None, photos, "refreshing", out=out, settings=settings, show=False, **{**common, **changes}
    )


def log_of(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "refreshing", "refreshing:Refreshing")
        return pretrain(photos, tmp_path_factory.mktemp("whole") / "run")


def test_boxes_are_made_every_epoch_and_kept(whole, photos):
    """Six images in twos: at steps 0, 3 and 6; one more box an image each time; px of the original."""
    folder = whole.path / "priors"
    assert sorted(p.name for p in folder.iterdir()) == ["000000.parquet", "000003.parquet", "000006.parquet"]
    images = ImageSet(photos)
    files = [Boxes.read(folder / f"{step:06d}.parquet") for step in (0, 3, 6)]
    broken, odd = 4, 2
    for i, name in enumerate(images.names):
        if i == broken:
            assert [int(f.counts[i]) for f in files] == [0, 0, 0]
            continue
        size = images.size_of(name)
        assert tuple(files[0].sizes[i]) == size
        empty = int(images.decode(name, short_side_px=64)[0, 0, 0]) % 4 == 0 and i != odd
        if not empty and files[0].counts[i]:
            assert [int(f.counts[i]) for f in files] == [1, 2, 3]
            old, new = files[0].boxes[files[0].of(i)], files[2].boxes[files[2].of(i)]
            np.testing.assert_allclose(new[0], old[0], rtol=1e-5)  # as they were, through another size and back
            score = files[1].scores[files[1].of(i)][-1]
            expected = [0, 0, score * size[0], size[1]]
            np.testing.assert_allclose(files[1].boxes[files[1].of(i)][-1], expected, rtol=1e-5)
    assert {0, 1} <= set(files[0].counts.tolist()), "the test has to have images with and without boxes"
    weights = [f.scores[f.counts.cumsum() - 1][f.counts > 0] for f in files]
    assert not np.allclose(weights[0], weights[2]), "the weights have moved, so have the boxes"


def test_other_verbs_read_the_file_as_proposals(whole, photos):
    file = whole.path / "priors" / "000003.parquet"
    store = ProposalStore.open(file)
    store.check_images(ImageSet(photos))
    assert len(store) == 5
    assert [store.usable(row) for row in range(7)] == [0, 1, 2, 3, None, 4, None]
    assert "unlabelled_000004.jpg" in next(iter(store.failures.values()))
    assert pq.read_table(file).column_names[-1] == "scores"
    assert headstart.preview(file, photos, whole.path / "p.png").is_file()


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_stopped_run_goes_on_with_the_boxes_in_force(whole, photos, tmp_path, at, monkeypatch):
    """Also where the stop came exactly before new boxes were due."""

    def stop(self, step, total_steps):
        if step + 1 == at and total_steps > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(refreshing.Refreshing, "momentum", stop)
    assert pretrain(photos, tmp_path / "run").summary.steps == at
    monkeypatch.undo()
    monkeypatch.setitem(methods.METHODS, "refreshing", "refreshing:Refreshing")
    again = pretrain(photos, tmp_path / "run", resume=True)
    assert again.summary.finished
    expected, found = load_file(whole.weights), load_file(again.weights)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert log_of(tmp_path / "run") == log_of(whole.path)
    for file in (whole.path / "priors").iterdir():
        assert pq.read_table(file).equals(pq.read_table(again.path / "priors" / file.name))


def test_boxes_that_are_gone_are_not_made_from_later_weights(whole, photos, tmp_path):
    shutil.copytree(whole.path, tmp_path / "run")
    priors = tmp_path / "run" / "priors"
    shutil.rmtree(tmp_path / "run" / "step_000007")
    (priors / "000006.parquet").unlink()  # of the very step that is resumed: made again
    pretrain(photos, tmp_path / "run", resume=True)
    assert pq.read_table(priors / "000006.parquet").equals(pq.read_table(whole.path / "priors" / "000006.parquet"))
    shutil.rmtree(tmp_path / "run" / "step_000007")
    (priors / "000006.parquet").unlink()
    (priors / "000003.parquet").rename(priors / "other")  # what it would be made from
    with pytest.raises(RunError, match=r"000003\.parquet: is gone"):
        pretrain(photos, tmp_path / "run", resume=True)


def test_workers_and_two_processes_make_the_same(whole, photos, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, headstart.methods\n"
        "headstart.methods.METHODS['refreshing'] = 'refreshing:Refreshing'\n"
        "torch.set_num_threads(1)\n"
        "if __name__ == '__main__':\n"
        f"    headstart.pretrain(None, {str(photos)!r}, 'refreshing', out={str(tmp_path / 'two')!r}, start='scratch',\n"
        "                       backbone='resnet18', max_steps=7, batch_size=2, device='cpu', show=False,\n"
        f"                       settings={ {**SETTINGS, 'train.max_unreadable': 0.5, 'train.workers': 1}!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for file in (whole.path / "priors").iterdir():
        one, two = Boxes.read(file), Boxes.read(tmp_path / "two" / "priors" / file.name)
        np.testing.assert_array_equal(one.counts, two.counts)
        np.testing.assert_allclose(one.boxes, two.boxes, rtol=1e-3, atol=0.05)


def test_flat_arrays_are_taken_and_joined_by_image():
    rng = np.random.default_rng(0)
    counts = np.array([2, 0, 3, 1])
    boxes, scores = rng.random((6, 4), np.float32), rng.random(6, np.float32)
    some = Boxes(np.arange(8, dtype=np.int32).reshape(4, 2), counts, boxes, scores)
    taken = Boxes.join([some, Boxes.none(), some]).take(np.array([6, 1, 0, 3]))
    assert taken.counts.tolist() == [3, 0, 2, 1]
    np.testing.assert_array_equal(taken.scores, scores[[2, 3, 4, 0, 1, 5]])
    np.testing.assert_array_equal(taken.boxes[taken.of(2)], boxes[:2])
    assert taken.sizes.tolist() == [[4, 5], [2, 3], [0, 1], [6, 7]]
