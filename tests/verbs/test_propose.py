import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from headstart.boxes import iou
from headstart.datasets.image_set import ImageSet
from headstart.errors import DataError, RunError, SettingsError
from headstart.proposals.parts import Parts
from headstart.proposals.store import ProposalStore
from headstart.verbs import propose as propose_module
from headstart.verbs.propose import ProposalSettings, ProposeSummary, ShardSummary, propose

SMALL = ProposalSettings(scale=100)
RANDOM = ProposalSettings(engine="random")
N = 24


def make_images(folder: Path, count: int = N, first: int = 0) -> None:
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        size = int(rng.integers(40, 72)), int(rng.integers(40, 72)), 3
        image = rng.integers(0, 40, size, dtype=np.uint8)
        y, x = rng.integers(0, 20, 2)
        image[y : y + 24, x : x + 20] = rng.integers(60, 255, 3)
        path = folder / f"{'ab'[i % 2]}/{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture
def folder(tmp_path):
    make_images(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def done(monkeypatch):
    """Names of the images that were worked on, in this process."""
    names = []
    row = propose_module._row
    monkeypatch.setattr(propose_module, "_row", lambda f, name, *rest: names.append(name) or row(f, name, *rest))
    return names


def run(folder, out=None, settings=SMALL, **rest):
    return propose(folder, out, settings=settings, progress=False, **{"workers": 0, **rest})


def same(a, b):
    return pq.read_table(a).equals(pq.read_table(b), check_metadata=True)


# What is in the file


def test_boxes_of_every_image_in_order(folder, tmp_path):
    summary = run(folder, tmp_path / "p.parquet")
    store = ProposalStore(summary.path)
    assert list(store.images) == sorted(store.images)
    assert len(store) == summary.images == summary.new_images == N
    for i, name in enumerate(store.images):
        assert store.size(i) == Image.open(folder / name).size
        assert len(store.boxes(i)) >= 1
    assert not (tmp_path / "p.parquet.parts").exists()
    table = pq.read_table(summary.path)
    assert table["bytes"].to_pylist() == [(folder / name).stat().st_size for name in store.images]
    assert max(table["n_raw"].to_pylist()) > max(len(boxes) for boxes in table["boxes"].to_pylist())


def test_default_place_is_beside_the_folder(folder, tmp_path):
    assert run(folder).path == tmp_path / "photos.proposals.parquet"


def test_table_does_not_depend_on_workers(folder, tmp_path):
    for engine in (SMALL.engine, "random"):
        settings = ProposalSettings(scale=100, engine=engine)
        alone = run(folder, tmp_path / f"{engine}0.parquet", settings).path
        assert same(alone, run(folder, tmp_path / f"{engine}2.parquet", settings, workers=2).path)
    assert not same(tmp_path / f"{SMALL.engine}0.parquet", tmp_path / "random0.parquet")


def test_random_boxes_follow_seed_and_path_alone(folder, tmp_path):
    boxes = lambda name, **s: pq.read_table(run(folder, tmp_path / name, ProposalSettings(engine="random", **s)).path)[
        "boxes"
    ].to_pylist()
    first = boxes("a.parquet")
    assert len({tuple(map(tuple, b)) for b in first}) == N  # no two images get the same
    assert boxes("b.parquet", seed=1) != first
    (folder / "a/000.png").unlink()
    assert boxes("c.parquet") == first[1:]


def test_large_images_are_shrunk_for_the_search_only(tmp_path):
    image = np.full((600, 900, 3), 90, np.uint8)
    image[150:400, 300:600] = (200, 60, 30)
    (tmp_path / "photos").mkdir()
    Image.fromarray(image).save(tmp_path / "photos/large.jpg", quality=95)
    Image.fromarray(image).resize((300, 200)).save(tmp_path / "photos/small.jpg", quality=95)
    store = ProposalStore(run(tmp_path / "photos", settings=ProposalSettings(long_side_px=300)).path)
    assert [store.size(0), store.size(1)] == [(900, 600), (300, 200)]
    wanted = np.array([[300, 150, 600, 400]], np.float32)
    assert iou(wanted, store.boxes(0)).max() > 0.9
    assert iou(wanted / 3, store.boxes(1)).max() > 0.9


def test_summary_counts_and_shows_everything(folder, tmp_path):
    Image.new("RGB", (50, 50)).save(folder / "plain.png")  # one segment, too large for the filter
    Image.new("RGB", (400, 20)).save(folder / "thin.png")
    (folder / "bad[x].jpg").write_bytes(b"")
    summary = run(folder, tmp_path / "p.parquet")
    table = pq.read_table(summary.path)
    lengths = [len(b) for b, e in zip(table["boxes"].to_pylist(), table["error"].to_pylist(), strict=True) if not e]
    assert summary.images == len(lengths) == N + 2
    assert summary.boxes_per_image == {
        "mean": pytest.approx(np.mean(lengths)),
        "median": np.median(lengths),
        "min": 1,
        "max": max(lengths),
    }
    assert summary.fallbacks == {
        name: table["fallback"].to_pylist().count(name) for name in ("ratio", "any_box", "whole_image")
    }
    assert summary.fallbacks["ratio"] >= 1
    assert summary.fallbacks["whole_image"] == 1
    assert summary.failures == {"bad[x].jpg": "empty file (zero bytes)"}
    assert sum(summary.size_counts) == sum(lengths)
    assert summary.size_counts[9] >= 2  # the whole images
    text = io.StringIO()
    Console(width=400, file=text).print(summary.table())  # so that no path is folded
    for shown in ("26", "bad[x].jpg: empty file", "whole_image: 1", "median", "p.parquet", "s an image"):
        assert shown in text.getvalue()


# Going on where it stopped


def test_finished_file_is_left_alone(folder, tmp_path, done):
    out = run(folder, tmp_path / "p.parquet").path
    stamp = out.stat().st_mtime_ns
    done.clear()
    again = run(folder, out, ProposalSettings(scale=100, max_unreadable=0.5))
    assert done == []
    assert again.new_images == 0
    assert again.images == N
    assert out.stat().st_mtime_ns == stamp


def test_only_new_changed_and_failed_images_are_done(folder, tmp_path, done):
    (folder / "bad.png").write_bytes(b"GIF89a?")
    out = run(folder, tmp_path / "p.parquet").path
    make_images(folder, 5, first=N)
    Image.new("RGB", (33, 44)).save(folder / "a/002.png")
    (folder / "b/003.png").unlink()
    done.clear()
    summary = run(folder, out)
    assert sorted(done) == [
        "a/002.png",
        "a/024.png",
        "a/026.png",
        "a/028.png",
        "b/025.png",
        "b/027.png",
        "bad.png",
    ]
    assert summary.gone_images == 1
    assert same(out, run(folder, tmp_path / "fresh.parquet").path)


def test_a_failure_that_fails_again_leaves_the_file_alone(folder, tmp_path, done):
    (folder / "bad.png").write_bytes(b"GIF89a?")
    out = run(folder, tmp_path / "p.parquet").path
    stamp = out.stat().st_mtime_ns
    done.clear()
    run(folder, out)
    assert done == ["bad.png"]
    assert out.stat().st_mtime_ns == stamp
    assert not (tmp_path / "p.parquet.parts").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_both_values(folder, tmp_path, monkeypatch, finished):
    out = tmp_path / "p.parquet"
    if finished:
        run(folder, out)
    else:
        stop_after(monkeypatch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
    with pytest.raises(RunError, match=r"scale is 100\.0 there and 300\.0 now"):
        run(folder, out, ProposalSettings(scale=300))
    with pytest.raises(RunError, match=f"engine is {SMALL.engine} there and random now"):
        run(folder, out, ProposalSettings(scale=100, engine="random"))


def test_another_engine_version_matters_when_there_is_work(folder, tmp_path, monkeypatch):
    from headstart.proposals import random_boxes

    settings = ProposalSettings(engine="random")
    out = run(folder, tmp_path / "p.parquet", settings).path
    monkeypatch.setattr(random_boxes.RandomBoxes, "version", "2")
    run(folder, out, settings)
    make_images(folder, 1, first=N)
    with pytest.raises(RunError, match="engine_version is 1 there and 2 now"):
        run(folder, out, settings)


def test_a_file_of_other_images_is_not_overwritten(folder, tmp_path):
    out = run(folder, tmp_path / "p.parquet").path
    content = out.read_bytes()
    make_images(tmp_path / "others", 3, first=100)
    with pytest.raises(DataError, match=r"belongs to other images \(a/000\.png, .* Choose another --out"):
        run(tmp_path / "others", out)
    assert out.read_bytes() == content


def stop_after(monkeypatch, count):
    """Ctrl-C in the middle of image ``count``."""
    row, seen = propose_module._row, []

    def interrupted(*args):
        seen.append(args)
        if len(seen) > count:
            monkeypatch.setattr(propose_module, "_row", row)
            raise KeyboardInterrupt
        return row(*args)

    monkeypatch.setattr(propose_module, "_row", interrupted)


def test_ctrl_c_saves_and_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.parquet"
    stop_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out)
    assert "the same command goes on from there" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
    assert run(folder, out).new_images == N - 7
    assert same(out, run(folder, tmp_path / "whole.parquet").path)


@pytest.mark.parametrize("what", ["part", "finished"])
@pytest.mark.parametrize("how", ["truncated", "not ours"])
def test_damaged_files_are_named(folder, tmp_path, monkeypatch, what, how):
    out = tmp_path / "p.parquet"
    if what == "finished":
        bad = run(folder, out).path
    else:
        stop_after(monkeypatch, 7)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
        (bad,) = Path(f"{out}.parts").glob("*.parquet")
    bad.write_bytes(bad.read_bytes()[:-9] if how == "truncated" else b"PK\x03\x04 a zip")
    with pytest.raises(DataError, match=rf"{bad.name}: truncated, damaged, or not a Parquet file"):
        run(folder, out)
    bad.unlink()
    run(folder, out)
    assert same(out, run(folder, tmp_path / "whole.parquet").path)


# Bad images


def test_bad_images_are_skipped_and_named(folder, tmp_path):
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "a/000.png").read_bytes()[:400])
    summary = run(folder, tmp_path / "p.parquet", workers=2)
    assert set(summary.failures) == {"empty.jpg", "cut.png"}
    assert str(tmp_path) not in "".join(summary.failures.values())
    store = ProposalStore(summary.path)
    assert store.failures == summary.failures
    assert len(store) == N


