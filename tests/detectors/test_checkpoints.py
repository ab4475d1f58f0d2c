"""Published checkpoints: written here as their authors write them, and read back with the features unchanged."""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from headstart.detectors.checkpoints import BackboneState, prefixed, read_backbone, recognise, to_backbone
from headstart.errors import WeightsError

State = dict[str, Tensor]
IMAGE = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).sin()


def randomised(net: nn.Module, seed: int) -> nn.Module:
    """Batch norm's statistics, too, so that swapping any two tensors shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if key.endswith("num_batches_tracked"):
                value.fill_(seed + 5)
            elif value.is_floating_point():
                spread = 0.2 if value.ndim > 1 else 0.5
                value.copy_(torch.rand(value.shape, generator=generator) * spread + (value.ndim == 1) * 0.5 - 0.1)
    return net.eval()


def resnet(seed: int = 0, block: type = Bottleneck, blocks: tuple[int, ...] = (2, 1, 1, 1)) -> ResNet:
    net = ResNet(block, list(blocks), width_per_group=8 if block is Bottleneck else 64)
    net.fc = nn.Identity()
    return randomised(net, seed)


def swin(seed: int = 0, window: int = 4, img_size: int = 64) -> SwinTransformer:
    net = SwinTransformer(
        img_size=img_size, embed_dim=8, depths=(2, 1, 2, 1), num_heads=(2, 2, 2, 2), window_size=window, num_classes=0
    )
    return randomised(net, seed)


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + key: value for key, value in state.items()}


def head(name: str, *shape: int) -> State:
    return {f"{name}.weight": torch.rand(shape or (4, 4)), f"{name}.bias": torch.rand(4)}


def in_a_sequence(state: Mapping[str, Tensor]) -> State:
    """``nn.Sequential(*list(resnet.children())[:-1]).state_dict()``"""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    parts = (key.split(".", 1) for key in state)
    return {f"{numbers[name]}.{rest}": state[f"{name}.{rest}"] for name, rest in parts}


def moco_v2(state: State, other: State) -> tuple[dict, dict]:
    weights = {
        **under("module.encoder_q.", state),
        **head("module.encoder_q.fc.0"),
        **head("module.encoder_q.fc.2"),
        **under("module.encoder_k.", other),
        **head("module.encoder_k.fc.2"),
        "module.queue": torch.rand(4, 8),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    file = {"epoch": 200, "arch": "resnet50", "state_dict": weights, "optimizer": optimiser_state()}
    return file, {"head": 4, "momentum network": len(other) + 2, "queue": 2}


def moco_v3(state: State, other: State) -> tuple[dict, dict]:
    weights = {
        **under("module.base_encoder.", state),
        **head("module.base_encoder.fc.0"),
        **under("module.momentum_encoder.", other),
        **head("module.predictor.0"),
    }
    file = {"epoch": 1, "arch": "resnet50", "state_dict": weights, "scaler": {"scale": 2.0, "growth_factor": 2.0}}
    return file, {"head": 2, "momentum network": len(other), "predictor": 2}


def swav(state: State, other: State) -> tuple[dict, dict]:
    weights = {
        **under("module.", state),
        **head("module.projection_head.0"),
        **head("module.projection_head.3"),
        "module.prototypes.weight": torch.rand(3, 4),
    }
    return {"epoch": 800, "state_dict": weights, "optimizer": optimiser_state()}, {"projector": 4, "prototypes": 1}


def pixpro(state: State, other: State) -> tuple[dict, dict]:
    weights = {
        **under("module.encoder.", state),
        **head("module.projector.linear1"),
        **under("module.encoder_k.", other),
        **head("module.projector_k.linear1"),
        **head("module.value_transform"),
    }
    file = {"model": weights, "opt": argparse.Namespace(lr=1.0, output_dir="out", rate=np.float64(0.5)), "epoch": 100}
    return file, {"projector": 4, "momentum network": len(other) + 2}


def soco(state: State, other: State) -> tuple[dict, dict]:
    weights = {
        **under("module.encoder.", state),
        **head("module.neck.lateral_convs.0.conv"),
        **head("module.head.conv1"),
        **head("module.projector.linear1"),
        **head("module.predictor.linear1"),
        **under("module.encoder_k.", other),
        **head("module.neck_k.lateral_convs.0.conv"),
    }
    file = {"opt": argparse.Namespace(model="SoCo_FPN"), "model": weights, "optimizer": optimiser_state(), "epoch": 4}
    dropped = {"neck": 2, "detection head": 2, "projector": 2, "predictor": 2, "momentum network": len(other) + 2}
    return file, dropped


def scrl(state: State, other: State) -> tuple[dict, dict]:
    file = {
        "tag": "1000",
        "epoch": 1000,
        "max_eval_score": 0.7,
        "online_network_state_dict": {**under("encoder.", in_a_sequence(state)), **head("projector.l1")},
        "target_network_state_dict": {**under("encoder.", in_a_sequence(other)), **head("projector.l1")},
        "predictor_state_dict": head("l1"),
        "evaluator_state_dict": head("layer"),
        "optimizer_state_dict": optimiser_state(),
    }
    return file, {"projector": 2, "momentum network": len(other) + 2, "predictor": 2, "other parts": 2}


def byol_wrapped(state: State, other: State) -> tuple[dict, dict]:
    file = {
        **under("net.", state),
        **under("online_encoder.net.", state),
        **head("online_encoder.net.fc"),
        **head("online_encoder.projector.0"),
        **under("target_encoder.net.", other),
        **head("target_encoder.projector.0"),
        **head("online_predictor.0"),
    }
    dropped = {"other parts": len(state), "head": 2, "projector": 2, "momentum network": len(other) + 2, "predictor": 2}
    return file, dropped


def byol_distributed(state: State, other: State) -> tuple[dict, dict]:
    weights = {
        **under("module.online_network.encoder.", in_a_sequence(state)),
        **head("module.online_network.projetion.net.0"),
        **under("module.target_network.encoder.", in_a_sequence(other)),
        **head("module.predictor.net.0"),
    }
    return {"model": weights}, {"projector": 2, "momentum network": len(other), "predictor": 2}


def byol_backbones(state: State, other: State) -> tuple[dict, dict]:
    file = {"online_backbone": under("module.", state), "target_backbone": under("module.", other)}
    return file, {"momentum network": len(other)}


def mmselfsup(state: State, other: State) -> tuple[dict, dict]:
    weights = {
        "data_preprocessor.mean": torch.rand(3),
        **under("backbone.", state),
        **head("neck.fc0"),
        **head("head.predictor.fc0"),
        "target_net.steps": torch.tensor(4),
        **under("target_net.module.0.", other),
    }
    file = {"meta": {"epoch": 200, "cfg": "model = ..."}, "state_dict": weights}
    return file, {"other parts": 1, "projector": 2, "predictor": 2, "momentum network": len(other) + 1}


def lightly(state: State, other: State) -> tuple[dict, dict]:
    weights = {
        **under("backbone.", in_a_sequence(state)),
        **head("projection_head.layers.0"),
        **under("backbone_momentum.", in_a_sequence(other)),
    }
    return {"state_dict": weights}, {"projector": 2, "momentum network": len(other)}


def dino(state: State, other: State) -> tuple[dict, dict]:
    file = {
        "student": {**under("module.backbone.", other), **head("module.head.mlp.0")},
        "teacher": {**under("module.backbone.", state), **head("module.head.mlp.0")},
        "optimizer": optimiser_state(),
        "epoch": 100,
        "args": argparse.Namespace(arch="resnet50", out_dim=60000),
        "dino_loss": {"center": torch.rand(1, 4)},
        "fp16_scaler": {"scale": 65536.0},
    }
    return file, {"student": len(other) + 2, "head": 2, "other parts": 1}


def one_encoder(state: State, other: State) -> tuple[dict, dict]:
    return {**under("encoder.", state), **head("projector.0")}, {"projector": 2}


def supervised(state: State, other: State) -> tuple[dict, dict]:
    return {**state, **head("fc")}, {"head": 2}


def detector(state: State, other: State) -> tuple[dict, dict]:
    rest = {**head("backbone.fpn.inner_blocks.0.0"), **head("rpn.head.cls_logits"), **head("roi_heads.box_head.fc6")}
    return {**under("backbone.body.", state), **rest}, {"other parts of the detector": 6}


def detector_c4(state: State, other: State) -> tuple[dict, dict]:
    return {**under("backbone.", state), **head("rpn.head.cls_logits")}, {"other parts of the detector": 2}


@pytest.fixture
def settings_class(monkeypatch) -> type[dict]:
    """A class of a package that is there when the file is written, but not when it is read."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return module.CfgNode


