"""Folders as transformers' ``save_pretrained`` writes them: ``config.json``, weights, ``preprocessor_config.json``.

Files are read as they are: nothing is executed, nothing outside the folder is opened, and what ``config.json`` asks for
is held against the weights before it is built.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.detectors.backbones import resnets
from headstart.detectors.formats.renaming import count
from headstart.detectors.formats.transformers import (
    LOSSES,
    MODELS,
    NAME,
    check_backbone,
    check_width,
    facts,
    old_name,
    to_torchvision,
)
from headstart.detectors.weights import read_state, save_detector
from headstart.errors import DataError, SettingsError, WeightsError
from headstart.files import read_json, replacing, write_json

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
MOST_CLASSES = 100_000  # without names; beyond it, a file does not mean it
_RESNETS = {  # transformers' own, by what their configurations say
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
_DEFAULTS: dict[str, dict[str, Any]] = {  # where a file does not say it
    "detr": {"num_queries": 100, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048},
    "deformable_detr": {"num_queries": 300, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024},
}
_COMMON_DEFAULTS: dict[str, Any] = {
    "d_model": 256,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "dropout": 0.1,
    "activation_function": "relu",
    "position_embedding_type": "sine",
    "num_channels": 3,
    "num_feature_levels": 4,
    "encoder_n_points": 4,
    "decoder_n_points": 4,
    "two_stage_num_proposals": 300,
}


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder as ``save_pretrained`` writes it, of whatever model."""
    return (path / CONFIG).is_file()


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the detector in ``folder``.

    Raises:
        DataError: ``config.json`` is not readable.
        SettingsError: it is another model, or one that the detectors here can't be; the message says why.
        WeightsError: the weights are missing, or not those that ``config.json`` speaks of.
    """
    try:
        settings = _settings(folder)
        _check_shapes(folder, settings)
    except (TypeError, ValueError, AttributeError) as error:  # a list for a number, a word for a list, ...
        raise SettingsError(f"{folder}: {CONFIG} or {PROCESSOR} has a value of another kind ({error})") from error
    return settings


def _settings(folder: Path) -> dict[str, Any]:
    config = _read_config(folder)
    kind, where = config["model_type"], folder / CONFIG
    _refuse_others(config, kind, where)
    heads, feedforward = (_same(config, where, name) for name in ("attention_heads", "ffn_dim"))
    backbone = _read_backbone(config, kind, where)
    settings: dict[str, Any] = {
        "name": kind,
        "backbone": backbone,
        "num_classes": len(read_classes(folder)),
        "width": _number(config, "d_model", where),
        "heads": heads,
        "encoder_layers": _number(config, "encoder_layers", where),
        "decoder_layers": _number(config, "decoder_layers", where),
        "feedforward": feedforward,
        "dropout": float(config["dropout"]),
        "num_queries": _number(config, "num_queries", where),
    }
    if kind == "deformable_detr":
        two_stage, refine = (bool(config.get(name, False)) for name in ("two_stage", "with_box_refine"))
        check_width(settings["width"])
        if config["num_feature_levels"] not in (1, 4):
            raise SettingsError(
                f"{where}: num_feature_levels {config['num_feature_levels']}; the detectors here have 1 or 4"
            )
        settings |= {
            "levels": _number(config, "num_feature_levels", where),
            "points": _same(config, where, "n_points"),
            "refine": refine or two_stage,
            "two_stage": two_stage,
        }
        if two_stage:
            settings["num_queries"] = _number(config, "two_stage_num_proposals", where)
    settings |= {here: config[there] for here, there in LOSSES.items() if there in config}
    if kind == "deformable_detr":
        settings.pop("no_object", None)  # focal: there is none
    return settings | _read_processor(folder)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in ``folder`` under this library's names, and in words what was changed.

    Raises:
        WeightsError: there are none, they lie outside the folder, or are not those of such a model.
    """
    config = _read_config(folder)
    state: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        state |= read_state(file)
    refine = bool(config.get("with_box_refine", False) or config.get("two_stage", False))
    made = to_torchvision(state, refine=refine)
    moved = [f"names of {NAME}: {len(state)} keys"]
    layers = count(made, r"class_embed\.(\d+)\.")
    of_classes = {match[1] for name in state if (match := re.search(r"class_embed\.(\d+)\.", name))}
    if refine and len(of_classes) == 1 and layers > 1:
        moved.append(f"one class layer, which {NAME} ties: copied to all {layers} decoder layers")
    return made, moved


