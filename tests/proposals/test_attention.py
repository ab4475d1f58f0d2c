"""The engine: from an image to boxes, on a tiny backbone with random weights, which sees plain colours apart."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import headstart
from headstart import cli
from headstart.boxes import iou
from headstart.datasets.image_set import ImageSet
from headstart.detectors import backbones
from headstart.errors import RunError, SettingsError, WeightsError
from headstart.proposals import READ_BY, ProposalSettings, make_engine
from headstart.proposals.attention import Attention, state_hash
from headstart.proposals.finder import Finder
from headstart.proposals.store import ProposalStore
from headstart.verbs.pretrain import _FromFile, _OnTheFly

RNG = np.random.default_rng(0)
TINY = {
    "engine": "attention",
    "features_backbone": "resnet18",
    "features_weights": "random",
    "features_px": 128,
    "features_stride": 8,
}
OFF = {"aspect_max": None, "size_min": 0.0, "size_max": 1.0}


def scene():
    """A red square on a noisy green ground."""
    image = np.full((96, 128, 3), (40, 120, 60), np.int16)
    image[24:72, 40:88] = (220, 40, 40)
    image += np.random.default_rng(0).integers(-8, 9, image.shape, dtype=np.int16)
    return image.clip(0, 255).astype(np.uint8), np.array([[40, 24, 88, 72]], np.float32)


@pytest.fixture
def weights(tmp_path):
    """A file of the backbone alone, other than what the seed gives."""
    torch.manual_seed(7)
    path = tmp_path / "backbone.safetensors"
    save_file(backbones.body("resnet18", (2, 3, 4, 5))().state_dict(), path)
    return path


def test_finds_what_stands_out():
    image, objects = scene()
    found = make_engine(ProposalSettings(**{**TINY, "features_stride": 4}, cut_rounds=1))(image, RNG)
    assert found.dtype == np.float32
    assert iou(objects, found).max() > 0.5
    height, width = image.shape[:2]
    assert (found >= 0).all()
    assert (found <= (width, height, width, height)).all()
    assert (found[:, 2:] > found[:, :2]).all()


def test_more_rounds_only_add_boxes():
    image, _ = scene()
    one, three = (make_engine(ProposalSettings(**TINY, cut_rounds=rounds))(image, RNG) for rounds in (1, 3))
    assert len(three) > len(one) > 0
    np.testing.assert_array_equal(three[: len(one)], one)
    assert len(np.unique(three, axis=0)) == len(three)


def test_each_cell_sees_an_equal_share_of_the_image():
    engine = Attention(ProposalSettings(**TINY))
    for shape, cells in (((96, 128), (12, 16)), ((300, 301), (16, 16)), ((9, 200), (1, 16)), ((40, 20), (16, 8))):
        features = engine.features(np.zeros((*shape, 3), np.uint8))
        assert features.shape[:2] == cells
        assert engine(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8), RNG).max() <= max(shape)


@pytest.mark.parametrize(("stride", "depth"), [(4, 64), (8, 128), (16, 256), (32, 512)])
def test_the_stride_chooses_the_map(stride, depth):
    engine = Attention(ProposalSettings(**{**TINY, "features_stride": stride}))
    assert engine.features(scene()[0]).shape == (96 // stride, 128 // stride, depth)


@pytest.mark.parametrize("value", [0, 255])
def test_a_plain_image_has_few_boxes_and_no_error(value):
    found = make_engine(ProposalSettings(**TINY))(np.full((64, 64, 3), value, np.uint8), RNG)
    assert found.shape[1] == 4


def test_the_same_boxes_every_time_and_on_any_number_of_threads():
    image, _ = scene()
    first = make_engine(ProposalSettings(**TINY))(image, np.random.default_rng(1))
    torch.set_num_threads(2)
    try:
        again = make_engine(ProposalSettings(**TINY))(image, np.random.default_rng(2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(first, again)


def test_random_weights_leave_the_random_numbers_of_others_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make_engine(ProposalSettings(**TINY))
    assert torch.equal(torch.rand(2), expected)


def test_the_version_names_the_weights(weights, tmp_path):
    version = lambda **more: make_engine(ProposalSettings(**{**TINY, **more})).version
    assert version() == version(features_px=256)
    assert version() != version(seed=1)
    assert version() != version(features_weights=str(weights))
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(weights.read_bytes())
    assert version(features_weights=str(copy)) == version(features_weights=str(weights))


def test_the_weights_are_those_of_the_file(weights):
    engine = Attention(ProposalSettings(**{**TINY, "features_weights": str(weights)}))
    torch.manual_seed(7)
    body = backbones.body("resnet18", (2, 3, 4, 5))()
    own = engine.body.state_dict()
    assert own.keys() < body.state_dict().keys()  # what lies behind the map is not built
    assert all(torch.equal(value, body.state_dict()[key]) for key, value in own.items())


def test_a_run_folder_says_its_backbone_itself(scenes, tiny, tmp_path):
    run = headstart.pretrain(
        "faster_rcnn", scenes / "unlabelled", "soco", out=tmp_path / "run", backbone="resnet18", max_steps=1,
        batch_size=2, settings={f"detector.{k}": v for k, v in tiny.items() if k != "backbone"}
        | {"method.view_px": 64, "method.K": 2, "train.workers": 0}, show=False,
    )  # fmt: skip
    settings = ProposalSettings(**{**TINY, "features_backbone": None, "features_weights": str(tmp_path / "run")})
    engine = Attention(settings)
    assert engine.backbone == "resnet18"
    trained = run.detector.module.backbone.body.state_dict()
    assert all(torch.equal(value, trained[key].cpu()) for key, value in engine.body.state_dict().items())


def test_a_timm_backbone():
    settings = ProposalSettings(**{**TINY, "features_backbone": "mobilenetv3_small_050", "features_stride": 16})
    assert make_engine(settings)(scene()[0], RNG).shape[1] == 4


def test_weights_have_to_be_named():
    with pytest.raises(SettingsError, match=r"engine=attention needs a trained backbone.*--weights"):
        make_engine(ProposalSettings(engine="attention"))


def test_other_weights_are_refused(weights, tmp_path):
    make = lambda **more: make_engine(ProposalSettings(**{**TINY, **more}))
    with pytest.raises(RunError, match=r"nowhere: no such run folder or weights file"):
        make(features_weights="nowhere")
    with pytest.raises(RunError, match=r"not a run folder"):
        make(features_weights=str(tmp_path), features_backbone=None)
    with pytest.raises(WeightsError, match=r"no weights that fit for \d+ keys of resnet50.*another --backbone"):
        make(features_weights=str(weights), features_backbone="resnet50")
    with pytest.raises(SettingsError, match="resnet19"):
        make(features_backbone="resnet19")


def test_the_hash_is_of_names_shapes_and_numbers():
    one = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    assert state_hash(one) == state_hash(dict(reversed(one.items())))
    changed = one["a"].clone()
    changed[3] += 1e-6
    for other in ({"c": one["a"], "b": one["b"]}, {**one, "a": one["a"].view(2, 3)}, {**one, "a": changed}):
        assert state_hash(other) != state_hash(one)
    assert state_hash({"a": torch.ones(3, dtype=torch.bfloat16)})


def test_settings_that_only_it_reads():
    own = {key for key, engines in READ_BY.items() if engines == ("attention",)}
    assert own == {key for key in ProposalSettings.model_fields if key.startswith(("features_", "cut_"))}
    assert ProposalSettings(engine="attention", features_px=960).long_side_px == 960
    assert ProposalSettings(engine="attention", features_px=960, long_side_px=500).long_side_px == 500
    assert ProposalSettings(features_px=960).long_side_px == 640


def test_in_worker_processes_as_in_this_one(scenes, tmp_path):
    settings = ProposalSettings(**TINY, **OFF)
    files = [
        headstart.propose(
            scenes / "unlabelled", tmp_path / f"{workers}.parquet", settings=settings, workers=workers, progress=False
        ).path
        for workers in (0, 1)
    ]
    here, there = map(ProposalStore.open, files)
    assert [here.boxes(i).tolist() for i in range(len(here))] == [there.boxes(i).tolist() for i in range(len(there))]
    assert here.metadata["engine_version"] == make_engine(settings).version


def test_a_finished_file_is_not_taken_for_one_of_other_weights(scenes, tmp_path, weights):
    def propose(**more):
        settings = ProposalSettings(**{**TINY, **more})
        return headstart.propose(
            scenes / "unlabelled", tmp_path / "p.parquet", settings=settings, workers=0, progress=False
        )

    assert propose(features_weights=str(weights)).new_images == 12
    copy = weights.with_name("copy.safetensors")
    copy.write_bytes(weights.read_bytes())
    assert propose(features_weights=str(copy)).new_images == 0  # the same weights in another place
    with pytest.raises(RunError, match="engine_version is"):
        propose()


def test_a_pickled_finder_takes_no_weights_along():
    finder = Finder(ProposalSettings(**TINY))
    assert finder.engine.name == "attention"
    assert len(multiprocessing.reduction.ForkingPickler.dumps(finder)) < 10_000


def test_other_engines_do_not_wait_for_torch():
    code = (
        "import sys, headstart.cli\n"
        "from headstart.proposals import ProposalSettings, make_engine\n"
        "make_engine(ProposalSettings())\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_on_the_fly_gives_the_very_boxes_of_the_file(scenes, tmp_path):
    settings = ProposalSettings(**TINY, **OFF)
    folder = scenes / "unlabelled"
    store = ProposalStore.open(
        headstart.propose(folder, tmp_path / "p.parquet", settings=settings, workers=0, progress=False).path
    )
    kept, found = _FromFile(store), _OnTheFly(ImageSet(folder), Finder(settings))
    for i in range(3):
        np.testing.assert_array_equal(kept(i)[0], found(i)[0])


def test_on_the_command_line(scenes, tmp_path):
    out = tmp_path / "p.parquet"
    arguments = ["propose", str(scenes / "unlabelled"), "--out", str(out), "--workers", "0", "--engine", "attention"]
    failed = CliRunner().invoke(cli.app, arguments)
    assert isinstance(failed.exception, SettingsError)
    assert "--weights" in str(failed.exception)
    more = ["--backbone", "resnet18", "--weights", "random", "--set", "features_px=64", "--set", "cut_rounds=1"]
    done = CliRunner().invoke(cli.app, [*arguments, *more])
    assert done.exit_code == 0, done.output
    made = ProposalStore.open(out)
    assert made.metadata["engine_version"].startswith("1 resnet18 ")
    assert (made.settings["features_px"], made.settings["cut_rounds"]) == (64, 1)
