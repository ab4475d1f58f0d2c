"""Recipes: every one of them against the real settings and the real command line; what ``extends`` means."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import headstart
from headstart import recipes
from headstart.cli import app
from headstart.console import results
from headstart.errors import SettingsError
from headstart.methods import METHODS
from headstart.optim import OptimSettings, learning_rate, settle_optim
from headstart.settings import merge, parse_assignments, validate
from headstart.verbs import finetune, linear, pretrain

COCO = 117_266  # images of train2017 that have labels


def pretrain_config(name: str):
    section = recipes.read(name, "pretrain")
    method = section["method"].pop("name")
    return validate(pretrain.config_type(method, section["detector"]["name"]), section, name)


def finetune_config(name: str):
    section = recipes.read(name, "finetune")
    return validate(finetune.config_type(section["detector"]["name"]), section, name)


def linear_config(name: str):
    return validate(linear.LinearSettings, recipes.read(name, "linear"), name)


def rates(config, images: int, at: list[int]) -> list[float]:
    """Learning rates of some steps, as the engine would use them."""
    steps = config.train.max_steps or round(config.train.epochs * images / config.train.batch_size)
    per_epoch = images / config.train.batch_size
    settle_optim(config.optim, OptimSettings(), config.train.batch_size, steps, per_epoch)
    return [learning_rate(step, steps, config.optim) for step in at]


def recipe(folder: Path, name: str, **content) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_valid(name):
    read = recipes.describe(name)
    assert read.result
    assert read.hardware
    assert name.startswith("small_cpu") or read.hardware.endswith("Not repeated by us.")
    method = recipes.read(name, "pretrain")["method"]["name"]
    assert method in METHODS
    assert recipes.method_of(name) == method
    assert pretrain_config(name).train.batch_size
    tuned = finetune_config(name)
    assert tuned.train.max_steps or tuned.train.epochs
    # One length alone, or a parent's would win over the child's.
    for config in (pretrain_config(name), tuned):
        assert (config.train.max_steps is None) != (config.train.epochs is None)
        assert (config.optim.lr is None) != (config.optim.base_lr is None)


def parsed(command: str) -> tuple[str, dict]:
    """The command's name and options, as the real command line reads them, without running it."""
    words = shlex.split(command)
    context = typer.main.get_command(app).make_context("headstart", words[words.index("headstart") + 1 :])
    while hasattr(context.command, "resolve_command"):
        name, inner, arguments = context.command.resolve_command(context, [*context._protected_args, *context.args])
        context = inner.make_context(name, arguments, parent=context)
    return context.info_name, context.params


@pytest.mark.parametrize("name", recipes.names())
def test_every_command_is_understood(name):
    commands = [parsed(command) for command in recipes.describe(name).commands]
    made = set()  # runs of this recipe's own commands: they build on one another
    for verb, options in commands:
        assert options["recipe"] in recipes.names()
        if verb == "finetune":
            assert options["start"] in made
            finetune_config(options["recipe"])
        elif verb == "linear":
            assert options["start"] in made
            linear_config(options["recipe"])
        else:
            assert verb == recipes.method_of(options["recipe"])
            assert options["start"] is None or not options["start"].startswith("runs/") or options["start"] in made
            made.add(str(options["out"]))
    tuning = ("finetune", "linear")
    assert any(verb in tuning for verb, _ in commands)
    assert name in {options["recipe"] for _, options in commands}
    # What is fine-tuned was pretrained with this recipe's settings, or with the same ones under another name.
    last = [options["recipe"] for verb, options in commands if verb not in tuning][-1]
    ours, theirs = (recipes.read(each, "pretrain") for each in (name, last))
    assert ours["method"] == theirs["method"]
    assert ours["train"] == theirs["train"]
    assert ours["optim"] == theirs["optim"]


@pytest.mark.parametrize("name", [n for n in recipes.names() if recipes.method_of(n) == "aligndet"])
def test_aligndet_starts_from_a_backbone(name):
    (pretraining,) = [options for verb, options in map(parsed, recipes.describe(name).commands) if verb == "aligndet"]
    assert pretraining["start"] is not None


