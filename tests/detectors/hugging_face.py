"""transformers' DETR and Deformable DETR with random weights, and these weights under our names: a reference."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
)

SHARED = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 7,
    "num_labels": 3,
}
OURS = {  # the same, in our words
    "backbone": "resnet18",
    "width": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "feedforward": 48,
    "heads": 4,
    "num_queries": 7,
    "num_classes": 3,
}


def reference(family: str, levels: int = 1, refine: bool = False, two_stage: bool = False) -> nn.Module:
    torch.manual_seed(1)  # what is built is kept, with noise on it
    maps = [4] if levels == 1 else [2, 3, 4]
    backbone = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": maps}
    backbone |= {"num_channels": 3, "features_only": True, "use_pretrained_backbone": False}
    if family == "detr":
        model = DetrForObjectDetection(DetrConfig(**SHARED, backbone_config=backbone))
    else:
        stages = {"with_box_refine": refine, "two_stage": two_stage, "two_stage_num_proposals": 7}
        config = DeformableDetrConfig(**SHARED, **stages, backbone_config=backbone, num_feature_levels=levels)
        model = DeformableDetrForObjectDetection(config)
    if refine:  # newer versions tie the heads of all layers, which the original does not
        model.class_embed = nn.ModuleList(copy.deepcopy(layer) for layer in model.class_embed)
        model.bbox_embed = nn.ModuleList(copy.deepcopy(layer) for layer in model.bbox_embed)
        model.model.decoder.bbox_embed = model.bbox_embed
        if two_stage:
            model.model.decoder.class_embed = model.class_embed
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                positive = name.endswith(("running_var", "norm.weight", ".1.weight", "bn1.weight", "bn2.weight"))
                noise = 0.02 if "bbox" in name else 0.1  # more of it, and all boxes would be as large as the image
                value.copy_(torch.rand_like(value) + 0.5 if positive else value + noise * torch.randn_like(value))
    return model.eval()


RULES = [
    (r"model\.backbone\.model\.", "backbone.body."),
    (r"model\.query_position_embeddings\.", "query_embed."),
    (r"model\.input_projection\.", "input_proj."),
    (r"model\.input_proj\.", "input_proj."),
    (r"class_labels_classifier\.", "class_embed."),
    (r"bbox_predictor\.", "bbox_embed."),
    (r"model\.decoder\.layernorm\.", "transformer.decoder.norm."),
    (r"model\.", "transformer."),
]


def under_our_names(model: nn.Module, refine: bool = False, two_stage: bool = False) -> dict[str, Tensor]:
    deformable = hasattr(model.model, "level_embed")
    layers = len(model.model.decoder.layers)
    made: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        head = re.match(r"(?:class|bbox)_embed\.(\d+)\.", key)
        if re.match(r"model\.decoder\.(class|bbox)_embed", key) or (head and not refine and head[1] != "0"):
            continue
        if head and two_stage and int(head[1]) == layers:
            own = key.replace(f".{layers}.", ".", 1)
            made[f"enc_{own}"] = value[:1] if key.startswith("class") else value
            continue
        made[rename(key, deformable)] = value
    for key in [key for key in made if ".q_proj." in key]:
        parts = [made.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        made[re.sub(r"q_proj\.", "in_proj_", key)] = torch.cat(parts)
    return made


def rename(key: str, deformable: bool) -> str:
    for pattern, ours in RULES:
        if re.match(pattern, key):
            key = re.sub(pattern, ours, key, count=1)
            break
    decoder = "decoder.layers" in key
    cross = "cross_attn" if deformable else "multihead_attn"
    first, second = ("norm2", "norm1") if deformable and decoder else ("norm1", "norm2")
    for theirs, ours in (
        ("encoder_attn_layer_norm", second),
        ("self_attn_layer_norm", first),
        ("final_layer_norm", "norm3" if decoder else "norm2"),
        ("encoder_attn.", f"{cross}."),
        ("o_proj", "out_proj"),
        ("mlp.fc", "linear"),
    ):
        key = key.replace(theirs, ours)
    return key


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Normalised images (3, 3, 97, 130) of three sizes, with zeros in the padding; the sizes; the mask."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 97, 130, generator=generator)
    sizes = torch.tensor([[97, 61], [64, 130], [33, 40]])
    mask = torch.zeros(3, 97, 130, dtype=torch.int64)
    for image, of_image, (height, width) in zip(images, mask, sizes.tolist(), strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
        of_image[:height, :width] = 1
    return images, sizes, mask
