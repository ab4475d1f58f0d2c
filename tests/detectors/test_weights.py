"""Loading: the report says what became of every key, and nothing is executed."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headstart.detectors.weights import load_state, read_metadata, read_state, save_detector, summarise
from headstart.errors import WeightsError


def class_of_an_absent_package(monkeypatch, full_name: str, bases: tuple[type, ...] = (), **methods) -> type:
    """A class that pickles find under ``full_name``; ``monkeypatch.undo()`` makes it absent."""
    module_name, name = full_name.rsplit(".", 1)
    module = types.ModuleType(module_name)
    made = type(name, bases, {"__module__": module_name, **methods})
    setattr(module, name, made)
    packages = module_name.split(".")
    for depth in range(1, len(packages)):
        package = ".".join(packages[:depth])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, module_name, module)
    return made


class Net(nn.Module):
    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, outputs)


def test_report_names_every_case():
    net = Net()
    kept = net.head.weight.detach().clone()
    state = {
        "body.weight": torch.ones(4, 3),
        "body.bias": torch.ones(5),
        "head.weight": torch.ones(2, 4),
        "extra": torch.ones(1),
    }
    report = load_state(net, state, "file", reinitialise=["head."])
    assert report.matched == ["body.weight"]
    assert report.missing == ["head.bias"]
    assert report.unexpected == ["extra"]
    assert report.reshaped == [("body.bias", [5], [4])]
    assert report.reinitialised == ["head.weight"]
    assert torch.equal(net.body.weight, torch.ones(4, 3))
    assert torch.equal(net.head.weight, kept)
    assert report.table().row_count == 5


def test_nothing_that_fits_is_an_error():
    with pytest.raises(WeightsError, match=r"other: not one of its 1 keys fits.*module\.w.*body\.weight"):
        load_state(Net(), {"module.w": torch.ones(1)}, "other")


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_torch_files_with_tensors_only(tmp_path, nested):
    state = Net().state_dict()
    torch.save({nested: state, "epoch": 3} if nested else state, tmp_path / "w.pth")
    assert read_state(tmp_path / "w.pth").keys() == state.keys()


def test_a_file_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"state_dict": Evil()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth: holds more than tensors.*execute code"):
        read_state(tmp_path / "w.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_and_logs_beside_the_weights_do_not_stand_in_the_way(tmp_path, monkeypatch, zipped):
    node = class_of_an_absent_package(monkeypatch, "yacs.config.CfgNode", (dict,))
    config = node(MODEL=node(TYPE="swin"))
    config.frozen = True
    state = Net().state_dict()
    file = {
        "state_dict": state,
        "args": argparse.Namespace(output_dir=pathlib.Path("out"), rate=np.float64(0.1), seed=np.int64(3)),
        "config": config,
        "history": {"loss": np.arange(3.0), "best": np.float32(2)},
    }
    torch.save(file, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert "yacs.config" not in sys.modules
    loaded = read_state(tmp_path / "w.pth")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_log_that_refers_to_its_own_methods(tmp_path, monkeypatch):
    buffer = class_of_an_absent_package(
        monkeypatch, "mmengine.logging.history_buffer.HistoryBuffer", (), mean=lambda self: 0
    )
    buffer.mean.__module__, buffer.mean.__qualname__ = buffer.__module__, "HistoryBuffer.mean"
    log = buffer()
    log.values, log.methods = np.arange(3.0), {"mean": buffer.mean}
    torch.save({"state_dict": Net().state_dict(), "message_hub": {"loss": log}}, tmp_path / "w.pth")
    monkeypatch.undo()
    assert read_state(tmp_path / "w.pth").keys() == Net().state_dict().keys()


@pytest.mark.parametrize("name", ["yacs.config.CfgNode", "omegaconf.dictconfig.DictConfig"])
def test_nothing_runs_of_what_is_replaced_even_where_it_is_installed(tmp_path, monkeypatch, name):
    ran = []
    made = class_of_an_absent_package(
        monkeypatch,
        name,
        __init__=lambda self, *args: ran.append("init"),
        __setstate__=lambda self, state: ran.append("setstate"),
        __reduce__=lambda self: (made, ("argument",), {"state": 1}),
    )
    torch.save({"state_dict": Net().state_dict(), "args": made()}, tmp_path / "w.pth")
    ran.clear()
    read_state(tmp_path / "w.pth")
    assert ran == []
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert ran == ["init", "setstate"]  # what a reader that trusts the file would have run


class Calls:
    """Pickled as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self, *arguments):
        """So that pickle takes it for a function, too: a call of what a call gives."""


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), r"(posix|nt)\.system"),
        (eval, ("open('{}', 'w')",), "eval"),
        (os.rename, ("{}", "{}x"), r"(posix|nt)\.rename"),
        (types.SimpleNamespace, (), "types.SimpleNamespace"),
    ],
)
def test_calls_hidden_in_settings_are_refused(tmp_path, function, arguments, named):
    owned = tmp_path / "owned"
    evil = Calls(function, *(a.format(owned) for a in arguments))
    for hidden in (argparse.Namespace(note=evil), {"history": [evil]}, Calls(argparse.Namespace, evil)):
        torch.save({"state_dict": Net().state_dict(), "args": hidden}, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=rf"w\.pth: .*execute code .*refused \(it names {named}\)"):
            read_state(tmp_path / "w.pth")
        assert not owned.exists()


