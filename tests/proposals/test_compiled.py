"""What is compiled is kept: beside the source, else in the user's cache, else in a private folder of this process.

Folders that can't be written are files here: unlike permissions, these stop the root user as well.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

import headstart
from headstart.proposals import compiled

SOURCE = """
from headstart.proposals.compiled import entry, inlined, inner

@inlined
def _twice(x):
    return x + x

@inner
def _four_times(x):
    return _twice(_twice(x))

@entry
def one_more(x):
    return _four_times(x) + {}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's empty home; nothing of this machine's own caches is seen or left changed."""
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, "")  # so that it is put back, also where the code under test sets it
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    numba.config.reload_config()
    yield folder
    monkeypatch.undo()
    numba.config.reload_config()


@pytest.fixture
def package(tmp_path, monkeypatch, home):
    """A folder with a module ``arithmetic`` whose functions are compiled."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "arithmetic.py").write_text(SOURCE.format(1))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    sys.modules.pop("arithmetic", None)


def start():
    """The function as a process that has just started imports it."""
    sys.modules.pop("arithmetic", None)
    importlib.invalidate_caches()
    return importlib.import_module("arithmetic").one_more


def loaded(function):
    """Whether its code came from an earlier start."""
    hits, misses = function.stats.cache_hits.total(), function.stats.cache_misses.total()
    assert hits + misses == 1
    return hits == 1


def kept_in(folder: Path):
    return sorted(path.parent for path in folder.rglob("arithmetic.one_more*.nbi"))


def can_not_be_written(folder: Path):
    if folder.is_dir():
        folder.rmdir()
    folder.write_text("in the way")


def test_compiled_once_and_kept_beside_the_source(package, home):
    first = start()
    assert not compiled.is_kept(first)
    assert first(3) == 13
    assert compiled.is_kept(first)
    assert not loaded(first)
    assert kept_in(package) == [package / "__pycache__"]
    later = start()
    assert compiled.is_kept(later)
    assert later(4) == 17
    assert loaded(later)
    assert kept_in(home) == []


def test_a_changed_source_is_compiled_anew(package):
    start()(3)
    (package / "arithmetic.py").write_text(SOURCE.format(100))
    later = start()
    assert later(3) == 112
    assert not loaded(later)


def test_kept_in_the_users_cache_where_the_source_is_read_only(package, home):
    can_not_be_written(package / "__pycache__")
    assert start()(3) == 13
    assert len(kept_in(home)) == 1
    later = start()
    assert later(3) == 13
    assert loaded(later)
    assert "NUMBA_CACHE_DIR" not in os.environ


def test_kept_in_a_private_folder_where_nothing_can_be_written(package, home, monkeypatch, tmp_path):
    """This process and its workers share one compilation; the folder goes with the process."""
    can_not_be_written(package / "__pycache__")
    can_not_be_written(home)
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    at_exit = []
    monkeypatch.setattr(compiled.atexit, "register", lambda *call, **rest: at_exit.append((call, rest)))
    first = start()
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700  # what lies there is unpickled: nobody else may write
    assert not compiled.is_kept(first)
    assert first(3) == 13
    assert not loaded(first)
    assert len(kept_in(folder)) == 1

    child = (
        "from arithmetic import one_more as f; print(f(5), f.stats.cache_hits.total(), f.stats.cache_misses.total())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), *filter(None, sys.path)])}
    output = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["21", "1", "0"]
    assert folder.is_dir()  # it is its maker's to remove

    ((remove, *arguments), rest), *others = at_exit
    assert others == []  # one folder, however many functions
    remove(*arguments, **rest)
    assert not folder.exists()


def test_works_where_even_the_folder_that_was_named_can_not_be_written(package, home, monkeypatch, tmp_path):
    can_not_be_written(package / "__pycache__")
    can_not_be_written(home)
    can_not_be_written(tmp_path / "file")
    named = str(tmp_path / "file" / "cache")
    monkeypatch.setenv("NUMBA_CACHE_DIR", named)
    numba.config.reload_config()
    function = start()
    assert not compiled.is_kept(function)
    assert function(3) == 13
    assert compiled.is_kept(function)  # by this process
    assert os.environ["NUMBA_CACHE_DIR"] == named


SEARCH = """
import sys
import numpy as np
from headstart.proposals import kernels
from headstart.proposals.selective_search import MODES, prepare, selective_search

prepare(show=False)
image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
boxes = [selective_search(image, mode=mode).tolist() for mode in MODES]
entries = [f for f in vars(kernels).values() if hasattr(f, "signatures") and type(f._cache).__name__ == "FunctionCache"]
print(hash(str(boxes)), len(entries), sum(f.stats.cache_misses.total() for f in entries))
"""


@pytest.mark.slow
def test_selective_search_works_in_a_read_only_installation(home, tmp_path, monkeypatch):
    """A copy of the package without any folder that can be written: its parent compiles, its child loads."""
    library = tmp_path / "library"
    shutil.copytree(
        Path(headstart.__file__).parent, library / "headstart", ignore=shutil.ignore_patterns("__pycache__")
    )
    can_not_be_written(library / "headstart" / "proposals" / "__pycache__")
    can_not_be_written(home)
    again = f"import subprocess\nsubprocess.run([sys.executable, '-c', {SEARCH!r}], check=True)"
    environment = {**os.environ, "PYTHONPATH": str(library), "PYTHONHASHSEED": "0"}
    code = f"{SEARCH}assert kernels.__file__.startswith({str(library)!r})\nsys.stdout.flush()\n{again}"
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    parent, child = (line.split() for line in output.stdout.splitlines())
    assert parent[:2] == child[:2]
    assert int(parent[2]) >= int(parent[1]) > 0  # each was compiled
    assert child[2] == "0"
