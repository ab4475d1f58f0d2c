"""--set: short and full keys, types, near misses."""

from __future__ import annotations

import pytest

from headstart import recipes
from headstart.errors import SettingsError
from headstart.settings import flatten, merge, parse_assignments, read_yaml, validate
from headstart.verbs.finetune import config_type as finetune_settings
from headstart.verbs.pretrain import config_type

SOCO = config_type("soco")


def test_short_keys_mean_the_one_setting_of_that_name():
    parsed = parse_assignments(SOCO, ["K=8", "optim.lr=1e-3", "v3=independent_crop", "star=true", "anchor_px=[8,16]"])
    assert parsed == {
        "method.K": 8,
        "optim.lr": 0.001,
        "method.v3": "independent_crop",
        "method.star": True,
        "detector.anchor_px": [8, 16],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kay=8", "no such setting"),
        ("taw=1", "did you mean tau"),
        ("seed=1", r"could mean train.seed or proposals.seed|could mean proposals.seed or train.seed"),
        ("K", "expected key=value"),
        ("=3", "expected key=value"),
        ("K=[1", "can't be read"),
    ],
)
def test_bad_assignments(text, message):
    with pytest.raises(SettingsError, match=message):
        parse_assignments(SOCO, [text])


def test_bad_values_are_named_with_their_place():
    with pytest.raises(SettingsError, match=r"method\.K: .*greater than or equal to 1 \(got 0\)"):
        validate(SOCO, {"method": {"K": 0}}, "pretrain")
    with pytest.raises(SettingsError, match=r"optim\.lrr: no such setting"):
        validate(SOCO, {"optim": {"lrr": 0}}, "pretrain")
    with pytest.raises(SettingsError, match="5 sides"):
        validate(finetune_settings(), {"detector": {"anchor_px": [8]}}, "finetune")
    with pytest.raises(SettingsError, match=r"tune: patience: needs tune.validate_epochs, how often to look$"):
        validate(finetune_settings(), {"tune": {"patience": 2}}, "finetune")


def test_a_bare_off_is_a_word():
    for value in ("off", "'off'"):
        parsed = parse_assignments(SOCO, [f"amp={value}"])
        assert validate(SOCO, merge({}, parsed)).train.amp == "off"


def test_merge_and_flatten_are_inverse_and_leave_their_input():
    base = {"a": {"b": 1}, "c": 2}
    merged = merge(base, {"a.d": 3, "c": 4})
    assert merged == {"a": {"b": 1, "d": 3}, "c": 4}
    assert base == {"a": {"b": 1}, "c": 2}
    assert merge({}, flatten(merged)) == merged


def test_a_setting_may_be_a_mapping(tmp_path):
    """It is one value: given whole, replaced whole, and empty is something else than unset."""
    for text, expected in (("{backbone: 0.1, sampling_offsets: 1e-1}", {"backbone": 0.1, "sampling_offsets": 0.1}),):
        parsed = parse_assignments(SOCO, [f"lr_scale={text}"])
        assert validate(SOCO, merge({}, parsed)).optim.lr_scale == expected
    (tmp_path / "r.yaml").write_text("pretrain: {optim: {lr_scale: {backbone: 0.1}, lr: 0.1}, method: {}}")
    (tmp_path / "off.yaml").write_text("pretrain: {optim: {lr_scale: {}}}")
    section = flatten(recipes.read(tmp_path / "r.yaml", "pretrain"), model=SOCO)
    assert section == {"optim.lr_scale": {"backbone": 0.1}, "optim.lr": 0.1}
    asked = parse_assignments(SOCO, ["optim.lr_scale={neck: 0.5}"])
    assert validate(SOCO, merge(merge({}, section), asked)).optim.lr_scale == {"neck": 0.5}
    off = flatten(recipes.read(tmp_path / "off.yaml", "pretrain"), model=SOCO)
    assert validate(SOCO, merge(merge({}, section), off)).optim.lr_scale == {}
    with pytest.raises(SettingsError, match=r"optim\.lr_scale\.backbone: .*greater than or equal to 0"):
        validate(SOCO, {"optim": {"lr_scale": {"backbone": -1}}})


def test_yaml_files_that_are_none(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(SettingsError, match=r"a\.yaml: not YAML(.|\n)*line"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(SettingsError, match=r"b\.yaml: expected a mapping"):
        read_yaml(tmp_path / "b.yaml")


def test_every_setting_says_what_it_means():
    from headstart.settings import leaves

    for model in (SOCO, finetune_settings()):
        for key, field in leaves(model):
            assert field.description, key