def optimiser_state() -> dict:
    weight = nn.Parameter(torch.rand(3))
    optimiser = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimiser.step()
    return optimiser.state_dict()


RESNETS: list[tuple[str, str, Callable]] = [
    ("moco_v2", "module.encoder_q.", moco_v2),
    ("moco_v3", "module.base_encoder.", moco_v3),
    ("swav", "module.", swav),
    ("pixpro", "module.encoder.", pixpro),
    ("soco", "module.encoder.", soco),
    ("byol", "online_network.encoder.", scrl),
    ("byol", "online_encoder.net.", byol_wrapped),
    ("byol", "module.online_network.encoder.", byol_distributed),
    ("byol", "online_backbone.module.", byol_backbones),
    ("backbone", "backbone.", mmselfsup),
    ("backbone", "backbone.", lightly),
    ("dino", "teacher.module.backbone.", dino),
    ("encoder", "encoder.", one_encoder),
    ("plain", "", supervised),
    ("detector", "backbone.body.", detector),
    ("detector", "backbone.", detector_c4),
]


@pytest.mark.parametrize(("name", "network", "written"), RESNETS, ids=[w.__name__ for _, _, w in RESNETS])
def test_resnet_checkpoints_give_the_features_they_were_trained_for(tmp_path, name, network, written):
    source, other = resnet(0), resnet(1)
    file, dropped = written(source.state_dict(), other.state_dict())
    torch.save(file, tmp_path / "checkpoint.pth.tar")
    found = read_backbone(tmp_path / "checkpoint.pth.tar")
    assert (found.layout, found.network) == (name, network)
    assert {reason: len(keys) for reason, keys in found.dropped.items()} == dropped
    assert found.resized == []
    assert_same_features(source, resnet(2), found)