def test_a_stand_in_gives_nothing_that_can_be_called(tmp_path):
    """getattr is replaced, so that a file can't get at a function through an object that is allowed."""
    through = Calls(Calls(getattr, argparse.Namespace, "__init__"), "argument")
    torch.save({"state_dict": Net().state_dict(), "args": through}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"execute code .* call reduce for unrecognized function"):
        read_state(tmp_path / "w.pth")


def test_torch_allows_no_more_afterwards(tmp_path):
    torch.save({"w": torch.ones(1), "args": argparse.Namespace()}, tmp_path / "w.pth")
    before = set(torch.serialization.get_safe_globals())
    read_state(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_networks_side_by_side_keep_their_names(tmp_path):
    a, b = Net().state_dict(), Net().state_dict()
    torch.save(
        {"teacher": a, "online_network_state_dict": b, "epoch": 3, "optimizer": {"state": {0: {}}}, "steps": {1: 2}},
        tmp_path / "w.pth",
    )
    state = read_state(tmp_path / "w.pth")
    assert list(state) == [f"teacher.{key}" for key in a] + [f"online_network.{key}" for key in b]
    assert torch.equal(state["online_network.head.bias"], b["head.bias"])


def test_numpy_files(tmp_path):
    arrays = {"net/~/conv/w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "net/counter": np.array(3)}
    np.savez(tmp_path / "w.npz", **arrays)
    state = read_state(tmp_path / "w.npz")
    assert {key: value.tolist() for key, value in state.items()} == {
        key: value.tolist() for key, value in arrays.items()
    }


def test_numpy_files_with_python_objects_are_refused(tmp_path):
    owned = tmp_path / "owned"
    np.savez(tmp_path / "w.npz", w=np.array([Calls(os.system, f"touch {owned}")], dtype=object))
    np.save(tmp_path / "w.npy", {"w": Calls(os.system, f"touch {owned}")}, allow_pickle=True)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "words.npz", w=np.array(["a"]))
    for name, message in [
        ("w.npz", "not a readable .npz file of plain arrays .*allow_pickle=False"),
        ("w.npy", r"execute code from it, which is refused. docs/checkpoints.md says how to convert"),
        ("broken.npz", "not a readable .npz"),
        ("words.npz", "not a readable .npz"),
    ]:
        with pytest.raises(WeightsError, match=message) as error:
            read_state(tmp_path / name)
        assert name in str(error.value)
    assert not owned.exists()


def test_damaged_missing_and_empty_files(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    (tmp_path / "b.pth").write_bytes(b"not a zip")
    torch.save({"epoch": 3}, tmp_path / "c.pth")
    for name, message in [
        ("a.safetensors", "not a readable safetensors"),
        ("b.pth", "weights"),
        ("c.pth", "no tensors"),
    ]:
        with pytest.raises(WeightsError, match=message) as error:
            read_state(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(WeightsError, match="no such weights file"):
        read_state(tmp_path / "d.pth")


def test_saved_detectors_load_without_us(tmp_path):
    net = Net()
    save_detector(tmp_path / "d.safetensors", net.state_dict(), {"classes": ["a"]})
    Net().load_state_dict(load_file(tmp_path / "d.safetensors"))
    assert read_metadata(tmp_path / "d.safetensors") == {"classes": ["a"]}
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    assert read_metadata(tmp_path / "foreign.safetensors") == {}


def test_long_lists_are_counted():
    keys = [f"a.b.{i}" for i in range(9)] + ["c.d.e"]
    assert summarise(keys) == "a.b (9), c.d"