def test_too_many_bad_images_stop_it_and_nothing_is_lost(folder, tmp_path, done):
    for i in range(8):
        (folder / f"bad{i}.png").write_bytes(b"no image")
    out = tmp_path / "p.parquet"
    with pytest.raises(DataError, match=r"8 of 32 images can't be used.*max_unreadable=0\.1(.|\n)*bad0\.png: "):
        run(folder, out)
    assert not out.exists()
    done.clear()
    summary = run(folder, out, ProposalSettings(scale=100, max_unreadable=0.25))
    assert done == []  # all of it was saved
    assert len(summary.failures) == 8


def test_too_many_bad_images_stop_it_early(tmp_path, done):
    make_images(tmp_path / "photos", 100)
    for i in range(10):
        (tmp_path / f"photos/a/{i:03d}.bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="10 of 50 images can't be used"):
        run(tmp_path / "photos", tmp_path / "p.parquet")
    assert len(done) == 50


def test_an_engine_that_fails_on_one_image_is_a_failure_of_that_image(folder, tmp_path, monkeypatch):
    from headstart.proposals.random_boxes import RandomBoxes

    search = RandomBoxes.__call__

    def fragile(self, image, rng):
        if image.shape[1] == width:
            raise RuntimeError("odd width")
        return search(self, image, rng)

    width = 39
    Image.new("RGB", (width, 40)).save(folder / "odd.png")
    monkeypatch.setattr(RandomBoxes, "__call__", fragile)
    summary = run(folder, tmp_path / "p.parquet", RANDOM)
    assert summary.failures == {"odd.png": "random failed (RuntimeError: odd width)"}


def test_more_unusable_images_than_are_shown_are_listed_beside_the_file(folder, tmp_path):
    for i in range(12):
        (folder / f"bad{i:02d}.png").write_bytes(b"no image")
    (folder / "bad03.png").write_bytes(b"")
    settings = ProposalSettings(engine="random", max_unreadable=0.5)
    summary = run(folder, tmp_path / "p.parquet", settings)
    assert summary.unusable_images == 12
    assert list(summary.failures) == [f"bad{i:02d}.png" for i in range(10)]
    assert summary.failures_file == tmp_path / "p.parquet.unusable.tsv"
    lines = summary.failures_file.read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"bad{i:02d}.png" for i in range(12)]
    assert lines[3] == "bad03.png\tempty file (zero bytes)"
    text = io.StringIO()
    Console(width=400, file=text).print(summary.table())
    assert "12, left out" in text.getvalue()
    assert f"... and 2 more; all of them: {summary.failures_file}" in text.getvalue()
    for i in (1, 2):
        (folder / f"bad{i:02d}.png").unlink()
    summary = run(folder, tmp_path / "p.parquet", settings)
    assert len(summary.failures) == 10
    assert summary.failures_file is None
    assert not (tmp_path / "p.parquet.unusable.tsv").exists()


