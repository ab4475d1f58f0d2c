"""Loading: the report says what became of every key, and nothing is executed."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headstart.detectors.weights import load_state, read_metadata, read_state, save_detector, summarise
from headstart.errors import WeightsError


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