def assert_same_features(source: nn.Module, target: nn.Module, found: BackboneState) -> None:
    with torch.no_grad():
        expected = source(IMAGE)
        assert not torch.allclose(target(IMAGE), expected)
        target.load_state_dict(found.state)
        assert expected.isfinite().all()
        assert torch.equal(target(IMAGE), expected)
    for key, value in source.state_dict().items():
        assert torch.equal(found.state[key], value), key


def test_nothing_of_a_file_is_lost():
    """Every key is in the backbone or named as dropped, once."""
    state, _ = moco_v2(resnet(0).state_dict(), resnet(1).state_dict())
    found = to_backbone(state["state_dict"])
    named = [key for keys in found.dropped.values() for key in keys]
    assert sorted(named + list(prefixed(found, "module.encoder_q."))) == sorted(state["state_dict"])
    assert found.dropped["queue"] == ["module.queue", "module.queue_ptr"]


def test_old_torch_files(tmp_path):
    """torch wrote no zip before 1.6, when many of these checkpoints were made."""
    file, _ = pixpro(resnet(0).state_dict(), resnet(1).state_dict())
    torch.save(file, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_features(resnet(0), resnet(2), read_backbone(tmp_path / "old.pth"))


# --- haiku ---------------------------------------------------------------------------------------------------------


def haiku(net: ResNet, root: str, params: str = "", averages: str = "", first: str = "") -> dict[str, np.ndarray]:
    """The network under DeepMind's names, in haiku's array layouts, written down block by block."""
    arrays: dict[str, np.ndarray] = {}

    def conv(name: str, layer: nn.Conv2d) -> None:
        arrays[f"{params}{root}/~/{name}/w"] = layer.weight.detach().numpy().transpose(2, 3, 1, 0)

    def norm(name: str, layer: nn.BatchNorm2d) -> None:
        def vector(tensor: Tensor) -> np.ndarray:
            return tensor.detach().numpy().reshape(1, 1, 1, -1)

        arrays[f"{params}{root}/~/{name}/scale"] = vector(layer.weight)
        arrays[f"{params}{root}/~/{name}/offset"] = vector(layer.bias)
        for average, tensor in (("mean_ema", layer.running_mean), ("var_ema", layer.running_var)):
            arrays[f"{averages}{root}/~/{name}/~/{average}/average"] = vector(tensor)
            arrays[f"{averages}{root}/~/{name}/~/{average}/hidden"] = vector(tensor) * 0.9
            arrays[f"{averages}{root}/~/{name}/~/{average}/counter"] = np.array(
                int(layer.num_batches_tracked), np.int32
            )

    conv(f"initial_conv{first}", net.conv1)
    norm("initial_batchnorm", net.bn1)
    for group, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4)):
        for number, block in enumerate(layer):
            at = f"block_group_{group}/~/block_{number}/~"
            for index in range(3 if isinstance(block, Bottleneck) else 2):
                conv(f"{at}/conv_{index}", getattr(block, f"conv{index + 1}"))
                norm(f"{at}/batchnorm_{index}", getattr(block, f"bn{index + 1}"))
            if block.downsample is not None:
                conv(f"{at}/shortcut_conv", block.downsample[0])
                norm(f"{at}/shortcut_batchnorm", block.downsample[1])
    return arrays


