"""Folders of transformers: read into detectors, written by export; the same outputs on both sides."""

from __future__ import annotations

import argparse
import contextlib
import json
import os

import pytest
import torch
import transformers
from hugging_face import OURS, SHARED, example, reference, under_our_names
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import headstart
from headstart import cli, detectors
from headstart.detectors.formats import transformers as format_
from headstart.detectors.formats import transformers_folders as folders
from headstart.detectors.weights import read_metadata, save_detector
from headstart.errors import DataError, HeadstartError, SettingsError, WeightsError
from headstart.verbs.evaluate import load_finetuned
from headstart.verbs.start import detector_of, load_start, start_record

CLASSES = ["screw", "nut", "bolt"]
MODES = {
    "detr": {"family": "detr"},
    "plain": {"family": "deformable_detr", "levels": 4},
    "single": {"family": "deformable_detr", "levels": 1},
    "refine": {"family": "deformable_detr", "levels": 4, "refine": True},
    "two_stage": {"family": "deformable_detr", "levels": 4, "refine": True, "two_stage": True},
}
RESNET18 = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def theirs(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = reference(**MODES[name])
    model.config.id2label = dict(enumerate(CLASSES))
    model.config.label2id = {label: number for number, label in enumerate(CLASSES)}
    return model


def ours(name: str, **settings) -> detectors.Detector:
    """A detector with random weights, no two layers alike."""
    mode = dict(MODES[name])
    torch.manual_seed(2)
    detector = detectors.build(detectors.parse_settings({"name": mode.pop("family"), **OURS, **mode, **settings}))
    with torch.no_grad():
        for key, value in [*detector.module.named_parameters(), *detector.module.named_buffers()]:
            if value.is_floating_point() and not key.endswith(("running_var", "norm.weight")):
                value.add_(0.1 * torch.randn_like(value))
    return detector.eval()


def run_of(folder, detector, parts=None, **about):
    """A run folder with what export reads."""
    folder.mkdir()
    kind = "pretrain" if parts else "finetune"
    record = {"kind": kind, "config": {"detector": detector.settings.model_dump(mode="json")}}
    (folder / "run.json").write_text(json.dumps(record))
    state = detector.part_state(parts) if parts else detector.module.state_dict()
    save_detector(folder / "detector.safetensors", state, {"kind": kind, "steps": 3, **about})
    return folder


def assert_same_outputs(detector, model):
    images, sizes, mask = example()
    with torch.no_grad():
        expected = model.eval()(pixel_values=images, pixel_mask=mask)
        found = detector.eval().module.answer(images, sizes)
        logits = detector.module.logits(found.hidden)
    torch.testing.assert_close(logits[-1], expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, atol=1e-5, rtol=1e-5)


def loaded(folder):
    model, info = transformers.AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


# ---- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODES)
def test_a_folder_becomes_a_detector_with_the_same_outputs(tmp_path, name):
    model = theirs(name)
    model.save_pretrained(tmp_path)
    detector, classes = load_finetuned(tmp_path)
    assert classes == CLASSES
    assert_same_outputs(detector, model)
    expected = under_our_names(model, MODES[name].get("refine", False), MODES[name].get("two_stage", False))
    state = detector.module.state_dict()
    assert {key for key in state if not key.endswith("num_batches_tracked")} == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(("name", "maps"), [("detr", ["stage4"]), ("plain", ["stage2", "stage3", "stage4"])])
def test_their_own_resnets(tmp_path, name, maps):
    kind = type(theirs(name))
    config = kind.config_class(**SHARED, backbone_config=transformers.ResNetConfig(**RESNET18, out_features=maps))
    model = kind(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_buffers():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "running_var" in key else value + torch.rand_like(value))
    model.save_pretrained(tmp_path)
    assert detector_of(tmp_path)["backbone"] == "resnet18"
    assert_same_outputs(load_finetuned(tmp_path)[0], model)


def test_heads_that_transformers_ties(tmp_path):
    """Its own model with box refinement has one class layer; its file has it once."""
    config = transformers.DeformableDetrConfig(**SHARED, backbone="resnet18", with_box_refine=True)
    model = transformers.DeformableDetrForObjectDetection(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {key for key in saved if "class_embed" in key} == {"class_embed.0.weight", "class_embed.0.bias"}
    detector, _ = load_finetuned(tmp_path)
    assert_same_outputs(detector, model)
    layers = detector.module.class_embed
    assert len(layers) == 3
    assert torch.equal(layers[0].weight, layers[2].weight)
    assert "one class layer, which transformers ties: copied to all 3" in folders.read_weights(tmp_path)[1][1]


def test_settings_of_a_folder(tmp_path):
    theirs("two_stage").save_pretrained(tmp_path)
    processor = transformers.DeformableDetrImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 96}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1]
    )
    processor.save_pretrained(tmp_path)
    found = detector_of(tmp_path)
    expected = {**OURS, "name": "deformable_detr", "levels": 4, "points": 4, "refine": True, "two_stage": True}
    expected |= {"dropout": 0.1, "short_side_px": 64, "long_side_px": 96, "image_mean": [0.5, 0.4, 0.3]}
    assert expected.items() <= found.items()
    assert (found["class_cost"], found["l1_cost"], found["giou_weight"]) == (1, 5, 2)
    old = {"feature_extractor_type": "DetrFeatureExtractor", "size": 800, "max_size": 1333, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    found = detector_of(tmp_path)
    assert (found["short_side_px"], found["long_side_px"]) == (800, 1333)
    assert (found["image_mean"], found["image_std"]) == ([0, 0, 0], [1, 1, 1])


def memory_names(folder):
    """The file's names as transformers 5 has them in memory."""
    model = transformers.AutoModelForObjectDetection.from_pretrained(folder)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")


def torch_file(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shards(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(state)}
    for file in set(where.values()):
        save_file({key: state[key] for key in state if where[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def without_heads(folder):
    """As AutoModel, of the part below the heads, writes it."""
    state = load_file(folder / "model.safetensors")
    own = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    save_file(own, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["detr", "plain", "two_stage"])
@pytest.mark.parametrize("written", [memory_names, torch_file, shards])
def test_names_and_files_of_all_versions(tmp_path, name, written):
    theirs(name).save_pretrained(tmp_path)
    expected = folders.read_weights(tmp_path)[0]
    settings = folders.read_settings(tmp_path)
    written(tmp_path)
    found = folders.read_weights(tmp_path)[0]
    assert folders.read_settings(tmp_path) == settings
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_model_without_heads(tmp_path):
    theirs("detr").save_pretrained(tmp_path)
    expected = folders.read_weights(tmp_path)[0]
    without_heads(tmp_path)
    found = folders.read_weights(tmp_path)[0]
    assert expected.keys() - found.keys() == {key for key in expected if key.startswith(("class_", "bbox_"))}
    detector = ours("detr")
    report = load_start(detector, tmp_path)
    assert not report.unexpected
    with pytest.raises(WeightsError, match="its weights are not all of the detector"):
        load_finetuned(tmp_path)


def test_config_of_old_versions(tmp_path):
    """What facebook/detr-resnet-50 says of its backbone, and detectors that were saved since."""
    theirs("detr").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = detector_of(tmp_path)
    del config["backbone_config"], config["dilation"], config["position_embedding_type"]
    for more in (
        {"backbone": "resnet18"},
        {"backbone": "resnet18", "use_timm_backbone": True, "backbone_config": None, "use_pretrained_backbone": True},
        {"backbone": "resnet18", "backbone_kwargs": {"in_chans": 3, "out_indices": [1, 2, 3, 4]}},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18.a1_in1k", "out_indices": [-1]}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        assert detector_of(tmp_path) == expected
    config |= {"backbone": "resnet18", "id2label": {"0": "N/A", "1": "person", "2": "N/A"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert folders.read_classes(tmp_path) == ["N/A (0)", "person", "N/A (2)"]
    del config["id2label"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    assert folders.read_classes(tmp_path) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_folders_of_links_as_in_the_hubs_cache(tmp_path):
    home = tmp_path / "models--me--detr"
    snapshot = home / "snapshots" / "0123abcd"
    theirs("detr").save_pretrained(snapshot)
    (home / "blobs").mkdir()
    for number, file in enumerate(list(snapshot.iterdir())):
        file.rename(home / "blobs" / str(number))
        file.symlink_to(os.path.relpath(home / "blobs" / str(number), snapshot))
    assert detector_of(snapshot)["name"] == "detr"
    assert folders.read_weights(snapshot)[0]


# ---- what is not read -------------------------------------------------------------------------------------------


def changed(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def processor(**values):
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps(values))


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def index_to(place):
    def change(folder):
        no_weights(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))

    return change


def link_out(folder):
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def deep(folder):
    (folder / "config.json").write_text("[" * 100_000)


def executable(folder):
    no_weights(folder)
    torch.save({"x": os.system}, folder / "pytorch_model.bin")


RESNET = {"model_type": "resnet", **RESNET18}
TIMM = {"model_type": "timm_backbone", "backbone": "resnet18"}
REFUSED = {
    "not a detector": (changed(model_type="bert"), SettingsError, "model_type 'bert'"),
    "masks": (changed(architectures=["DetrForSegmentation"]), SettingsError, "expected a DetrForObjectDetection or"),
    "activation": (changed(activation_function="gelu"), SettingsError, "activation_function is 'gelu'"),
    "positions": (changed(position_embedding_type="learned"), SettingsError, "position_embedding_type is 'learned'"),
    "dilation": (changed(dilation=True), SettingsError, "dilation: the backbones here have none"),
    "auxiliary": (changed(auxiliary_loss=True), SettingsError, "puts the decoder's last norm between its layers"),
    "heads": (changed(decoder_attention_heads=8), SettingsError, "attention_heads: 4 in the encoder, 8 in the decoder"),
    "a word": (changed(d_model="256"), SettingsError, "d_model: expected a number from 1 on, found '256'"),
    "too deep": (
        changed(encoder_layers=10**9),
        WeightsError,
        r"do not belong together \(encoder_layers 1000000000, 2\)",
    ),
    "too wide": (changed(d_model=10**6), WeightsError, r"do not belong together \(width 1000000, 64\)"),
    "too many": (changed(id2label=None, num_labels=10**12), SettingsError, "num_labels 1000000000000; expected 100000"),
    "labels": (changed(id2label={"1": "screw"}), SettingsError, "id2label: expected a name for each number from 0"),
    "hub": (changed(backbone_config={**TIMM, "backbone": "hf-hub:me/net"}), SettingsError, "no network of that name"),
    "swin": (
        changed(backbone_config={**TIMM, "backbone": "swin_tiny_patch4_window7_224"}),
        SettingsError,
        "its maps have their channels last",
    ),
    "acts": (
        changed(backbone_config={**TIMM, "backbone": "mobilenetv3_small_050"}),
        SettingsError,
        "its batch norms have activations",
    ),
    "maps": (changed(backbone_config={**TIMM, "out_indices": [1, 2]}), SettingsError, r"strides \[4, 8\]"),
    "stride": (changed(backbone_config={**TIMM, "output_stride": 16}), SettingsError, "output_stride"),
    "kind": (changed(backbone_config={"model_type": "swin"}), SettingsError, "backbone_config: is a 'swin'"),
    "caffe": (
        changed(backbone_config={**RESNET, "downsample_in_bottleneck": True}),
        SettingsError,
        "a ResNet that torchvision does not have",
    ),
    "square": (processor(size={"height": 8, "width": 8}), SettingsError, "expected shortest_edge and longest_edge"),
    "raw": (processor(do_rescale=False), SettingsError, r"rescale_factor: images are in \[0, 1\]"),
    "no weights": (no_weights, WeightsError, "has no weights; expected model.safetensors"),
    "outside": (index_to("../outside.safetensors"), WeightsError, "is not a file of this folder; nothing outside it"),
    "elsewhere": (index_to("/etc/passwd"), WeightsError, "is not a file of this folder; nothing outside it is read"),
    "half": (index_to("model-1.safetensors"), WeightsError, "no such file, but model.safetensors.index.json names it"),
    "link": (link_out, WeightsError, "nothing outside the folder is read"),
    "deep": (deep, DataError, "expected a JSON object"),
    "code": (executable, WeightsError, "reading it would execute code from it, which is refused"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    theirs("detr").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_is_refused_with_the_reason(tmp_path, saved, name):
    change, error, message = REFUSED[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    with pytest.raises(error, match=message):
        detector_of(folder)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_values_of_any_kind_are_read_or_refused(tmp_path, file):
    """Never an error of Python's own, whatever is in the place of whatever value."""
    theirs("two_stage").save_pretrained(tmp_path)
    transformers.DeformableDetrImageProcessor().save_pretrained(tmp_path)
    config = json.loads((tmp_path / file).read_text())
    for name in [*config, "use_timm_backbone", "backbone", "backbone_kwargs", "num_labels"]:
        for value in ("x", 3.5, -1, [], ["x"], {}, {"x": 1}, None, True):
            (tmp_path / file).write_text(json.dumps({**config, name: value}))
            with contextlib.suppress(HeadstartError):
                detectors.parse_settings(detector_of(tmp_path))
                folders.read_classes(tmp_path)


def test_more_places_than_the_weights_are_for(tmp_path):
    theirs("plain").save_pretrained(tmp_path)
    changed(encoder_n_points=10**9, decoder_n_points=10**9)(tmp_path)
    with pytest.raises(WeightsError, match=r"do not belong together \(points 1000000000, 4\)"):
        detector_of(tmp_path)


def test_damaged_weights(tmp_path, saved):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:-1000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        detector_of(tmp_path)
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_start(ours("detr"), tmp_path)


def test_heads_that_fit_nothing_here(tmp_path):
    model = theirs("refine")
    state = model.state_dict()
    with pytest.raises(WeightsError, match="differs from layer to layer, but without box refinement"):
        format_.to_torchvision({k: v for k, v in state.items() if "decoder.bbox_embed" not in k}, refine=False)
    apart = {k: v + 1 if "decoder.bbox_embed" in k else v for k, v in state.items()}
    with pytest.raises(WeightsError, match=r"differs from .*, but the two are one head here"):
        format_.to_torchvision(apart)
    some = {k: v for k, v in state.items() if not k.endswith("0.self_attn.q_proj.weight")}
    with pytest.raises(WeightsError, match=r"q_proj\.weight is missing beside"):
        format_.to_torchvision(some)
    with pytest.raises(WeightsError, match="1 of 1 keys are not those of a detector known here"):
        format_.to_torchvision({"model.mask_head.weight": torch.ones(1)})


# ---- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODES)
def test_an_exported_run_is_loaded_whole_and_gives_the_same(tmp_path, name):
    detector = ours(name, short_side_px=[64, 80], long_side_px=96)
    done = headstart.export(run_of(tmp_path / "run", detector, classes=CLASSES), "transformers")
    assert done.path == tmp_path / "run" / "transformers"
    assert {file.name for file in done.path.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }
    assert not done.missing_there
    assert not done.settings
    model = loaded(done.path)
    assert_same_outputs(detector, model)
    assert model.config.id2label == dict(enumerate(CLASSES))
    again, classes = load_finetuned(done.path)
    assert classes == CLASSES
    state, before = again.module.state_dict(), detector.module.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before if not key.endswith("num_batches_tracked"))
    assert read_metadata(done.path / "model.safetensors")["classes"] == CLASSES
    assert start_record(done.path)["method"] == "finetune"
    images = transformers.AutoImageProcessor.from_pretrained(done.path)
    assert dict(images.size) == {"shortest_edge": 80, "longest_edge": 96}
    assert (list(images.image_mean), images.rescale_factor) == ([0.485, 0.456, 0.406], 1 / 255)


def test_class_heads_of_refinement_stay_apart_there(tmp_path):
    detector = ours("refine")
    done = headstart.export(run_of(tmp_path / "run", detector, classes=CLASSES), "transformers")
    model = loaded(done.path)
    assert not torch.equal(model.class_embed[0].weight, model.class_embed[2].weight)
    for number, layer in enumerate(detector.module.class_embed):
        assert torch.equal(model.class_embed[number].weight, layer.weight)
    # Their own heads and those that refine are one, so that training there moves both.
    assert model.model.decoder.bbox_embed[1].layers[0].weight is model.bbox_embed[1].layers[0].weight
    model.save_pretrained(tmp_path / "again")
    assert_same_outputs(detector, loaded(tmp_path / "again"))


def test_the_proposals_classes_that_nobody_reads(tmp_path):
    detector = ours("two_stage")
    model = loaded(headstart.export(run_of(tmp_path / "run", detector, classes=CLASSES), "transformers").path)
    images, _, mask = example()
    with torch.no_grad():
        scores = model(pixel_values=images, pixel_mask=mask).enc_outputs_class.sigmoid()
    assert scores[..., 1:].max() < 1e-8
    assert torch.equal(model.class_embed[3].weight[:1], detector.module.enc_class_embed.weight)


@pytest.mark.parametrize("name", ["detr", "two_stage"])
def test_one_decoder_layer(tmp_path, name):
    detector = ours(name, decoder_layers=1)
    done = headstart.export(run_of(tmp_path / "run", detector, classes=CLASSES), "transformers")
    assert_same_outputs(detector, loaded(done.path))
    assert_same_outputs(load_finetuned(done.path)[0], loaded(done.path))


@pytest.mark.parametrize("name", ["detr", "plain"])
def test_another_timm_backbone(tmp_path, name):
    detector = ours(name, backbone="convnext_atto")
    model = loaded(headstart.export(run_of(tmp_path / "run", detector, classes=CLASSES), "transformers").path)
    assert_same_outputs(detector, model)
    assert detector_of(tmp_path / "run" / "transformers")["backbone"] == "convnext_atto"


def test_a_pretrained_run_says_what_is_missing_there(tmp_path):
    detector = ours("two_stage")
    parts = [part for part in detector.parts if part != "classifier"]
    done = headstart.export(run_of(tmp_path / "run", detector, parts, method="proseco"), "transformers")
    (reason,) = (reason for reason in done.dropped if "classes" in reason)
    assert set(done.dropped[reason]) == {"enc_class_embed.weight", "enc_class_embed.bias"}
    assert {name.removeprefix("model.decoder.").split(".")[0] for name in done.missing_there} == {"class_embed"}
    _, info = transformers.AutoModelForObjectDetection.from_pretrained(done.path, output_loading_info=True)
    assert all("class_embed" in key for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    fresh = ours("two_stage")
    report = load_start(fresh, done.path)
    assert not report.unexpected
    assert not report.reshaped


def test_what_can_not_go_there(tmp_path):
    def refused(match, name="detr", to="transformers", **settings):
        run = run_of(tmp_path / f"run{len(list(tmp_path.iterdir()))}", ours(name, **settings), classes=CLASSES)
        with pytest.raises(HeadstartError, match=match):
            headstart.export(run, to)
        return run

    refused(r"norms after each layer, this one before \(detector.pre_norm\)", pre_norm=True)
    refused("a width of 32 has not here", "plain", width=32)
    refused("can't build a Deformable DETR of one decoder layer", "refine", decoder_layers=1)
    refused("mobilenet_v2 can't be the backbone of its models", backbone="mobilenet_v2")
    refused(
        "swin_tiny_patch4_window7_224 can't be .*: its maps have their channels last",
        backbone="swin_tiny_patch4_window7_224",
    )
    refused("transformer detectors are not translated for it; use --to transformers", to="detectron2")
    refused("transformer detectors are not translated for it; use --to transformers", "plain", to="mmdetection")
    rcnn = detectors.build(detectors.parse_settings({"name": "fcos", "backbone": "resnet18", "fpn_channels": 8}))
    with pytest.raises(SettingsError, match="--to transformers: no weights of a DETR or Deformable DETR"):
        headstart.export(run_of(tmp_path / "fcos", rcnn, classes=CLASSES), "transformers")


def test_where_it_is_written(tmp_path):
    run = run_of(tmp_path / "run", ours("detr"), classes=CLASSES)
    with pytest.raises(SettingsError, match="--format pth: --to transformers writes a folder with safetensors"):
        headstart.export(run, "transformers", format="pth")
    with pytest.raises(SettingsError, match=r"holds something else than config\.json"):
        headstart.export(run, "transformers", out=run)
    assert (run / "detector.safetensors").is_file()
    done = CliRunner().invoke(cli.app, ["export", str(run), "--to", "transformers", "--out", str(tmp_path / "there")])
    assert done.exit_code == 0, done.output
    assert "AutoModelForObjectDetection.from_pretrained(" in done.output.replace("\n", "")
    assert headstart.export(run, "transformers", out=tmp_path / "there").path == tmp_path / "there"
    assert not list(tmp_path.glob(".tmp-*"))


def test_other_libraries_for_what_they_have(tmp_path):
    detector = ours("plain")
    run = run_of(tmp_path / "run", detector, classes=CLASSES)
    timm = pytest.importorskip("timm")
    done = headstart.export(run, "timm")
    timm.create_model("resnet18", num_classes=0, pretrained=False).load_state_dict(load_file(done.path))
    done = headstart.export(run, "torchvision")
    assert load_file(done.path).keys() == detector.module.state_dict().keys()


# ---- checkpoints of the original repositories -------------------------------------------------------------------


def original(name: str) -> dict[str, torch.Tensor]:
    """Under the names of DETR's and Deformable DETR's repositories, every name a head has there included."""
    mode = MODES[name]
    refine, two_stage = mode.get("refine", False), mode.get("two_stage", False)
    state = under_our_names(theirs(name), refine, two_stage)
    made = {}
    for key, value in state.items():
        if key.startswith("enc_"):  # the heads after those of the three layers
            head = key.removeprefix("enc_").replace("_embed.", "_embed.3.")
            made[head] = torch.cat([value, torch.randn(2, *value.shape[1:])]) if "class" in key else value
        elif key.startswith(("class_embed.0", "bbox_embed.0")) and not refine:
            made |= {key.replace(".0.", f".{layer}.", 1): value for layer in range(3)}
        else:
            made[key.replace("backbone.body.", "backbone.0.body.")] = value
    copied = ("class_embed.", "bbox_embed.") if two_stage else ("bbox_embed.",) if refine else ()
    made |= {f"transformer.decoder.{key}": value for key, value in made.items() if key.startswith(copied)}
    return made


@pytest.mark.parametrize("name", MODES)
def test_a_public_checkpoint_starts_a_run(tmp_path, name):
    state = original(name)
    if name == "plain":  # as DETReg's, which say what objects look like besides
        state |= {f"feature_embed.layers.{i}.weight": torch.ones(2, 2) for i in range(2)}
    if name == "detr":  # as UP-DETR's
        state |= {"patch2query.weight": torch.ones(2, 2), "feature_align.layers.0.weight": torch.ones(2, 2)}
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "epoch": 49}, tmp_path / "checkpoint.pth")
    detector = ours(name)
    report = load_start(detector, tmp_path / "checkpoint.pth")
    expected = under_our_names(theirs(name), MODES[name].get("refine", False), MODES[name].get("two_stage", False))
    assert set(report.matched) == expected.keys()
    assert all(torch.equal(detector.module.state_dict()[key], value) for key, value in expected.items())
    assert all(key.endswith("num_batches_tracked") for key in report.missing)
    words = " | ".join(report.moved)
    assert "backbone.0.body. is backbone.body." in words
    assert ("taken once" in words) == (name != "detr")
    assert ("enc_class_embed" in words) == (name == "two_stage")
    assert ("DETReg's head of object embeddings" in words) == (name == "plain")
    assert ("UP-DETR's projection of patches" in words) == (name == "detr")
    more = ("feature_embed.", "patch2query.", "feature_align.")
    assert all(key.startswith(more) for key in report.unexpected)


def test_a_public_checkpoint_of_another_variant(tmp_path):
    """One class layer becomes every decoder layer's, and a file's classes that do not fit stay out."""
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": {f"module.{key}": value for key, value in original("plain").items()}}, file)
    detector = ours("refine", num_classes=5)
    report = load_start(detector, file)
    assert any("copied to all 3 decoder layers" in words for words in report.moved)
    assert {key for key, *_ in report.reshaped} == {
        f"class_embed.{i}.{p}" for i in range(3) for p in ("weight", "bias")
    }
    boxes = detector.module.bbox_embed
    assert torch.equal(boxes[0].layers[0].weight, boxes[2].layers[0].weight)


def test_a_file_of_transformers_without_its_folder(tmp_path):
    model = theirs("refine")
    model.save_pretrained(tmp_path / "folder")
    file = tmp_path / "weights.safetensors"
    (tmp_path / "folder" / "model.safetensors").rename(file)
    detector = ours("refine")
    assert load_start(detector, file).moved == [f"names of transformers: {len(load_file(file))} keys"]
    assert_same_outputs(detector, model)


def test_runs_of_this_library_pass_as_they_are():
    for name in MODES:
        state = ours(name).module.state_dict()
        adapted, moved = ours(name).adapt(state)
        assert moved == []
        assert adapted.keys() == state.keys()
        assert all(adapted[key] is state[key] for key in state)


# ---- the verbs --------------------------------------------------------------------------------------------------


def test_fine_tuning_and_evaluating_a_folder(tmp_path, scenes):
    theirs("plain").save_pretrained(tmp_path / "folder")
    small = {"detector.short_side_px": 64, "detector.long_side_px": 64}
    done = headstart.finetune(
        tmp_path / "folder",
        scenes / "train.json",
        scenes / "val.json",
        out=tmp_path / "tuned",
        max_steps=1,
        batch_size=2,
        settings=small,
        show=False,
    )
    assert done.detector.settings.name == "deformable_detr"
    assert done.load_report is not None
    names = json.loads((scenes / "train.json").read_text())["categories"]
    reshaped = {key for key, *_ in done.load_report.reshaped}
    assert reshaped == (set() if len(names) == 3 else {"class_embed.0.weight", "class_embed.0.bias"})
    exported = headstart.export(tmp_path / "tuned", "transformers", out=tmp_path / "there")
    before, after = (
        headstart.evaluate(run, scenes / "val.json", show=False) for run in (tmp_path / "tuned", exported.path)
    )
    assert after.metrics == before.metrics
    assert after.path is None
    command = ["evaluate", str(exported.path), str(scenes / "val.json"), "--device", "cpu"]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert {file.name for file in exported.path.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }


def test_pretraining_from_a_folder(tmp_path, scenes):
    theirs("two_stage").save_pretrained(tmp_path / "folder")
    done = headstart.pretrain(
        images=scenes / "unlabelled",
        method="detreg",
        start=tmp_path / "folder",
        out=tmp_path / "run",
        max_steps=1,
        batch_size=2,
        settings={
            "detector.short_side_px": 64,
            "detector.long_side_px": 96,
            "proposals.engine": "random_patches",
            "train.workers": 0,
        },
        show=False,
    )
    assert done.detector.settings.two_stage
    loaded_from = json.loads((tmp_path / "run" / "run.json").read_text())["load_report"]
    assert not loaded_from["unexpected"]
    assert not loaded_from["reshaped"]
    report = load_start(ours("two_stage"), tmp_path / "run")
    assert all(key.startswith("class_embed.") for key in report.missing)