# Tar shards


@pytest.fixture
def packed(folder, tmp_path):
    """The images in three shards; and a folder of the same names: its subfolders are called as the shards are."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    (tmp_path / "packed").mkdir()
    for i in range(3):
        (folder.parent / f"unpacked/s-{i}.tar").mkdir(parents=True)
        with tarfile.open(tmp_path / f"packed/s-{i}.tar", "w", format=tarfile.GNU_FORMAT) as archive:
            for name in names[i::3]:
                archive.add(folder / name, str(name))
                target = folder.parent / f"unpacked/s-{i}.tar" / name
                target.parent.mkdir(exist_ok=True)
                shutil.copy(folder / name, target)
    return tmp_path / "packed", tmp_path / "unpacked"


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_what_their_images_would(packed, tmp_path, workers):
    shards, unpacked = packed
    before = sorted(shards.rglob("*"))
    a = run(shards, tmp_path / "a.parquet", workers=workers)
    b = run(unpacked, tmp_path / "b.parquet")
    assert pq.read_table(a.path).equals(pq.read_table(b.path))
    assert a.images == N
    assert sorted(shards.rglob("*")) == before
    ProposalStore(a.path).check_images(shards)


def test_a_listed_set_is_not_listed_again(packed, tmp_path, monkeypatch):
    found = ImageSet(packed[0])
    found.share(tmp_path / "index.arrow")
    monkeypatch.setattr(propose_module.ImageSet, "__init__", None)
    summary = run(found, tmp_path / "p.parquet", RANDOM, workers=1)
    assert summary.images == N
    assert found.names[0] == "s-0.tar/a/000.png"
    assert (tmp_path / "index.arrow").exists()


def test_a_shard_that_is_cut_off_gives_the_others(packed, tmp_path, capsys):
    shards, _ = packed
    cut = shards / "s-1.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    summary = propose(shards, tmp_path / "p.parquet", settings=ProposalSettings(engine="random"), workers=0)
    assert "s-1.tar: is cut off at byte 9,000, in the middle of a file" in capsys.readouterr().err
    assert 16 <= summary.images < N
    (name,) = summary.failures
    assert name.startswith("s-1.tar/")
    assert summary.failures[name] == "cut off, its shard ends in the middle of it"


# Shares of a job array


@pytest.fixture
def whole(folder, tmp_path):
    return run(folder, tmp_path / "whole.parquet", RANDOM).path


def test_jobs_do_their_shares_and_the_last_one_joins(folder, tmp_path, whole, done):
    out = tmp_path / "p.parquet"
    done.clear()
    names = list(ImageSet(folder).names)
    for i, shard in enumerate(["2/3", (0, 3)]):
        summary = run(folder, out, RANDOM, shard=shard)
        assert isinstance(summary, ShardSummary)
        assert (summary.images, summary.new_images) == (8, 8)
        assert summary.missing_images == 16 - 8 * i
        assert not out.exists()
    assert done == names[16:] + names[:8]
    assert summary.missing == {"1/3": 8}
    text = io.StringIO()
    Console(width=400, file=text).print(summary.table())
    for shown in ("shard 0/3", "8 of this shard", "8 images (1/3: 8)", "The job that finishes last writes the file"):
        assert shown in text.getvalue()
    summary = run(folder, out, RANDOM, shard="1/3")
    assert isinstance(summary, ProposeSummary)
    assert (summary.images, summary.new_images) == (N, 8)
    assert len(done) == N
    assert same(out, whole)
    assert not Parts(out).exists()
    done.clear()
    assert run(folder, out, RANDOM, shard="0/5").new_images == 0
    assert done == []
    assert not Parts(out).exists()


def test_the_number_of_shares_may_change_and_a_call_without_does_the_rest(folder, tmp_path, whole, done):
    out = tmp_path / "p.parquet"
    done.clear()
    for shard in ("0/4", "1/3", "3/7", "30/100"):
        run(folder, out, RANDOM, shard=shard)
    assert len(done) == len(set(done)) < N
    left = N - len(done)
    assert run(folder, out, RANDOM).new_images == left
    assert sorted(done) == list(ImageSet(folder).names)
    assert same(out, whole)
    assert not Parts(out).exists()


def test_more_jobs_than_images(folder, tmp_path, whole):
    out = tmp_path / "p.parquet"
    for i in range(30):
        summary = run(folder, out, RANDOM, shard=(i, 30))
        assert summary.new_images <= 1
    assert same(out, whole)


def test_a_share_that_is_none_is_refused(folder, tmp_path):
    with pytest.raises(SettingsError, match="shard 3/3: expected i/n with i from 0 to n-1"):
        run(folder, tmp_path / "p.parquet", shard="3/3")
    assert not Parts(tmp_path / "p.parquet").exists()


def test_shares_of_new_and_changed_images(folder, tmp_path, done):
    out = run(folder, tmp_path / "p.parquet", RANDOM).path
    make_images(folder, 3, first=N)
    Image.new("RGB", (33, 44)).save(folder / "a/002.png")
    (folder / "b/003.png").unlink()
    done.clear()
    for i in range(3):
        summary = run(folder, out, RANDOM, shard=(i, 3))
    assert sorted(done) == ["a/002.png", "a/024.png", "a/026.png", "b/025.png"]
    assert isinstance(summary, ProposeSummary)
    assert same(out, run(folder, tmp_path / "fresh.parquet", RANDOM).path)
    assert not Parts(out).exists()


def test_an_image_that_changes_between_shares_is_done_again(folder, tmp_path):
    out = tmp_path / "p.parquet"
    run(folder, out, RANDOM, shard="0/2")
    Image.new("RGB", (33, 44)).save(folder / "a/002.png")
    summary = run(folder, out, RANDOM, shard="1/2")
    assert isinstance(summary, ShardSummary)
    assert summary.missing == {"0/2": 1}
    assert run(folder, out, RANDOM, shard="0/2").new_images == 1
    assert same(out, run(folder, tmp_path / "fresh.parquet", RANDOM).path)


def test_rows_that_a_later_job_has_of_new_images_are_kept(folder, tmp_path, monkeypatch):
    """A job that began before they came must not join: it would leave them out and remove their rows."""
    out = tmp_path / "p.parquet"
    work = propose_module._Making.work

    def meanwhile(self, rows, workers):
        monkeypatch.setattr(propose_module._Making, "work", work)
        make_images(folder, 4, first=N)
        for i in range(3):
            run(folder, out, RANDOM, shard=(i, 4))
        return work(self, rows, workers)

    monkeypatch.setattr(propose_module._Making, "work", meanwhile)
    summary = run(folder, out, RANDOM, shard="3/4")
    assert (summary.missing_images, summary.unlisted_images) == (0, 2)
    text = io.StringIO()
    Console(width=400, file=text).print(summary.table())
    assert "2 images that other jobs found later" in text.getvalue()
    assert "Call without --shard to write the file" in text.getvalue()
    assert run(folder, out, RANDOM).new_images == 2
    assert same(out, run(folder, tmp_path / "fresh.parquet", RANDOM).path)


def test_jobs_of_other_versions_are_not_joined(folder, tmp_path, monkeypatch):
    from headstart.proposals import random_boxes

    out, work = tmp_path / "p.parquet", propose_module._Making.work

    def meanwhile(self, rows, workers):
        """A job on a machine with another version begins at the same moment, and finishes first."""
        monkeypatch.setattr(propose_module._Making, "work", work)
        monkeypatch.setattr(random_boxes.RandomBoxes, "version", "other")
        run(folder, out, RANDOM, shard="1/2")
        return work(self, rows, workers)

    monkeypatch.setattr(propose_module._Making, "work", meanwhile)
    with pytest.raises(RunError, match=r"engine_version is .* there and"):
        run(folder, out, RANDOM, shard="0/2")
    assert not out.exists()


@pytest.mark.parametrize("moment", ["before", "while"])
def test_the_last_two_jobs_finish_at_the_same_moment(folder, tmp_path, whole, monkeypatch, moment):
    out = tmp_path / "p.parquet"
    run(folder, out, RANDOM, shard="0/3")
    other = threading.Thread(target=run, args=(folder, out, RANDOM), kwargs={"shard": "2/3"})
    joining = Parts.joining

    @contextlib.contextmanager
    def meet(self, show):
        """The first to have written its last part waits until the other one has, too."""
        if threading.current_thread() is other:
            with joining(self, show):
                yield
            return
        if moment == "before":
            other.start()
            other.join()
        with joining(self, show):
            if moment == "while":
                other.start()
                wait_for(lambda: len(saved_images(out)) == N)
            yield

    monkeypatch.setattr(Parts, "joining", meet)
    summary = run(folder, out, RANDOM, shard="1/3")
    other.join()
    assert isinstance(summary, ProposeSummary)
    assert same(out, whole)
    assert not Parts(out).exists()


def test_bad_images_of_a_small_share_do_not_stop_it(folder, tmp_path):
    for i in range(2):
        (folder / f"a/000{i}.png").write_bytes(b"no image")
    for i in range(8):
        summary = run(folder, tmp_path / "p.parquet", RANDOM, shard=(i, 8))
        if i == 0:
            assert (summary.images, summary.unusable_images) == (3, 2)
    assert summary.images == N


# Other processes: kills, crashes, full disks

SCRIPT = """
import os, resource, signal, sys, time
from pathlib import Path
import headstart.verbs.propose as module
from headstart.verbs.propose import ProposalSettings, propose

