"""DETR against transformers' with the same weights, and against the paper's words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hugging_face import OURS, example, reference, under_our_names
from torch import nn

from headstart import detectors
from headstart.detectors.builders.transformer import Attention
from headstart.detectors.detr import DETRSettings


@pytest.mark.parametrize("padded", [True, False])
def test_outputs_are_those_of_transformers(padded):
    theirs = reference("detr")
    ours = detectors.build(DETRSettings(**OURS)).eval()
    ours.module.load_state_dict(under_our_names(theirs), strict=True)
    images, sizes, mask = example()
    with torch.no_grad():
        wanted = theirs(pixel_values=images, pixel_mask=mask if padded else None)
        answers = ours.module.answer(images, sizes if padded else None)
        logits = ours.module.logits(answers.hidden)
    assert wanted.pred_boxes.std() > 0.1
    torch.testing.assert_close(logits[-1], wanted.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(answers.boxes[-1], wanted.pred_boxes, atol=1e-5, rtol=0)


def test_attention_is_torchs():
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(12, 3, batch_first=True), Attention(12, 3, 0.0)
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict())
    query, key, value = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    padding = torch.arange(7) >= torch.tensor([[7], [3]])
    wanted, _ = theirs(query, key, value, key_padding_mask=padding)
    torch.testing.assert_close(ours(query, key, value, ~padding[:, None, None]), wanted)
    look = torch.rand(5, 5) < 0.5
    look.fill_diagonal_(True)
    torch.testing.assert_close(
        ours(query, query, value[:, :5], look), theirs(query, query, value[:, :5], attn_mask=~look)[0]
    )


def plain_pre_norm(module, map_, position, query):
    """The layers in the order of the paper's appendix, norms first; without padding, one image, no dropout."""

    def attend(layer, q, k, v):
        out, _ = F.multi_head_attention_forward(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), q.shape[-1], layer.heads,
            layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
            layer.out_proj.weight, layer.out_proj.bias,
        )  # fmt: skip
        return out.transpose(0, 1)

    def feed(layer, x):
        return layer.linear2(F.relu(layer.linear1(x)))

    x = map_.flatten(2).transpose(1, 2)
    for layer in module.transformer.encoder.layers:
        y = layer.norm1(x)
        x = x + attend(layer.self_attn, y + position, y + position, y)
        x = x + feed(layer, layer.norm2(x))
    memory = module.transformer.encoder.norm(x)
    y, outputs = torch.zeros_like(query), []
    for layer in module.transformer.decoder.layers:
        z = layer.norm1(y)
        y = y + attend(layer.self_attn, z + query, z + query, z)
        y = y + attend(layer.multihead_attn, layer.norm2(y) + query, memory + position, memory)
        y = y + feed(layer, layer.norm3(y))
        outputs.append(module.transformer.decoder.norm(y))
    return torch.stack(outputs)


def test_norms_before():
    detector = detectors.build(DETRSettings(**OURS, pre_norm=True)).eval()
    module, images = detector.module, torch.randn(1, 3, 64, 96)
    (map_,) = module.project(images)
    y, x = torch.meshgrid(torch.arange(1, 3) / (2 + 1e-6), torch.arange(1, 4) / (3 + 1e-6), indexing="ij")
    rows = []
    for place in (y.flatten() * 2 * torch.pi, x.flatten() * 2 * torch.pi):
        angle = place[:, None] / 10000 ** (2 * (torch.arange(32) // 2) / 32)
        rows.append(torch.where(torch.arange(32) % 2 == 0, angle.sin(), angle.cos()))
    position = torch.cat(rows, dim=1)[None]
    wanted = plain_pre_norm(module, map_, position, module.query_embed.weight[None])
    torch.testing.assert_close(module.answer(images).hidden, wanted, atol=1e-5, rtol=1e-4)


def test_extra_is_added_to_the_query_embeddings():
    detector = detectors.build(DETRSettings(**OURS)).eval()
    images = torch.rand(1, 3, 64, 64)
    extra = torch.randn(1, 7, 64)
    asked = detector.queries(images, extra=extra)
    with torch.no_grad():
        detector.module.query_embed.weight += extra[0]
    torch.testing.assert_close(asked.hidden, detector.queries(images).hidden)


def test_detections_are_the_best_class_of_each_query():
    module = detectors.build(DETRSettings(**OURS, detections=5)).module
    logits = torch.tensor([[[0.0, 1, 2, 9], [3, 0, 0, 0], [0, 5, 0, 0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 0.5], [0.9, 0.9, 0.4, 0.2]]])
    (found,) = module.best(logits, boxes, [(100, 200)])
    assert found["labels"].tolist() == [2, 1, 3]
    wanted = logits[0].softmax(-1)
    torch.testing.assert_close(found["scores"], torch.stack([wanted[2, 1], wanted[1, 0], wanted[0, 2]]))
    expected = torch.tensor([[140.0, 80, 200, 100], [0, 25, 100, 75], [0, 0, 200, 100]])
    torch.testing.assert_close(found["boxes"], expected)
    assert len(module.best(logits[:, :2], boxes[:, :2], [(1, 1)])[0]["boxes"]) == 2


def test_the_papers_model():
    detector = detectors.build(DETRSettings(num_classes=91))
    sizes = {name: tuple(value.shape) for name, value in detector.module.state_dict().items()}
    assert sizes["query_embed.weight"] == (100, 256)
    assert sizes["input_proj.weight"] == (256, 2048, 1, 1)
    assert sizes["class_embed.weight"] == (92, 256)
    assert sizes["transformer.encoder.layers.5.linear1.weight"] == (2048, 256)
    assert sizes["transformer.decoder.layers.5.multihead_attn.in_proj_weight"] == (768, 256)
    assert sizes["transformer.decoder.norm.bias"] == (256,)
    assert not any(name.startswith("transformer.encoder.norm") for name in sizes)
    assert detector.class_layer(4).out_features == 5
    assert detector.set_loss.no_object == 0.1
    assert (detector.set_loss.class_weight, detector.set_loss.l1_weight, detector.set_loss.giou_weight) == (1, 5, 2)
    assert detector.tuning().lr_scale == {"backbone": 0.1}