@pytest.mark.parametrize("block", [Bottleneck, BasicBlock])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_converted_haiku_parameters(tmp_path, block, kind):
    source = resnet(0, block)
    arrays = haiku(source, "res_net50") | {
        "projector/linear/w": np.ones((2, 3), np.float32),
        "predictor/batch_norm/scale": np.ones(3, np.float32),
        "predictor/batch_norm/~/mean_ema/average": np.ones(3, np.float32),
        "classifier/b": np.ones(3, np.float32),
    }
    path = tmp_path / f"byol.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    else:
        save_file({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}, path)
    found = read_backbone(path)
    assert found.layout == "deepmind"
    counts = {reason: len(keys) for reason, keys in found.dropped.items()}
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in source.modules())
    running = "running sums, of which the averages are used"  # hidden twice, and the variance's counter
    assert counts == {"projector": 1, "predictor": 2, "classifier": 1, running: 3 * norms}
    assert all(value.is_contiguous() for value in found.state.values())
    assert_same_features(source, resnet(2, block), found)


def test_haiku_trees_side_by_side_give_the_online_network(tmp_path):
    """A whole experiment state: parameters and statistics in different trees, online and target networks."""
    source, other = resnet(0), resnet(1)
    online = haiku(source, "res_net50", "online_params/", "online_state/", first="_1")
    target = haiku(other, "res_net50", "target_params/", "target_state/", first="_1")
    np.savez(tmp_path / "byol.npz", **target, **online)
    found = read_backbone(tmp_path / "byol.npz")
    assert len(found.dropped["momentum network"]) == len(target)
    assert_same_features(source, resnet(2), found)


