"""Backbones: torchvision's, timm's and composite ones give the maps they promise, under the libraries' own names."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

from headstart import detectors
from headstart.detectors import backbones
from headstart.detectors.rcnn import RCNNSettings
from headstart.errors import SettingsError, WeightsError

ALL = (2, 3, 4, 5)
NAMES = [
    ("resnet18", 1),
    ("mobilenet_v2", 1),
    ("mobilenetv3_small_050", 1),
    ("convnext_atto", 1),
    ("swin_t", 1),
    ("resnet18", 2),
    ("swin_t", 2),
]
WIDTHS = {
    "resnet18": [64, 128, 256, 512],
    "mobilenet_v2": [24, 32, 96, 320],  # MMDetection's MobileNetV2 at out_indices 1, 2, 4, 6
    "mobilenetv3_small_050": [8, 16, 24, 288],
    "convnext_atto": [40, 80, 160, 320],
    "swin_t": [96, 192, 384, 768],
}


@pytest.fixture
def small_swin(monkeypatch) -> None:
    """``swin_t`` with 12 channels and 5 blocks instead of 96 and 12, and all else as it is."""
    facts = backbones._timm_facts(backbones.SWIN["swin_t"])
    less = {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1,) * 4}
    small = backbones._TimmFacts({**facts.options, **less}, facts.strides, facts.in_a_row)
    monkeypatch.setattr(backbones, "_timm_facts", lambda model: small)


def shuffled(module: torch.nn.Module) -> torch.nn.Module:
    """With other weights and statistics everywhere, so that nothing is zero or one by its initialisation."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(noise + 0.5 if value.ndim == 1 and "bias" not in name else (noise - 0.5) / 4)
    return module.eval()


