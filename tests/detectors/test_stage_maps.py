"""Maps of a backbone that its detector does not work on."""

from __future__ import annotations

import pytest
import torch

from headstart import detectors
from headstart.errors import SettingsError

COMMON = {"fpn_channels": 8, "short_side_px": 64, "long_side_px": 96}


def build(backbone: str, **settings):
    torch.manual_seed(0)
    return detectors.build(detectors.parse_settings({"name": "retinanet", "backbone": backbone, **COMMON, **settings}))


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "mobilenet_v2", "swin_t"])
def test_the_maps_are_the_bodys_own(backbone, images):
    """Where the body gives a map itself, the one that is found is the same, channels first."""
    wrapped = build(backbone).eval()
    with torch.no_grad():
        own = list(wrapped.body(wrapped.normalise(images)).values())
        for map_ in own:
            stage = {16: 2, 8: 3, 4: 4, 2: 5}[map_.shape[2]]
            found = wrapped.stage_map(images, stage)
            torch.testing.assert_close(found, map_)
            assert wrapped.stage_width(stage) == map_.shape[1]
        torch.testing.assert_close(wrapped.stage_map(images), own[-1])


def test_a_map_the_body_does_not_give(images):
    """RetinaNet works on C3 to C5; C2 is there all the same, and layers behind it are not run."""
    wrapped = build("resnet18").eval()
    ran = []
    wrapped.body["layer2"].register_forward_hook(lambda *_: ran.append("layer2"))
    with torch.no_grad():
        body, x = wrapped.body, wrapped.normalise(images)
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1"):
            x = body[name](x)
        torch.testing.assert_close(wrapped.stage_map(images, 2), x)
        assert not ran[1:]  # once on the meta device, to find out which layer it is
        wrapped.stage_map(images, 2)
        assert not ran[1:]


def test_finding_out_changes_nothing():
    wrapped = build("resnet18").train()
    before = {k: v.clone() for k, v in wrapped.module.state_dict().items()}
    assert wrapped.stage_width(3) == 128
    assert all(torch.equal(before[k], v) for k, v in wrapped.module.state_dict().items())
    assert not any(module._forward_hooks for module in wrapped.body.children())


def test_the_leads_map_of_a_composite_backbone(images):
    wrapped = build("resnet18", composite=2).eval()
    with torch.no_grad():
        own = list(wrapped.body(wrapped.normalise(images)).values())
        torch.testing.assert_close(wrapped.stage_map(images, 5), own[-1])
    assert wrapped.stage_width(3) == 128


def test_no_such_map():
    with pytest.raises(SettingsError, match=r"stride 2 \(C1\)"):
        build("convnext_atto").stage_width(1)