def test_needed_starts_are_named():
    verbs = [parsed(command) for command in recipes.describe("adept_table1_separate").commands]
    assert [(verb, options["start"]) for verb, options in verbs] == [
        ("soco", None),
        ("adept", "runs/soco-100ep"),
        ("finetune", "runs/adept-separate"),
    ]


# ---- numbers, by hand from the papers ------------------------------------------------------------------------------


def test_soco_table_1():
    for name, epochs, star in (("100ep", 100, False), ("400ep", 400, False), ("star", 400, True)):
        config = pretrain_config(f"soco_table1_{name}")
        assert config.detector.name == "mask_rcnn"
        assert (config.train.epochs, config.train.batch_size, config.method.star) == (epochs, 2048, star)
        assert (config.method.K, config.method.tau, config.method.v3_px) == (4, 0.99, 112)
        assert (config.optim.optimizer, config.optim.weight_decay) == ("lars", 1e-5)
        images = 1_281_167
        steps = round(epochs * images / 2048)
        peak, half, end = rates(config, images, [6256, (6256 + steps) // 2, steps - 1])  # 10 epochs are 6256 steps
        assert peak == pytest.approx(8.0)
        assert half == pytest.approx(4.0, rel=1e-3)
        assert end < 1e-5
    for name, steps in (("soco_table1_star", 90_000), ("soco_table1_star_2x", 180_000), ("soco_table10_4x", 360_000)):
        config = finetune_config(name)
        assert config.train.max_steps == steps
        assert config.optim.weight_decay == 2.5e-5
        assert config.tune == finetune.TuneSettings()  # every layer
        third, ninth = steps * 2 // 3, steps * 8 // 9
        at = [1000, third - 1, third, ninth - 1, ninth]
        assert rates(config, COCO, at) == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])


def test_soco_voc_and_c4():
    assert pretrain_config("soco_table2_400ep").detector.neck == "c4"
    assert pretrain_config("soco_table2_400ep").method.v3 == "none"
    config = finetune_config("soco_table3_400ep")
    assert (config.detector.name, config.detector.neck, config.optim.weight_decay) == ("faster_rcnn", "c4", 1e-4)
    at = [17_999, 18_000, 21_999, 22_000]
    assert rates(config, 16_551, at) == pytest.approx([0.02, 0.002, 0.002, 0.0002])


def test_soco_linear_evaluation():
    config = linear_config("soco_table11_linear")
    assert (config.train.epochs, config.train.batch_size, config.optim.momentum) == (100, 256, 0.9)
    assert (config.optim.optimizer, config.optim.weight_decay) == ("sgd", 0)
    images = 1_281_167
    per_epoch = images / 256
    at = [0, round(60 * per_epoch) - 1, round(60 * per_epoch), round(80 * per_epoch) - 1, round(80 * per_epoch)]
    assert rates(config, images, at) == pytest.approx([30, 30, 3, 3, 0.3])
    assert (config.augment.view_px, config.test.resize_px, config.test.square) == (224, 256, True)
    assert recipes.read("soco_table11_linear", "pretrain") == recipes.read("soco_table1_100ep", "pretrain")
    # What no recipe says is as the paper's but for the shape of tested images.
    plain = linear.LinearSettings()
    linear.settle(plain, images)
    settled = linear_config("soco_table11_linear")
    linear.settle(settled, images)
    assert plain.optim.lr == settled.optim.lr == 30
    assert (plain.train.max_steps, plain.optim.drops) == (settled.train.max_steps, settled.optim.drops)


def test_a_recipe_may_fine_tune_another_detector():
    for name in ("retinanet", "fcos"):
        assert pretrain_config(f"soco_table7_{name}").detector.name == "mask_rcnn"
        config = finetune_config(f"soco_table7_{name}")
        assert config.detector.name == name
        assert (config.tune.frozen_stages, config.tune.backbone_norm) == (1, "fixed")
        per_epoch = COCO / 16
        steps = round(12 * per_epoch)
        at = [round(8 / 12 * steps) - 2, round(8 / 12 * steps) + 2, round(11 / 12 * steps) + 2]
        assert rates(config, COCO, at) == pytest.approx([0.01, 0.001, 0.0001])
    assert finetune_config("adept_table1_joint_soda10m").detector.name == "cascade_rcnn"
    assert finetune_config("adept_table1_joint_soda10m").train.max_steps == 3726