@pytest.mark.parametrize(("name", "composite"), NAMES)
def test_detectors_on_every_kind_of_backbone(tiny, name, composite, request):
    """Strides, widths, plain code, copies, gradients: as any other detector."""
    widths = WIDTHS[name]
    if (name, composite) == ("swin_t", 2):  # two large ones, three times over, are slow
        request.getfixturevalue("small_swin")
        widths = [12, 24, 48, 96]
    settings = RCNNSettings(num_classes=2, **{**tiny, "backbone": name, "composite": composite, "long_side_px": 64})
    detector = detectors.build(settings)
    body = detector.module.backbone.body
    images = torch.rand(2, 3, 64, 64)
    maps = body(images)
    assert [tuple(map_.shape[1:]) for map_ in maps.values()] == [
        (width, 64 // stride, 64 // stride) for width, stride in zip(widths, (4, 8, 16, 32), strict=True)
    ]
    assert list(maps) == ["0", "1", "2", "3"]
    assert body.channels == widths

    code = detector.plain_code()
    assert "headstart" not in code
    scope: dict = {}
    exec(code, scope)
    plain = scope["detector"]
    plain.load_state_dict(detector.module.state_dict())
    twin = copy.deepcopy(detector).eval()
    with torch.no_grad():
        ours, theirs, copied = (
            detector.eval().detect(list(images)),
            plain.eval()(list(images)),
            twin.detect(list(images)),
        )
        for level, map_ in plain.backbone.body(images).items():
            torch.testing.assert_close(body(images)[level], map_)
            torch.testing.assert_close(twin.module.backbone.body(images)[level], map_)
    for a, b, c in zip(ours, theirs, copied, strict=True):
        for key in b:
            torch.testing.assert_close(a[key], b[key])
            torch.testing.assert_close(c[key], b[key])

    detector.train()
    target = {"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])}
    sum(detector.loss(list(images), [target, target]).values()).backward()
    assert [key for key, p in body.named_parameters() if p.grad is None] == []


def test_copies_compute_with_their_own_weights():
    """timm's networks get a hook, which must not lead a copy back to the original."""
    body = backbones.body("convnext_atto", ALL)().eval()
    images = torch.rand(1, 3, 64, 64)
    twin = copy.deepcopy(body)
    with torch.no_grad():
        before = body(images)
        for parameter in twin.parameters():
            parameter.zero_()
        assert all(not map_.any() for map_ in twin(images).values())
        for name, map_ in body(images).items():
            assert torch.equal(map_, before[name])


@pytest.mark.parametrize("size", [(64, 96), (80, 112), (75, 101)])
@pytest.mark.parametrize("composite", [1, 2])
def test_swin_takes_images_of_any_size(small_swin, size, composite):
    body = backbones.body("swin_t", ALL, composite)().eval()
    with torch.no_grad():
        shapes = [tuple(map_.shape) for map_ in body(torch.rand(1, 3, *size)).values()]
    sides = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
    assert shapes == [(1, width, *side) for width, side in zip(body.channels, sides, strict=True)]


@pytest.mark.parametrize(
    ("name", "stages"),
    [("resnet18", ALL), ("resnet18", (3, 4, 5)), ("mobilenet_v2", ALL), ("convnext_atto", (3, 4, 5))],
)
def test_the_librarys_weights_give_the_librarys_features(name, stages):
    """The names of the whole model are found in the body; what a body lacks keeps its name."""
    if name == "convnext_atto":
        whole = shuffled(timm.create_model(name, pretrained=False))
    else:
        whole = shuffled(torchvision.models.get_model(name, weights=None))
    body = backbones.body(name, stages)()
    placed, words = backbones.place(body, whole.state_dict())
    found = body.load_state_dict(placed, strict=False)
    assert found.missing_keys == []
    assert all(re.match(r"fc\.|classifier\.|features\.18\.|head\.|norm", key) for key in found.unexpected_keys)
    assert bool(words) == (name != "resnet18")

    images, theirs = torch.rand(2, 3, 64, 96), []
    with torch.no_grad():
        x = images
        if name == "resnet18":
            x = whole.maxpool(whole.relu(whole.bn1(whole.conv1(x))))
            for layer in (whole.layer1, whole.layer2, whole.layer3, whole.layer4):
                theirs.append(x := layer(x))
        elif name == "mobilenet_v2":
            for number, block in enumerate(whole.features):
                x = block(x)
                if number in (3, 6, 13, 17):
                    theirs.append(x)
        else:
            theirs = whole.forward_intermediates(images, intermediates_only=True)
        ours = list(body.eval()(images).values())
    for a, b in zip(ours, theirs[-len(stages) :], strict=True):
        assert torch.equal(a, b)


def test_swin_has_timms_names_and_numbers():
    body = backbones.body("swin_t", ALL)()
    whole = shuffled(timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, strict_img_size=False))
    theirs = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, features_only=True)
    assert body.state_dict().keys() == theirs.state_dict().keys()
    placed, words = backbones.place(body, whole.state_dict())
    found = body.load_state_dict(placed, strict=False)
    assert found.missing_keys == []
    assert sorted(found.unexpected_keys) == ["head.fc.bias", "head.fc.weight", "norm.bias", "norm.weight"]
    assert words == [f"layers.N is layers_N in timm's features_only: {len(placed) - 4 - 4} keys"]  # patch_embed stays
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, intermediates_only=True)  # permuted by timm
        for a, b in zip(body.eval()(images).values(), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_names_that_already_fit_stay():
    for body in (backbones.body("convnext_atto", ALL)(), backbones.body("resnet18", ALL, composite=2)()):
        state = body.state_dict()
        placed, words = backbones.place(body, state)
        assert list(placed) == list(state)
        assert words == []


# ---- composite ----------------------------------------------------------------------------------------------------


def plain_composite(body, images: torch.Tensor) -> list[torch.Tensor]:
    """CBNetV2's composition of two ResNets, each step as the paper has it."""
    helping, x = {}, images
    assistant, lead = body.assistant, body.lead
    x = assistant.maxpool(assistant.relu(assistant.bn1(assistant.conv1(x))))
    for stage in ALL:
        x = helping[stage] = getattr(assistant, f"layer{stage - 1}")(x)
    x = lead.maxpool(lead.relu(lead.bn1(lead.conv1(images))))
    maps = [lead.layer1(x)]
    for stage in (3, 4, 5):
        total = maps[-1]
        height, width = total.shape[-2:]
        for i in range(stage, 6):
            conv, norm = body.links[stage - 3][i - stage]
            small = norm(conv(helping[i]))
            rows = (torch.arange(height) * small.shape[-2]) // height  # the nearest, as F.interpolate counts
            columns = (torch.arange(width) * small.shape[-1]) // width
            total = total + small[:, :, rows][:, :, :, columns]
        maps.append(getattr(lead, f"layer{stage - 1}")(total))
    return maps


@pytest.mark.parametrize("size", [(64, 96), (80, 112)])
def test_composite_is_the_papers_sum(size):
    body = shuffled(backbones.body("resnet18", ALL, composite=2)())
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        for a, b in zip(body(images).values(), plain_composite(body, images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "swin_t"])
def test_a_new_composite_is_its_lead(small_swin, name):
    """The links start at zero; once they do not, the assistant counts and learns."""
    body = backbones.body(name, ALL, composite=2)().eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(body(images).values(), body.lead(images).values(), strict=True):
            assert torch.equal(a, b)
        for layers in body.links:
            for layer in layers:
                layer[1].weight.fill_(1)
    maps, alone = body(images), body.lead(images)
    assert torch.equal(maps["0"], alone["0"])  # nothing enters the first stage
    assert not any(torch.equal(maps[level], alone[level]) for level in ("1", "2", "3"))
    sum(map_.square().mean() for map_ in maps.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in body.links.parameters())
    touched = {key.split(".")[0] for key, p in body.assistant.named_parameters() if p.grad.abs().sum() > 0}
    assert touched == {key.split(".")[0] for key, _ in body.assistant.named_parameters()}


def test_links_are_the_same_on_fewer_maps():
    """So that a RetinaNet on C3 .. C5 takes over what a Faster R-CNN on C2 .. C5 has learned."""
    wide, narrow = (shuffled(backbones.body("resnet18", s, composite=2)()) for s in (ALL, (3, 4, 5)))
    narrow.load_state_dict(wide.state_dict())
    assert narrow.channels == [128, 256, 512]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(narrow(images).values(), list(wide(images).values())[1:], strict=True):
            assert torch.equal(a, b)


def test_three_copies_feed_one_another():
    body = shuffled(backbones.body("resnet18", (3, 4, 5), composite=3)())
    assert {
        key.rsplit(".", 1)[0] for key in body.state_dict() if key.endswith("conv1.weight") and "layer" not in key
    } == {
        "assistant.assistant.conv1",
        "assistant.lead.conv1",
        "lead.conv1",
    }
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        helping, maps = list(body.assistant(images).values()), body(images)
        assert len(helping) == 4
        x = body.lead(images)  # C3 .. C5 of the lead alone differ, so restate its second stage
        first = body.lead.layer1(body.lead.maxpool(body.lead.relu(body.lead.bn1(body.lead.conv1(images)))))
        sums = [F.interpolate(layer(m), first.shape[-2:]) for layer, m in zip(body.links[0], helping[1:], strict=True)]
        second = body.lead.layer2(first + sum(sums))
        torch.testing.assert_close(maps["0"], second, rtol=1e-4, atol=1e-4 * second.abs().max().item())
        assert not torch.allclose(maps["0"], x["1"])


@pytest.mark.parametrize(("name", "copies"), [("resnet18", 2), ("resnet18", 3), ("convnext_atto", 2)])
def test_each_copy_gets_a_single_backbones_weights(name, copies):
    body = backbones.body(name, ALL, composite=copies)()
    single = backbones.body(name, ALL)()
    whole = timm.create_model(name, pretrained=False) if name == "convnext_atto" else torchvision.models.resnet18()
    state = shuffled(whole).state_dict()
    placed, words = backbones.place(body, state)
    assert words[-1] == f"copied to all {copies} backbones of the composite one"
    found = body.load_state_dict(placed, strict=False)
    assert all("links" in key.split(".") for key in found.missing_keys)
    assert all(re.match(r"fc\.|head\.", key) for key in found.unexpected_keys)
    single.load_state_dict(backbones.place(single, state)[0], strict=False)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():  # the links are still zero
        for a, b in zip(body.eval()(images).values(), single.eval()(images).values(), strict=True):
            assert torch.equal(a, b)


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "composite", "message"),
    [
        ("vit_tiny_patch16_224", 1, "has maps at strides 16, but this detector needs 4, 8, 16 and 32"),
        ("nest_tiny", 1, "has maps at strides 4, 8 and 16, but"),
        ("maxvit_tiny_tf_224", 1, r"fails on 288 x 352 px \(height \(72\) must be divisible by window"),
        ("mobilenetv3_small_050", 2, "detector.composite=2 needs a backbone whose stages"),
        ("resnet19", 1, "not known; did you mean resnet18,"),
        ("swin_x", 2, "not known; did you mean swin_"),
        ("hf-hub:someone/something", 1, "not known; expected a torchvision ResNet, mobilenet_v2, swin_t"),
    ],
)
def test_what_can_not_be_used_is_refused_with_the_reason(name, composite, message):
    with pytest.raises(SettingsError, match=f"--backbone {re.escape(name)}: .*{message}") as error:
        backbones.body(name, ALL, composite)
    assert len(str(error.value)) < 300