def haiku_features(arrays: Mapping[str, np.ndarray], image: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """DeepMind's ResNet v1 with bottlenecks, step by step on its own arrays: (B, 3, H, W) -> (B, C)."""

    def same(x: Tensor, size: int, stride: int, value: float = 0.0) -> Tensor:
        for dim in (3, 2):
            missing = max((-(-x.shape[dim] // stride) - 1) * stride + size - x.shape[dim], 0)
            both = [missing // 2, missing - missing // 2]
            x = F.pad(x, both if dim == 3 else [0, 0, *both], value=value)
        return x

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = torch.from_numpy(arrays[f"res_net50/~/{name}/w"].transpose(3, 2, 0, 1).copy())
        return F.conv2d(same(x, kernel.shape[2], stride), kernel, stride=stride)

    def norm(x: Tensor, name: str) -> Tensor:
        parts = ("scale", "offset", "~/mean_ema/average", "~/var_ema/average")
        scale, offset, mean, var = (
            torch.from_numpy(arrays[f"res_net50/~/{name}/{part}"].transpose(0, 3, 1, 2).copy()) for part in parts
        )
        return (x - mean) * scale * torch.rsqrt(var + 1e-5) + offset

    x = norm(conv(image, "initial_conv", 2), "initial_batchnorm").relu()
    x = F.max_pool2d(same(x, 3, 2, -torch.inf), 3, 2)
    for group, count in enumerate(blocks):
        for number in range(count):
            at = f"block_group_{group}/~/block_{number}/~"
            stride = 2 if group > 0 and number == 0 else 1
            shortcut = x
            if number == 0:
                shortcut = norm(conv(x, f"{at}/shortcut_conv", stride), f"{at}/shortcut_batchnorm")
            x = norm(conv(x, f"{at}/conv_0"), f"{at}/batchnorm_0").relu()
            x = norm(conv(x, f"{at}/conv_1", stride), f"{at}/batchnorm_1").relu()
            x = (norm(conv(x, f"{at}/conv_2"), f"{at}/batchnorm_2") + shortcut).relu()
    return x.mean((2, 3))


def test_haikus_own_computation_agrees_where_both_pad_alike():
    """Which holds for sides of 32k + 1 pixels; docs/checkpoints.md owns up to the rest."""
    arrays = haiku(resnet(0), "res_net50")
    net = resnet(2)
    net.load_state_dict(to_backbone({key: torch.from_numpy(value.copy()) for key, value in arrays.items()}).state)
    with torch.no_grad():
        errors = {}
        for side in (64, 65):
            image = F.interpolate(IMAGE, (side, side))
            errors[side] = (net(image) - haiku_features(arrays, image, (2, 1, 1, 1))).abs().max()
        assert errors[65] < 1e-4
        assert errors[64] > 1e-2


def test_what_the_docs_say_about_converting_files_works(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    torch_code, _, detcon_code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    source = resnet(0)

    torch.save({"state_dict": source.state_dict(), "note": types.SimpleNamespace()}, "checkpoint.pth")
    with pytest.raises(WeightsError, match=r"types\.SimpleNamespace"):
        read_backbone("checkpoint.pth")
    exec(torch_code, {})
    assert_same_features(source, resnet(2), read_backbone("checkpoint.safetensors"))

    trees: dict = {"params": {}, "state": {}}
    for key, value in haiku(source, "res_net50").items():
        module, leaf = key.rsplit("/", 1)
        trees["state" if "_ema/" in key else "params"].setdefault(module, {})[leaf] = value
    np.save("resnet50_detcon_b_imagenet_1k.npy", trees, allow_pickle=True)
    with pytest.raises(WeightsError, match=r"docs/checkpoints\.md"):
        read_backbone("resnet50_detcon_b_imagenet_1k.npy")
    exec(detcon_code, {})
    assert_same_features(source, resnet(2), read_backbone("detcon_r50.npz"))


def test_haiku_files_that_are_two_networks_or_of_another_form():
    state = {key: torch.from_numpy(value.copy()) for key, value in haiku(resnet(0), "res_net50").items()}
    with pytest.raises(WeightsError, match=r"b\.npz: both res_net50/.*scale and second/res_net50/.* keep one network"):
        to_backbone(state | {f"second/{k}": v for k, v in state.items() if not k.endswith("initial_conv/w")}, "b.npz")
    with pytest.raises(
        WeightsError, match=r"b\.npz: could be deepmind under 'res_net50/~/' .* or deepmind under 'second"
    ):
        to_backbone(state | under("second/", state), "b.npz")
    with pytest.raises(WeightsError, match=r"b\.npz: res_net50/~/final_batchnorm/scale is of a pre-activation \(v2\)"):
        to_backbone(state | {"res_net50/~/final_batchnorm/scale": torch.ones(1, 1, 1, 2)}, "b.npz")


# --- Swin ----------------------------------------------------------------------------------------------------------


def official_swin(net: SwinTransformer) -> State:
    """Swin's own names: patches are merged at the end of a stage, and index tables are kept."""
    state: State = {}
    for key, value in net.state_dict().items():
        name = re.sub(r"layers\.([123])\.downsample", lambda m: f"layers.{'0012'[int(m[1])]}.downsample", key)
        state[name] = value
        if key.endswith("relative_position_bias_table"):
            state[name.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return state


def test_the_official_names_here_are_what_timm_reads():
    net = swin()
    assert checkpoint_filter_fn(official_swin(net), net).keys() == net.state_dict().keys()


def simmim_file(net: SwinTransformer) -> dict:
    weights = under("encoder.", official_swin(net)) | {"encoder.mask_token": torch.rand(1, 1, 8)} | head("decoder.0")
    return {"model": weights, "optimizer": optimiser_state(), "max_accuracy": 0.0, "epoch": 99}


def test_simmim(tmp_path, settings_class):
    net = swin(0)
    config = settings_class(MODEL=settings_class(TYPE="swin"))
    config.frozen = True
    torch.save(simmim_file(net) | {"config": config}, tmp_path / "simmim.pth")
    del sys.modules["yacs.config"], sys.modules["yacs"]
    found = read_backbone(tmp_path / "simmim.pth", like=swin(1).state_dict())
    assert (found.layout, found.network, found.resized) == ("simmim", "encoder.", [])
    counts = {reason: len(keys) for reason, keys in found.dropped.items()}
    assert counts == {"computed by the network itself": 7, "mask token": 1, "decoder": 2}
    assert_same_features(net, swin(1), found)


@pytest.mark.parametrize(
    ("wrap", "name"), [("", "plain"), ("module.", "plain"), ("backbone.", "backbone"), ("encoder.", "encoder")]
)
@pytest.mark.parametrize("official", [True, False])
def test_other_swin_files(wrap, name, official):
    net = swin(0)
    state = official_swin(net) if official else net.state_dict()
    found = to_backbone(under(wrap, state | head("head")))
    assert found.layout == name
    assert found.dropped["head"] == [f"{wrap}head.weight", f"{wrap}head.bias"]
    assert_same_features(net, swin(1), found)


def test_timms_features_only_names_become_the_whole_models():
    state = swin(0).state_dict()
    flat = {re.sub(r"^layers\.", "layers_", key): value for key, value in state.items()}
    found = to_backbone(under("backbone.body.", flat))
    assert found.layout == "detector"
    assert found.state.keys() == state.keys()


@pytest.mark.parametrize("names", ["layers.", "layers_"])
def test_position_tables_of_another_window_are_resized(names):
    """SimMIM trains at 192 pixels with windows of 6; detectors use 7. The reference is timm's own conversion."""
    source, target = swin(0, window=4, img_size=64), swin(1, window=7, img_size=112)
    like = {re.sub(r"^layers\.", names, key): value for key, value in target.state_dict().items()}
    found = to_backbone(official_swin(source), like=like)
    reference = checkpoint_filter_fn(official_swin(source), target)
    assert found.state.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.equal(found.state[key], value), key
    tables = [key for key in reference if key.endswith("bias_table")]
    assert [key for key, _, _ in found.resized] == tables
    assert found.resized[0][1:] == ([49, 2], [169, 2])
    # in the last stage the windows are as small as the map: 2 in the source (112 / 32 is 4 in the target)
    assert found.resized[-1][1:] == ([9, 2], [49, 2])
    target.load_state_dict(found.state)


def test_tables_that_can_not_be_resized_stay():
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    for shape in ((169, 3), (7 * 13, 2)):  # other heads; a window of 4 x 7
        found = to_backbone(swin(0).state_dict(), like={key: torch.zeros(shape)})
        assert found.resized == []
        assert found.state[key].shape == (49, 2)


# --- recognition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["", "module."])
def test_other_networks_are_recognised_by_the_one_they_are_for(wrap):
    """A MobileNet, for example: whole in the file, its features alone in the detector."""
    net = torchvision.models.mobilenet_v2(width_mult=0.1)
    state = under(wrap, net.state_dict()) | {f"{wrap}queue": torch.rand(2)}
    found = to_backbone(state, like=net.features.state_dict())
    assert (found.layout, found.network) == ("plain", f"{wrap}features.")
    net.features.load_state_dict(found.state)
    assert found.dropped == {
        "classifier": [f"{wrap}classifier.1.weight", f"{wrap}classifier.1.bias"],
        "queue": [f"{wrap}queue"],
    }
    with pytest.raises(WeightsError, match="no known layout"):
        to_backbone(state, like={"stem.0.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="no known layout"):
        to_backbone(state)


def test_other_networks_of_timms_whole_or_features_only():
    like = {f"stages_{i}.conv.weight": torch.zeros(1) for i in range(4)}
    state = {f"stages.{i}.conv.weight": torch.ones(1) for i in range(2)} | head("head")
    found = to_backbone(state, like=like)
    assert list(found.state) == ["stages.0.conv.weight", "stages.1.conv.weight"]
    assert found.dropped == {"head": ["head.weight", "head.bias"]}
    with pytest.raises(WeightsError, match="no known layout"):  # fewer than half
        to_backbone({"stages.0.conv.weight": torch.ones(1)}, like=like)


def test_unknown_and_ambiguous_files_are_refused():
    state = resnet(0).state_dict()
    with pytest.raises(WeightsError, match=r"x\.pth: no known layout .* first keys: a\.b, .*known: plain, moco_v2, "):
        recognise({"a.b": torch.ones(1)}, "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth: no known .* although there is one under 'trunk\.'"):
        recognise(under("trunk.", state), "x.pth")
    both = under("module.encoder_q.", state) | under("module.base_encoder.", state)
    with pytest.raises(
        WeightsError, match=r"moco_v2 under 'module.encoder_q.' \(MoCo .*\) or moco_v3 under 'module.base_"
    ):
        to_backbone(both, "x.pth")
    with pytest.raises(WeightsError, match="no known layout"):  # which of the two is used is not known
        to_backbone(under("encoder.", state) | under("encoder_k.", state))


def test_recognise_names_the_layout():
    assert recognise(under("module.encoder_q.", resnet(0).state_dict())).name == "moco_v2"


def test_prefixed_loads_into_a_detectors_body():
    found = to_backbone(under("encoder_q.", resnet(0).state_dict()))
    assert prefixed(found, "backbone.body.").keys() == under("backbone.body.", resnet(0).state_dict()).keys()