def test_adept():
    joint, separate = pretrain_config("adept_table1_joint"), pretrain_config("adept_table1_separate")
    assert (joint.method.training, separate.method.training) == ("joint", "separate")
    for config in (joint, separate):
        assert config.train.epochs == 100
        assert rates(config, 1_281_167, [0, 31_278]) == pytest.approx([0.1, 0.05], rel=1e-3)  # annealed, no warm-up
    found = {
        (config.method.rpn_into_backbone, config.method.boxes)
        for name in recipes.names()
        if name.startswith("adept_table4")
        for config in [pretrain_config(name)]
    }
    assert found == {(False, "ss"), (True, "ss"), (False, "ss_rpn"), (True, "ss_rpn")}
    assert finetune_config("adept_table1_separate_mini").train.max_steps == 9000
    shots = finetune_config("adept_table2_joint")
    assert (shots.detector.name, shots.tune.only) == ("faster_rcnn", ["classifier", "regressor"])
    assert finetune_config("adept_table2_soco").tune.only is None
    assert pretrain_config("adept_table2_soco").method == pretrain_config("soco_table1_100ep").method


@pytest.mark.parametrize(
    ("name", "before", "after", "decay", "frozen"),
    [
        ("aligndet_retinanet", 0.01, 0.015, 5e-5, 1),
        ("aligndet_fcos", 0.01, 0.015, 5e-5, 1),
        ("aligndet_mask_rcnn", 0.02, 0.03, 5e-5, 1),
        ("aligndet_faster_rcnn", 0.02, 0.03, 5e-5, 1),
        ("aligndet_mobilenet_v2", 0.02, 0.03, 5e-5, 0),
        ("aligndet_moco_v2", 0.02, 0.02, 5e-6, 0),
        ("aligndet_pixpro", 0.02, 0.02, 5e-6, 0),
        ("aligndet_swav", 0.02, 0.03, 5e-6, 0),
        ("aligndet_swin_t", 1e-4, 1e-4, 2e-2, 0),
        ("aligndet_swin_l", 1e-4, 1e-4, 2e-2, 0),
        ("aligndet_faster_rcnn_voc", 0.02, 0.03, 5e-5, 1),
    ],
)
def test_aligndet(name, before, after, decay, frozen):
    pretrained, tuned = pretrain_config(name), finetune_config(name)
    assert pretrained.detector.name == tuned.detector.name
    assert pretrained.detector.backbone == tuned.detector.backbone
    assert pretrained.train.epochs == 12
    assert pretrained.optim.weight_decay == (0.05 if "swin" in name else 1e-4)
    assert rates(pretrained, COCO, [500]) == pytest.approx([before])
    assert rates(tuned, COCO, [1000]) == pytest.approx([after])
    assert tuned.optim.weight_decay == decay
    assert tuned.tune.frozen_stages == frozen
    assert pretrained.method.most == (2048 if tuned.detector.name in ("retinanet", "fcos") else 4096)
    several = isinstance(tuned.detector.short_side_px, list)
    assert several == (name.endswith("_voc") or (not frozen and name != "aligndet_mobilenet_v2"))


def test_aligndet_on_detr():
    before, tuned = pretrain_config("aligndet_detr"), finetune_config("aligndet_detr")
    assert (before.method.clusters, before.method.K, before.train.epochs, before.train.batch_size) == (256, 50, 50, 64)
    images = 6400
    assert rates(before, images, [3998, 4001]) == pytest.approx([2e-4, 2e-5])
    assert rates(tuned, images, [0, 39_998, 40_001]) == pytest.approx([1e-4, 1e-4, 1e-5])
    assert (tuned.train.epochs, tuned.train.batch_size, tuned.detector.name) == (150, 16, "detr")