folder, out, log = sys.argv[1:4]
options = dict(option.split("=") for option in sys.argv[4:])
module.PART_IMAGES = 3
module.PART_SECONDS = float(options.get("part_seconds", 1e9))
module.CHUNK = 2
events_left = int(options.get("die_after", -1))

def event():
    global events_left
    events_left -= 1
    if events_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def watched(function, note=False):
    def call(*args, **rest):
        event()
        if note:
            with open(log, "a") as handle:
                handle.write(args[1] + "\\n")
            time.sleep(60 if args[1] == options.get("stuck") else float(options.get("slow", 0)))
            if args[1] == options.get("crash"):
                os._exit(9)
        result = function(*args, **rest)
        event()
        return result
    return call

module._row = watched(module._row, note=True)
os.replace = watched(os.replace)
Path.unlink = watched(Path.unlink)
Path.rmdir = watched(Path.rmdir)
if "file_limit" in options:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(options["file_limit"]),) * 2)

if __name__ == "__main__" or "unguarded" in options:
    settings = ProposalSettings(engine="random")
    propose(
        folder, out, settings=settings, workers=int(options["workers"]), shard=options.get("shard"), progress=False
    )
"""


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    processes = []

    def call(folder, out, log="log", **options):
        command = [
            sys.executable,
            script,
            folder,
            out,
            tmp_path / log,
            *(f"{k}={v}" for k, v in options.items()),
        ]
        process = subprocess.Popen(
            [str(part) for part in command],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell that starts the tests in the background has them ignore Ctrl-C, and they would pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        processes.append(process)
        return process

    yield call
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def saved_images(out):
    parts = Path(f"{out}.parts").glob("[!.]*.parquet")
    return {name for part in parts for name in pq.read_table(part)["image"].to_pylist()}


def test_killed_at_any_moment_and_called_again(folder, tmp_path, whole, start):
    """Before and after each image, renaming and removal: every kill hits another kind of moment."""
    out = tmp_path / "p.parquet"
    rng = random.Random(0)
    kills = 0
    moments = [1, 8, *(rng.randint(9, 30) for _ in range(4)), 8, 3, 1, 1, 6, 3, 2, -1]
    for attempt, die_after in enumerate(moments):
        before = saved_images(out)
        process = start(folder, out, log=f"log{attempt}", workers=0, die_after=die_after)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        log = tmp_path / f"log{attempt}"
        assert before.isdisjoint(log.read_text().split() if log.exists() else [])
        assert not out.exists() or same(out, whole)  # never half a file
    assert process.returncode == 0
    assert kills >= 7
    assert same(out, whole)
    assert {path.name for path in tmp_path.iterdir() if "p.parquet" in path.name} == {"p.parquet"}


def test_jobs_killed_at_any_moment(folder, tmp_path, whole, start):
    """One after the other, with other numbers of shares; at the end one call does the rest and joins."""
    out = tmp_path / "p.parquet"
    rng = random.Random(2)
    moments = [({"shard": shard}, rng.randint(5, 25)) for shard in ("0/3", "2/3", "0/2", "1/3", "0/2", "1/2")]
    moments += [({}, 17), ({}, 9), ({}, 5), ({}, -1)]
    everyone, kills = set(), 0
    for attempt, (options, die_after) in enumerate(moments):
        before, log = saved_images(out), tmp_path / f"log{attempt}"
        process = start(folder, out, log=log, workers=0, die_after=die_after, **options)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        worked_on = log.read_text().split() if log.exists() else []
        everyone.update(worked_on)
        assert before.isdisjoint(worked_on)
        if out.exists():
            assert same(out, whole)  # never half a file
        else:
            assert before <= saved_images(out)
            assert len(worked_on) - len(saved_images(out) - before) <= 3  # less than a part is lost
    assert process.returncode == 0
    assert kills >= 8
    assert everyone == set(ImageSet(folder).names)
    assert same(out, whole)
    assert {path.name for path in tmp_path.iterdir() if "p.parquet" in path.name} == {"p.parquet"}


def test_jobs_side_by_side_killed_at_random_moments(folder, tmp_path, whole, start):
    out = tmp_path / "p.parquet"
    rng = random.Random(0)

    def begin(attempt):
        names = [f"log{attempt}-{i}" for i in range(3)]
        jobs = [start(folder, out, log=name, workers=i % 2, slow=0.05, shard=f"{i}/3") for i, name in enumerate(names)]
        return jobs, [tmp_path / name for name in names]

    for attempt in range(2):
        before = saved_images(out)
        jobs, logs = begin(attempt)
        wait_for(lambda logs=logs: any(log.exists() for log in logs))
        for job in rng.sample(jobs, 3):
            time.sleep(rng.uniform(0, 0.25))
            job.kill()
        for job in jobs:
            job.wait()
        assert before.isdisjoint(name for log in logs if log.exists() for name in log.read_text().split())
        assert before <= saved_images(out)
    before = saved_images(out)
    jobs, logs = begin("last")
    for job in jobs:
        _, errors = job.communicate(timeout=60)
        assert job.returncode == 0, errors
    worked_on = [name for log in logs if log.exists() for name in log.read_text().split()]
    assert sorted(worked_on) == sorted(set(ImageSet(folder).names) - before)
    assert same(out, whole)
    assert {path.name for path in tmp_path.iterdir() if "p.parquet" in path.name} == {"p.parquet"}


def test_finished_rows_are_saved_however_slow_the_next_image_is(folder, tmp_path, start):
    (folder / "a/003.png").write_bytes((folder / "a/002.png").read_bytes())
    out = tmp_path / "p.parquet"
    process = start(folder, out, workers=1, stuck="a/003.png", part_seconds=0.2)
    wait_for(lambda: len(saved_images(out)) == 2)
    process.kill()
    process.wait()
    assert run(folder, out, RANDOM).new_images == N + 1 - 2


def test_a_killed_parent_takes_its_workers_along(folder, tmp_path, whole, start):
    out = tmp_path / "p.parquet"
    for seconds in (0.1, 0.3):
        process = start(folder, out, log="log", workers=2, slow=0.2)
        wait_for(lambda: (tmp_path / "log").exists())
        time.sleep(seconds)
        children = children_of(process.pid)
        assert len(children) >= 2
        process.kill()
        process.wait()
        wait_for(lambda children=children: not any(alive(pid) for pid in children))
        (tmp_path / "log").unlink()
    run(folder, out, RANDOM)
    assert same(out, whole)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split(")")[1].split()[0] != "Z"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_with_workers(folder, tmp_path, whole, start):
    out = tmp_path / "p.parquet"
    process = start(folder, out, workers=2, slow=0.2)  # seconds between the first part and the end
    wait_for(lambda: len(saved_images(out)) > 0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers alike
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "the same command goes on from there" in " ".join(errors.split())
    assert errors.count("Traceback") == 1  # the script's own KeyboardInterrupt, none from a worker
    saved = len(saved_images(out))
    assert 0 < saved < N
    assert run(folder, out, RANDOM).new_images == N - saved
    assert same(out, whole)


def test_an_image_that_kills_its_worker_is_a_failure(folder, tmp_path, start):
    process = start(folder, tmp_path / "p.parquet", workers=2, crash="a/004.png")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    store = ProposalStore(tmp_path / "p.parquet")
    assert store.failures == {"a/004.png": "its worker process died (out of memory, or a crash in a library)"}
    assert len(store) == N - 1


def test_full_disk_loses_nothing(folder, tmp_path, whole, start):
    out = tmp_path / "p.parquet"
    limit = whole.stat().st_size - 100  # the parts fit, the finished file does not
    process = start(folder, out, workers=0, file_limit=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "RunError" in errors
    assert "p.parquet: could not be written (" in errors
    assert not out.exists()
    assert len(saved_images(out)) == N
    assert run(folder, out, RANDOM).new_images == 0
    assert same(out, whole)


def test_script_without_main_guard_is_told_so(folder, tmp_path, start):
    process = start(folder, tmp_path / "p.parquet", workers=2, unguarded=1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "RunError: The worker processes can't start" in errors
    assert '`if __name__ == "__main__":`' in errors


def test_two_at_once_are_refused(folder, tmp_path, start):
    out = tmp_path / "p.parquet"
    process = start(folder, out, workers=0, slow=0.2)
    wait_for(lambda: (tmp_path / "log").exists())
    with pytest.raises(RunError, match="another process is making these proposals"):
        run(folder, out, RANDOM)
    process.kill()
    process.wait()
    run(folder, out, RANDOM)


@pytest.mark.skipif("HEADSTART_DATA" not in os.environ, reason="HEADSTART_DATA names no folder with real data")
def test_real_photos(tmp_path):
    source = Path(os.environ["HEADSTART_DATA"]) / "coco6k/images"
    (tmp_path / "photos").mkdir()
    for name in sorted(os.listdir(source))[:40]:
        shutil.copy(source / name, tmp_path / "photos")
    summary = propose(tmp_path / "photos", progress=False)
    assert summary.images == 40
    assert 5 < summary.boxes_per_image["mean"] < 40
    assert sum(summary.fallbacks.values()) < 8