def test_a_network_without_stride_4_serves_detectors_that_need_none(monkeypatch):
    facts = backbones._timm_facts("convnext_atto")
    less = backbones._TimmFacts(facts.options, (2, *facts.strides[1:]), True)
    monkeypatch.setattr(backbones, "_timm_facts", lambda model: less)
    with pytest.raises(SettingsError, match="strides 2, 8, 16 and 32, but this detector needs 4, 8, 16 and 32"):
        backbones.body("convnext_atto", ALL)
    assert backbones.body("convnext_atto", (3, 4, 5))().channels == [80, 160, 320]
    assert backbones.body("convnext_atto", (3, 4, 5), composite=2)().lead.channels == [80, 160, 320]


def test_c4_detectors_take_one_backbone():
    with pytest.raises(SettingsError, match=r"detector\.composite=2: needs a pyramid"):
        detectors.build(RCNNSettings(backbone="resnet18", neck="c4", composite=2))


def test_looking_at_a_network_draws_no_random_numbers():
    backbones._timm_facts.cache_clear()
    before = torch.get_rng_state()
    backbones.body("swin_t", ALL, composite=2)
    assert torch.equal(before, torch.get_rng_state())


# ---- pretrained ---------------------------------------------------------------------------------------------------


def test_pretrained_weights_are_the_librarys(monkeypatch):
    asked = []

    def torchvisions(name, weights):
        asked.append((name, weights))
        return torch.nn.Linear(1, 1)

    def timms(name, pretrained):
        asked.append((name, pretrained))
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(torchvision.models, "get_model", torchvisions)
    monkeypatch.setattr(timm, "create_model", timms)
    before = torch.get_rng_state()
    for name in ("resnet18", "mobilenet_v2", "swin_l", "convnext_atto.d2_in1k"):
        assert backbones.pretrained(name).keys() == {"weight", "bias"}
    assert asked == [
        ("resnet18", "DEFAULT"),
        ("mobilenet_v2", "DEFAULT"),
        ("swin_large_patch4_window7_224", True),
        ("convnext_atto.d2_in1k", True),
    ]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("library", "call", "name"), [(torchvision.models, "get_model", "resnet18"), (timm, "create_model", "swin_t")]
)
def test_weights_that_can_not_be_had_say_why(monkeypatch, library, call, name):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(library, call, offline)
    with pytest.raises(WeightsError, match=f"{name}: .*OSError: no route to host"):
        backbones.pretrained(name)
    with pytest.raises(SettingsError, match="resnet19: not known"):
        backbones.pretrained("resnet19")


def test_torchvisions_backbones_do_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it is an error now
    assert backbones.body("resnet18", ALL)().channels == WIDTHS["resnet18"]
    assert backbones.body("mobilenet_v2", (3, 4, 5), composite=2)().channels == [32, 96, 320]