def test_aligndet_schedules():
    for name, epochs in (("aligndet_retinanet", 12), ("aligndet_retinanet_2x", 24), ("aligndet_retinanet_3x", 36)):
        assert pretrain_config(name).train.epochs == epochs
        assert finetune_config(name).train.epochs == 12
    voc = finetune_config("aligndet_fcos_voc")
    assert voc.train.max_steps == 12_000
    assert rates(voc, 16_551, [8999, 9000, 10_999, 11_000]) == pytest.approx([0.015, 0.0015, 0.0015, 0.00015])
    assert finetune_config("aligndet_simmim_swin_l").augment.scale_jitter == (0.1, 2.0)
    assert finetune_config("aligndet_simmim_swin_l").train.epochs == 36
    composite = pretrain_config("aligndet_cbnetv2_swin_l").detector
    assert (composite.name, composite.backbone, composite.composite) == ("cascade_rcnn", "swin_l", 2)


@pytest.mark.parametrize(
    ("name", "pretrained", "epochs", "dropped", "examined"),
    [
        ("proseco_table1_minicoco_1", 10, 2000, 0.8, 50),
        ("proseco_table1_minicoco_5", 10, 500, 0.8, 12.5),
        ("proseco_table1_minicoco_10", 10, 400, 0.8, 10),
        ("proseco_table1_minivoc", 10, 2000, 0.8, 50),
        ("proseco_table1_voc", 10, 100, 0.8, 2.5),
        ("proseco_table1_fsod_test", 10, 100, 0.8, 2.5),
        ("proseco_table1_fsod_train", 10, 50, 0.8, 1.25),
        ("proseco_table2_coco", 120, 500, 0.8, 12.5),
        ("proseco_table10_coco_1x", 10, 12, 11 / 12, None),
        ("detreg_coco", 50, 50, 0.8, None),
        ("detreg_coco_1", 50, 2000, 0.7, None),
        ("detreg_coco_10", 50, 400, 0.7, None),
        ("detreg_imagenet_voc", 5, 100, 0.7, None),
        ("joindet_coco", 50, 50, 0.8, None),
        ("joindet_coco_voc", 50, 100, 0.7, None),
        ("joindet_coco_1", 50, 2000, 0.7, None),
        ("joindet_coco_10", 50, 400, 0.7, None),
        ("joindet_table1", 50, 25, 0.7, None),
        ("joindet_imagenet", 5, 50, 0.8, None),
    ],
)
def test_deformable_detr(name, pretrained, epochs, dropped, examined):
    before, tuned = pretrain_config(name), finetune_config(name)
    assert (before.detector.name, before.detector.backbone, before.detector.num_queries) == (
        "deformable_detr",
        "resnet50",
        300,
    )
    assert before.detector.levels == tuned.detector.levels == (1 if name.startswith("joindet") else 4)
    assert not before.detector.refine
    assert (before.train.epochs, tuned.train.epochs, tuned.train.batch_size) == (pretrained, epochs, 32)
    assert (tuned.tune.validate_epochs, tuned.tune.patience) == (examined, None if examined is None else 10)
    assert (tuned.tune.frozen_stages, tuned.tune.backbone_norm) == (1, "fixed")
    assert tuned.optim.lr_scale == {"backbone": 0.1, "sampling_offsets": 0.1, "reference_points": 0.1}
    assert (tuned.optim.clip, before.optim.clip) == (0.1, 0.1)
    images = 10_000
    drop = dropped * epochs * images / 32
    at = [0, round(drop) - 2, round(drop) + 2]
    assert rates(tuned, images, at) == pytest.approx([2e-4, 2e-4, 2e-5])
    last = round(pretrained * images / before.train.batch_size) - 1
    dropping = before.optim.schedule == "steps"
    assert rates(before, images, [0, last]) == pytest.approx([2e-4, 2e-5 if dropping else 2e-4])
    assert dropping == (pretrained == 50)


def test_proseco_and_joindet():
    proseco = pretrain_config("proseco_table1_minicoco_10")
    assert (proseco.train.batch_size, proseco.method.keep_rate, proseco.method.K) == (64, 0.999, 30)
    assert (proseco.method.delta, proseco.method.tau, proseco.method.tau_t) == (0.5, 0.1, 0.07)
    assert (proseco.method.hidden, proseco.method.dim, proseco.proposals.preset) == (4096, 256, "proseco")
    joindet = pretrain_config("joindet_coco")
    assert (joindet.method.m_s, joindet.method.iou, joindet.method.update_epochs) == (0.45, 0.48, 10)
    assert pretrain_config("joindet_imagenet").method.update_epochs == 1
    assert pretrain_config("detreg_coco").proposals.preset == "detreg"


