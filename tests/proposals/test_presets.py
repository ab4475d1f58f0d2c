from typing import get_args

import pytest

from headstart.errors import SettingsError
from headstart.proposals import ProposalSettings, make_engine
from headstart.proposals.presets import PRESETS, PresetName
from headstart.settings import validate


def differences(**settings):
    """What a preset changes of SoCo's and ADePT's settings."""
    plain = ProposalSettings(mode="exact").model_dump()
    return {k: v for k, v in ProposalSettings(**settings).model_dump().items() if plain[k] != v}


def test_presets_hold_the_papers_numbers():
    """The method sheets, line by line, as differences from SoCo's and ADePT's settings."""
    theirs = {"mode": "fixed"}  # read by our engine only
    no_filter = {"aspect_max": None, "size_min": 0.0, "size_max": 1.0}
    code = {"scale": 300.0, "min_size": 100, "side_min_px": 32.0}
    fast = {"scale": 150.0, "sigma": 0.8, "min_size": 100}
    assert {name: differences(preset=name) for name in PRESETS} == {
        "soco": {},
        "soco_code": code,
        "adept": {},
        "aligndet": {"nms_iou": 0.5},
        "aligndet_code": {**code, "size_min": 0.0, "nms_iou": 0.5},
        "proseco": no_filter,
        "detreg": {**theirs, "engine": "opencv", **fast, **no_filter, "squash_px": 128, "top_k": 30},
        "updetr": {**theirs, "engine": "random_patches", "random_boxes": 10, **no_filter},
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_an_engine(name):
    assert make_engine(ProposalSettings(preset=name)).name


def test_every_preset_can_be_named():
    assert get_args(PresetName) == tuple(PRESETS)


def test_what_is_set_beside_a_preset_wins():
    chosen = ProposalSettings(preset="detreg", top_k=None, size_max=0.9)
    assert (chosen.top_k, chosen.size_max, chosen.squash_px) == (None, 0.9, 128)


def test_a_preset_is_kept_as_its_values():
    kept = ProposalSettings(preset="detreg").model_dump()
    assert "preset" not in kept
    assert ProposalSettings(**kept).model_dump() == kept


@pytest.mark.parametrize("bad", ["soc0", ["soco"], 3])
def test_unknown_presets_are_answered_with_the_known(bad):
    with pytest.raises(SettingsError, match=r"^propose: preset: .*'soco', 'soco_code'.*'updetr'.* \(got "):
        validate(ProposalSettings, {"preset": bad}, "propose")


def test_a_recipe_names_a_preset_and_what_is_set_wins():
    from headstart import recipes
    from headstart.settings import merge, parse_assignments
    from headstart.verbs.pretrain import config_type

    kind = config_type("soco", "mask_rcnn")
    given = recipes.read("soco_table1_100ep", "pretrain")
    given["method"].pop("name", None)
    chosen = lambda *sets: validate(kind, merge(given, parse_assignments(kind, sets))).proposals.model_dump()
    assert chosen() == ProposalSettings(preset="soco").model_dump()
    assert chosen("proposals.scale=80") == ProposalSettings(preset="soco", scale=80).model_dump()
    assert chosen("preset=soco_code", "top_k=5") == ProposalSettings(preset="soco_code", top_k=5).model_dump()