def read_classes(folder: Path) -> list[str]:
    """Names of the classes, in the order of the labels; one that is there twice gets its number.

    Raises:
        SettingsError: they are not numbered from 0.
    """
    config = _read_config(folder)
    given = config.get("id2label")
    if given is None:
        labels = _number({"num_labels": 2, **config}, "num_labels", folder / CONFIG)
        if labels > MOST_CLASSES:
            raise SettingsError(f"{folder / CONFIG}: num_labels {labels}; expected {MOST_CLASSES} at most")
        return [f"LABEL_{number}" for number in range(labels)]
    if not isinstance(given, Mapping) or not given or set(given) != {str(number) for number in range(len(given))}:
        raise SettingsError(f"{folder / CONFIG}: id2label: expected a name for each number from 0 on")
    names = [str(given[str(number)]) for number in range(len(given))]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def _read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, what it leaves out filled in with transformers' own values."""
    config = _read_mapping(folder, CONFIG)
    kind = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(kind, str) or kind not in MODELS or any("Segmentation" in str(name) for name in architectures):
        said = f"model_type {kind!r}, {architectures}"
        raise SettingsError(f"{folder / CONFIG}: {said}; expected a {' or a '.join(MODELS.values())}")
    return {**_COMMON_DEFAULTS, **_DEFAULTS[kind], **config}


def _refuse_others(config: Mapping[str, Any], kind: str, where: Path) -> None:
    """Raises: SettingsError for a model that computes something else."""
    for name, value in (("activation_function", "relu"), ("position_embedding_type", "sine"), ("num_channels", 3)):
        if config[name] != value:
            raise SettingsError(f"{where}: {name} is {config[name]!r}; the detectors here have {value!r} only")
    if config.get("dilation"):
        raise SettingsError(f"{where}: dilation: the backbones here have none")
    if kind == "detr" and config.get("auxiliary_loss"):
        raise SettingsError(
            f"{where}: auxiliary_loss: {NAME}' DETR then puts the decoder's last norm between its layers too, which "
            "DETR does not do, nor the one here. If the weights were not trained that way, set it to false in the file"
        )


def _read_backbone(config: Mapping[str, Any], kind: str, where: Path) -> str:
    """
    Raises:
        SettingsError: it is none of those the detectors here have, or is used otherwise.
    """
    inner = config.get("backbone_config")
    if inner is None and config.get("use_timm_backbone", True):
        options = config.get("backbone_kwargs") or {}
        inner = {**options, "model_type": "timm_backbone", "backbone": config.get("backbone") or "resnet50"}
    elif inner is None:
        inner = {"model_type": "resnet"}
    if not isinstance(inner, Mapping):
        raise SettingsError(f"{where}: backbone_config: expected a mapping, found {inner!r}")
    if inner.get("model_type") == "resnet":
        return _hf_resnet(inner, where)
    if inner.get("model_type") != "timm_backbone":
        raise SettingsError(
            f"{where}: backbone_config: is a {inner.get('model_type')!r}; expected a timm network (timm_backbone) or a "
            "ResNet (resnet)"
        )
    name = str(inner.get("backbone")).partition(".")[0]  # what follows is a tag of weights
    if inner.get("output_stride") not in (None, 32):
        raise SettingsError(f"{where}: backbone_config: output_stride: the backbones here have none")
    check_backbone(name)
    numbers = inner.get("out_indices")
    if numbers is not None:
        strides = (2, 4, 8, 16, 32) if name in resnets() else facts(name).strides
        try:
            found = [strides[int(number)] for number in numbers]
        except (TypeError, ValueError, IndexError):
            found = []
        levels = config["num_feature_levels"]
        right = found[-1:] == [32] if kind == "detr" else found == ([8, 16, 32] if levels != 1 else [32])
        if not right:
            raise SettingsError(
                f"{where}: backbone_config: out_indices {numbers!r} are maps of strides {found}; the detectors here "
                "work on those of stride 32, or 8, 16 and 32"
            )
    return name