@pytest.mark.parametrize(("name", "epochs"), [("updetr_300ep", 300), ("updetr_150ep", 150)])
def test_updetr(name, epochs):
    before, tuned = pretrain_config(name), finetune_config(name)
    assert (before.method.M, before.detector.name) == (10, "detr")
    assert before.detector.pre_norm
    assert tuned.detector.pre_norm
    assert (before.train.epochs, before.train.batch_size, tuned.train.epochs) == (60, 256, epochs)
    assert tuned.optim.lr_scale == {"backbone": 0.5}  # 5e-5
    images = 25_600
    assert rates(before, images, [3998, 4001]) == pytest.approx([1e-4, 1e-5])
    steps = epochs * images // 16
    assert rates(tuned, images, [steps * 2 // 3 - 2, steps * 2 // 3 + 2]) == pytest.approx([1e-4, 1e-5])


# ---- extends -------------------------------------------------------------------------------------------------------


def test_the_childs_values_win_at_any_depth(tmp_path):
    recipe(
        tmp_path,
        "parent",
        detector={"name": "mask_rcnn", "backbone": "resnet50", "head": "2fc"},
        pretrain={"method": {"name": "soco", "K": 4}, "train": {"epochs": 100, "batch_size": 64}},
        finetune={"detector": {"short_side_px": [640, 800]}, "train": {"max_steps": 10}},
    )
    child = recipe(
        tmp_path,
        "child",
        extends="parent.yaml",
        detector={"backbone": "resnet18"},
        pretrain={"method": {"tau": 0.9}, "train": {"epochs": 400}},
    )
    detector = {"name": "mask_rcnn", "backbone": "resnet18", "head": "2fc"}
    assert recipes.read(child, "pretrain") == {
        "detector": detector,
        "method": {"name": "soco", "K": 4, "tau": 0.9},
        "train": {"epochs": 400, "batch_size": 64},
    }
    assert recipes.read(child, "finetune") == {
        "detector": {**detector, "short_side_px": [640, 800]},
        "train": {"max_steps": 10},
    }


def test_what_has_another_name_takes_nothing_over(tmp_path):
    parent = recipe(
        tmp_path,
        "parent",
        detector={"name": "mask_rcnn", "backbone": "resnet50", "head": "2fc"},
        pretrain={"method": {"name": "soco", "star": True}},
        finetune={"detector": {"name": "retinanet", "head_norm": "none"}},
    )
    assert recipes.read(parent, "pretrain")["detector"]["head"] == "2fc"
    assert recipes.read(parent, "finetune")["detector"] == {"name": "retinanet", "head_norm": "none"}
    other = recipe(
        tmp_path,
        "other",
        extends=str(parent),
        pretrain={"method": {"name": "aligndet", "K": 50}},
        finetune={"detector": {"name": "fcos"}},
    )
    assert recipes.read(other, "pretrain")["method"] == {"name": "aligndet", "K": 50}
    assert recipes.read(other, "pretrain")["detector"]["name"] == "mask_rcnn"
    assert recipes.read(other, "finetune")["detector"] == {"name": "fcos"}
    both = recipe(tmp_path, "both", extends=str(parent), detector={"name": "fcos", "backbone": "resnet18"})
    for verb in ("pretrain", "finetune"):
        assert recipes.read(both, verb)["detector"] == {"name": "fcos", "backbone": "resnet18"}


def test_a_recipe_of_ones_own_may_extend_a_papers(tmp_path):
    mine = recipe(tmp_path, "mine", extends="soco_table1_100ep", pretrain={"train": {"batch_size": 64}})
    expected = recipes.read("soco_table1_100ep", "pretrain")
    expected["train"]["batch_size"] = 64
    assert recipes.read(mine, "pretrain") == expected


def test_what_is_read_can_be_changed_without_changing_the_next(tmp_path):
    first = recipes.read("soco_table1_star", "pretrain")
    first["method"].clear()
    assert recipes.read("soco_table1_star", "pretrain")["method"]["star"] is True


def test_circles_are_refused(tmp_path):
    recipe(tmp_path, "a", extends="b.yaml")
    recipe(tmp_path, "b", extends="c.yaml", detector={"name": "fcos"})
    recipe(tmp_path, "c", extends="a.yaml")
    with pytest.raises(SettingsError, match=r"extends itself \(a.yaml -> b.yaml -> c.yaml -> a.yaml\)"):
        recipes.read(tmp_path / "a.yaml", "pretrain")
    alone = recipe(tmp_path, "alone", extends="alone.yaml")
    with pytest.raises(SettingsError, match=r"extends itself"):
        recipes.read(alone, "pretrain")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"extends": "nothing"}, r"bad.yaml: extends nothing: no such file, nor one of .*soco_table1_100ep"),
        ({"extends": ["a", "b"]}, r"bad.yaml: extends: expected the name or file of one recipe"),
        ({"finetun": {}}, r"bad.yaml: unknown section finetun; expected extends, detector, pretrain, finetune"),
        ({"pretrain": [1]}, r"bad.yaml: section pretrain is not a mapping"),
        ({"detector": 3}, r"bad.yaml: section detector is not a mapping"),
        ({"finetune": {"train": {"epochs": 1}}}, r"bad.yaml: has no section pretrain"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, content, message):
    with pytest.raises(SettingsError, match=message):
        recipes.read(recipe(tmp_path, "bad", **content), "pretrain")