def _hf_resnet(inner: Mapping[str, Any], where: Path) -> str:
    kind = str(inner.get("layer_type", "bottleneck"))
    depths = tuple(inner.get("depths") or (3, 4, 6, 3))
    wide = 4 if kind == "bottleneck" else 1
    wanted = [64 * wide, 128 * wide, 256 * wide, 512 * wide]
    usual = (
        list(inner.get("hidden_sizes") or (256, 512, 1024, 2048)) == wanted and inner.get("embedding_size", 64) == 64
    )
    plain = inner.get("hidden_act", "relu") == "relu"
    strided = any(inner.get(name) for name in ("downsample_in_first_stage", "downsample_in_bottleneck"))
    if (kind, depths) not in _RESNETS or not usual or not plain or strided:
        raise SettingsError(
            f"{where}: backbone_config: a ResNet that torchvision does not have; expected "
            f"{', '.join(_RESNETS.values())}, with the stride in the 3 x 3 convolution"
        )
    return _RESNETS[kind, depths]


def _read_processor(folder: Path) -> dict[str, Any]:
    """How images are resized and normalised; {} where the folder does not say."""
    if _file(folder, PROCESSOR) is None:
        return {}
    said, where = _read_mapping(folder, PROCESSOR), folder / PROCESSOR
    if not said.get("do_rescale", True) or abs(255 * said.get("rescale_factor", 1 / 255) - 1) > 1e-6:
        raise SettingsError(f"{where}: rescale_factor: images are in [0, 1] here before they are normalised")
    found: dict[str, Any] = {}
    if said.get("do_normalize", True):
        found |= {name: list(said[name]) for name in ("image_mean", "image_std") if said.get(name)}
    else:
        found |= {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    if not said.get("do_resize", True):
        raise SettingsError(f"{where}: do_resize: images are resized here, to a short and at most a long side")
    size = said.get("size")
    if isinstance(size, Mapping):
        if not size.keys() <= {"shortest_edge", "longest_edge"} or "shortest_edge" not in size:
            raise SettingsError(f"{where}: size {dict(size)}; expected shortest_edge and longest_edge, px")
        short, long = size["shortest_edge"], size.get("longest_edge")
    else:
        short, long = size, None
    long = long or said.get("max_size")
    return found | {k: int(v) for k, v in (("short_side_px", short), ("long_side_px", long)) if v}


def _number(config: Mapping[str, Any], name: str, where: Path) -> int:
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingsError(f"{where}: {name}: expected a number from 1 on, found {value!r}")
    return value


def _same(config: Mapping[str, Any], where: Path, name: str) -> int:
    """What encoder and decoder have alike."""
    encoder, decoder = (_number(config, f"{coder}_{name}", where) for coder in ("encoder", "decoder"))
    if encoder != decoder:
        raise SettingsError(
            f"{where}: {name}: {encoder} in the encoder, {decoder} in the decoder; here both have the same"
        )
    return encoder


def _check_shapes(folder: Path, settings: Mapping[str, Any]) -> None:
    """What is about to be built is no larger than the weights that are there for it.

    Raises:
        WeightsError: it is something else.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        shapes |= {old_name(name): shape for name, shape in _shapes(file).items()}
    first = "model.encoder.layers.0.fc1.weight"
    queries = shapes.get("model.query_position_embeddings.weight", (settings["num_queries"],))
    found = {
        "encoder_layers": count(shapes, r"model\.encoder\.layers\.(\d+)\."),
        "decoder_layers": count(shapes, r"model\.decoder\.layers\.(\d+)\."),
        "feedforward": shapes.get(first, (0, 0))[0],
        "width": shapes.get(first, (0, 0))[1],
        "num_queries": queries[0],
    }
    if "points" in settings:
        a_point = max(1, settings["heads"] * settings["levels"])
        weights = shapes.get("model.encoder.layers.0.self_attn.attention_weights.bias", (0,))
        found["points"] = weights[0] // a_point
    wrong = [f"{name} {settings[name]}, {value}" for name, value in found.items() if settings[name] != value]
    if wrong:
        raise WeightsError(f"{folder}: {CONFIG} and the weights do not belong together ({'; '.join(wrong)})")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix != ".safetensors":
        return {name: tuple(value.shape) for name, value in read_state(file).items()}
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: not a readable safetensors file ({error})") from None


def _weight_files(folder: Path) -> list[Path]:
    """
    Raises:
        WeightsError: there are none, or an index names a file that is not in the folder itself.
    """
    for name in WEIGHTS:
        if (file := _file(folder, name)) is not None:
            return [file]
        if _file(folder, name + INDEX) is None:
            continue
        places = _read_mapping(folder, name + INDEX).get("weight_map")
        if not isinstance(places, Mapping):
            raise WeightsError(f"{folder / (name + INDEX)}: has no weight_map; expected one from weights to files")
        files = []
        for part in sorted({str(place) for place in places.values()}):
            file = _file(folder, part)
            if file is None:
                raise WeightsError(f"{folder / part}: no such file, but {name + INDEX} names it")
            files.append(file)
        return files
    raise WeightsError(f"{folder}: has no weights; expected {WEIGHTS[0]}")


def _read_mapping(folder: Path, name: str) -> dict[str, Any]:
    """Raises: DataError for a file that is missing, outside the folder, or no JSON object."""
    file = _file(folder, name) or folder / name
    try:
        value = read_json(file, "a JSON object")
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{file}: expected a JSON object")
    return value


def _file(folder: Path, name: str) -> Path | None:
    """A file of ``folder`` itself, or None.

    huggingface_hub keeps folders of links into ``blobs`` two levels above them; those alone may lead outside.

    Raises:
        WeightsError: the name or a link leads elsewhere.
    """
    path, root = folder / name, folder.resolve()
    if Path(name).name != name:
        raise WeightsError(f"{folder}: {name!r} is not a file of this folder; nothing outside it is read")
    if not path.is_file():
        return None
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if path.resolve().parent not in homes:
        raise WeightsError(f"{path}: is a link to {path.resolve()}; nothing outside the folder is read")
    return path


def write(
    folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], processor: Mapping[str, Any], about: Any
) -> None:
    """``config.json``, ``preprocessor_config.json`` and ``model.safetensors``, all or nothing.

    Args:
        state: of :func:`from_torchvision`.
        config, processor: of :func:`model_settings` with :func:`class_names`, and of :func:`processor_settings`.
        about: kept as ``headstart`` in the metadata of the weights.

    Raises:
        SettingsError: there is something else at ``folder``.
    """
    own = {CONFIG, PROCESSOR, WEIGHTS[0]}
    if folder.exists() and (not folder.is_dir() or not {path.name for path in folder.iterdir()} <= own):
        raise SettingsError(f"--out {folder}: holds something else than {', '.join(sorted(own))}; choose a new folder")
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, values in ((CONFIG, config), (PROCESSOR, processor)):
            write_json(temporary / name, values)
        save_detector(temporary / WEIGHTS[0], state, about)