def test_a_recipe_for_readers_has_its_comments(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# Mine, no table: this\ndetector: {name: fcos}\n")
    with pytest.raises(SettingsError, match=r'mine.yaml: expected comment lines first.*"# Hardware: what it took"'):
        recipes.describe(str(path))


# ---- the shell -----------------------------------------------------------------------------------------------------


def run(*arguments) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def wide(monkeypatch):
    """No cell is folded, whatever terminal the tests were started from."""
    monkeypatch.setattr(results, "_width", 300)
    monkeypatch.setattr(results, "_height", 100)


def test_recipes_are_listed_by_paper(wide):
    listed = run("recipes")
    papers = [line.strip() for line in listed.splitlines() if re.fullmatch(r"(SoCo|ADePT|AlignDet|Headstart)\s*", line)]
    assert papers == ["ADePT", "AlignDet", "Headstart", "SoCo"]
    for name in recipes.names():
        assert re.search(rf"^{name}\s", listed, re.MULTILINE), name
    assert re.search(r"^soco_table1_100ep +Table 1: .* 42\.3 AP boxes, 37\.6 AP masks", listed, re.MULTILINE)


@pytest.mark.parametrize("name", ["soco_table7_fcos", "adept_table2_joint", "small_cpu"])
def test_what_is_printed_is_the_whole_recipe(tmp_path, name):
    printed = tmp_path / "printed.yaml"
    printed.write_text(run("recipes", name))
    assert printed.read_text().startswith(recipes.describe(name).header)
    for verb in ("pretrain", "finetune"):
        assert recipes.read(printed, verb) == recipes.read(name, verb)
    assert "extends" not in yaml.safe_load(printed.read_text())


def test_the_recipe_names_the_method(tmp_path):
    aligndet = recipe(tmp_path, "mine", pretrain={"method": {"name": "aligndet"}})
    assert parsed(f"headstart pretrain --recipe {aligndet} photos")[0] == "aligndet"
    assert parsed(f"headstart pretrain photos --seed 1 --recipe={aligndet}")[0] == "aligndet"
    assert parsed(f"headstart pretrain soco photos --recipe {aligndet}")[0] == "soco"  # refused below, by the verb
    nameless = recipe(tmp_path, "nameless", pretrain={"train": {"epochs": 1}})
    assert parsed(f"headstart pretrain soco photos --recipe {nameless}")[0] == "soco"
    with pytest.raises(SettingsError, match=r"names no method .* write headstart pretrain METHOD PHOTOS --recipe"):
        parsed(f"headstart pretrain --recipe {nameless} photos")
    with pytest.raises(SettingsError, match=r"is for method aligndet, not soco"):
        headstart.pretrain(images=tmp_path, method="soco", recipe=aligndet)


@pytest.mark.parametrize(
    ("arguments", "has", "lacks"),
    [
        (("pretrain", "aligndet", "--detector", "retinanet"), "detector.head_norm", "detector.rois_train"),
        (("pretrain", "--recipe", "aligndet_fcos"), "detector.nms_iou", "detector.rois_train"),
        (("pretrain", "soco"), "detector.rois_train", "detector.head_norm"),
        (("finetune", "--detector=fcos"), "detector.nms_iou", "detector.rois_train"),
        (("finetune", "--recipe", "soco_table7_retinanet"), "detector.box_loss", "detector.rois_train"),
    ],
)
def test_help_shows_the_settings_of_the_detector(arguments, has, lacks, capsys):
    run_output = run(*arguments, "--help")
    shown = run_output + capsys.readouterr().out
    assert has in shown
    assert lacks not in shown


def test_a_recipe_runs(tmp_path, scenes, tiny):
    """From the shell, without the method's name, with everything made small by --set."""
    shrunk = {
        **{f"detector.{key}": value for key, value in tiny.items()},
        "method.view_px": 64,
        "method.v3_px": 32,
        "method.v4_px": 48,
        "method.hidden": 16,
        "method.dim": 8,
        "proposals.engine": "random",
        "train.workers": 0,
    }
    sets = [word for key, value in shrunk.items() for word in ("--set", f"{key}={value}")]
    short = ("--max-steps", 2, "--batch-size", 4, "--device", "cpu")
    star = ("--recipe", "soco_table1_star")
    run("pretrain", *star, scenes / "unlabelled", "--out", tmp_path / "star", *short, *sets)
    assert headstart.runs.read_record(tmp_path / "star")["method"] == "soco"
    small = {k: v for k, v in shrunk.items() if k in ("detector.short_side_px", "detector.long_side_px")}
    sets = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    # Mask R-CNN is pretrained, RetinaNet fine-tuned: backbone and FPN are taken over, the rest is new.
    run(
        *("finetune", tmp_path / "star", "--recipe", "soco_table7_retinanet", "--train", scenes / "train.json"),
        *("--out", tmp_path / "retinanet", *short, *sets, "--set", "fpn_channels=8", "--backbone", "resnet18"),
        *("--set", "train.workers=0"),
    )
    record = headstart.runs.read_record(tmp_path / "retinanet")
    assert record["config"]["detector"]["name"] == "retinanet"
    matched = record["load_report"]["matched"]
    assert any(key.startswith("backbone.fpn.") for key in matched)
    assert any(key.startswith("backbone.body.") for key in matched)


def test_python_takes_the_recipes_method(tmp_path, scenes, tiny):
    settings = {"K": 2, "method.hidden": 8, "method.dim": 8, "proposals.engine": "random", "train.workers": 0}
    mine = recipe(
        tmp_path,
        "mine",
        detector={
            "name": "fcos",
            **{k: tiny[k] for k in ("backbone", "fpn_channels", "short_side_px", "long_side_px")},
        },
        pretrain={"method": {"name": "aligndet"}, "train": {"max_steps": 1, "batch_size": 2}},
    )
    done = headstart.pretrain(
        images=scenes / "unlabelled",
        recipe=mine,
        start="scratch",
        out=tmp_path / "run",
        settings=[f"{key}={value}" for key, value in settings.items()],
        show=False,
    )
    assert headstart.runs.read_record(done.path)["method"] == "aligndet"
    assert done.detector.family == "fcos"


# ---- docs/recipes.md -----------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"


def test_settings_in_the_docs_are_valid():
    given = recipes.read("soco_table1_100ep", "pretrain")
    given["method"].pop("name")
    kind = pretrain.config_type("soco", "mask_rcnn")
    rows = re.findall(r"^\| (Table [45].*?) \| `(--set .*?)`", DOCS.read_text(), re.MULTILINE)
    assert len(rows) == 11
    for row, words in rows:
        values = merge(given, parse_assignments(kind, shlex.split(words.replace("--set", ""))))
        assert validate(kind, values, row) != validate(kind, given, row)


def test_the_example_in_the_docs(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)[1])
    assert pretrain_config(path).method.K == 8
    assert pretrain_config(path).detector.backbone == "resnet18"
    assert finetune_config(path).detector.name == "fcos"
    commands = [line for line in DOCS.read_text().splitlines() if re.match(r"headstart (pretrain|finetune)", line)]
    assert [parsed(command)[0] for command in commands] == ["soco", "finetune"]
