"""Deformable DETR against transformers' with the same weights, and its attention against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hugging_face import OURS, example, reference, under_our_names

from headstart import detectors
from headstart.detectors.builders.deformable_detr import DeformableAttention, Levels, cell_sides
from headstart.detectors.deformable_detr import DeformableDETRSettings
from headstart.detectors.weights import load_state
from headstart.errors import SettingsError
from headstart.settings import validate

KINDS = [
    {"levels": 4},
    {"levels": 1},
    {"levels": 4, "refine": True},
    {"levels": 4, "refine": True, "two_stage": True},
    {"levels": 1, "refine": True, "two_stage": True},
]


def build(**changes):
    torch.manual_seed(0)
    return detectors.build(DeformableDETRSettings(**{**OURS, **changes}))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_transformers(kind, padded):
    theirs = reference("deformable_detr", **kind)
    ours = build(**kind).eval()
    stages = {name: kind.get(name, False) for name in ("refine", "two_stage")}
    ours.module.load_state_dict(under_our_names(theirs, **stages), strict=True)
    images, sizes, mask = example()
    with torch.no_grad():
        wanted = theirs(pixel_values=images, pixel_mask=mask if padded else None)
        answers = ours.module.answer(images, sizes if padded else None)
        logits = ours.module.logits(answers.hidden)
    assert wanted.pred_boxes.std() > 0.1
    torch.testing.assert_close(logits[-1], wanted.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(answers.boxes[-1], wanted.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(answers.hidden.transpose(0, 1), wanted.intermediate_hidden_states, atol=5e-5, rtol=0)
    if answers.first is not None:
        torch.testing.assert_close(answers.first[0][..., 0], wanted.enc_outputs_class[..., 0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(answers.first[1], wanted.enc_outputs_coord_logits.sigmoid(), atol=1e-5, rtol=0)


def bilinear(map_: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """(d,) of ``map_`` (d, h, w) at a place in cells, whose centres are at .5; zeros outside."""
    height, width = map_.shape[-2:]
    left, top = math.floor(x - 0.5), math.floor(y - 0.5)
    value = torch.zeros(len(map_), dtype=map_.dtype)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(x - 0.5 - column)) * (1 - abs(y - 0.5 - row)) * map_[:, row, column]
    return value


def by_loops(layer, query, reference, memory, sides, padding):
    """Eq. 3; ``reference`` (B, N, L, 2 or 4) in shares of the maps."""
    heads, levels, points = layer.heads, layer.levels, layer.points
    values = layer.value_proj(memory).masked_fill(padding[..., None], 0.0)
    offsets = layer.sampling_offsets(query).view(*query.shape[:2], heads, levels, points, 2)
    weights = layer.attention_weights(query).view(*query.shape[:2], heads, -1).softmax(-1)
    rows = []
    for b in range(len(query)):
        for n in range(query.shape[1]):
            row = []
            for m in range(heads):
                total, begin = 0, 0
                for level, (h, w) in enumerate(sides):
                    width = values.shape[-1] // heads
                    map_ = values[b, begin : begin + h * w, m * width : (m + 1) * width].T.reshape(width, h, w)
                    begin += h * w
                    for p in range(points):
                        x, y = reference[b, n, level, :2].tolist()
                        dx, dy = offsets[b, n, m, level, p].tolist()
                        if reference.shape[-1] == 4:
                            box_w, box_h = reference[b, n, level, 2:].tolist()
                            x, y = (x + dx / points * box_w / 2) * w, (y + dy / points * box_h / 2) * h
                        else:
                            x, y = x * w + dx, y * h + dy
                        total = total + weights[b, n, m, level * points + p] * bilinear(map_, x, y)
                row.append(total)
            rows.append(torch.cat(row))
    return layer.output_proj(torch.stack(rows).view_as(query))


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("sides", [[(3, 4)], [(4, 6), (2, 3), (1, 2)]])
def test_attention_is_the_loops(sides, coordinates):
    torch.manual_seed(0)
    layer = DeformableAttention(8, 2, len(sides), 3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    cells = sum(h * w for h, w in sides)
    query, memory = torch.randn(2, 5, 8), torch.randn(2, cells, 8)
    points = torch.rand(2, 5, coordinates) * 1.2 - 0.1
    ratios = torch.rand(2, len(sides), 2) / 2 + 0.5
    padding = torch.rand(2, cells) < 0.2
    levels = Levels(sides, cell_sides(sides, query.device), padding, ratios)
    found = layer(query, levels.placed(points), memory, levels)
    placed = points[:, :, None] * ratios.repeat(1, 1, coordinates // 2)[:, None]
    torch.testing.assert_close(found, by_loops(layer, query, placed, memory, sides, padding), atol=1e-5, rtol=1e-4)


def test_attention_begins_as_a_ring():
    """Head m looks into the m-th of eight directions, its k-th point k cells away, at every query alike."""
    layer = build(heads=8).module.transformer.decoder.layers[0].cross_attn
    offsets = layer.sampling_offsets.bias.view(8, 4, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(directions):
        for point in range(4):
            wanted = torch.tensor([x, y]) * (point + 1.0)
            for level in range(4):
                torch.testing.assert_close(offsets[head, level, point], wanted, atol=1e-5, rtol=0)
    for weight in (layer.sampling_offsets.weight, layer.attention_weights.weight, layer.attention_weights.bias):
        assert (weight == 0).all()


def test_the_papers_start():
    module = build(refine=True).module
    assert [head.layers[-1].bias.tolist() for head in module.bbox_embed] == [[0, 0, -2, -2], [0] * 4, [0] * 4]
    torch.testing.assert_close(module.class_embed[0].bias.sigmoid(), torch.full((3,), 0.01))
    assert [head.layers[-1].bias.tolist() for head in build().module.bbox_embed] == [[0, 0, -2, -2]]
    two_stage = build(refine=True, two_stage=True)
    assert all((head.layers[-1].bias == 0).all() for head in two_stage.module.bbox_embed)
    assert two_stage.module.enc_class_embed.out_features == 1
    answers = two_stage.queries(torch.rand(1, 3, 64, 64))
    assert answers.first is not None  # nothing is moved yet: the first boxes are anchors, an even share of the image
    usable = answers.first[1][answers.first[1][..., 2] < 1]
    assert {round(side, 4) for side in usable[:, 2].tolist()} <= {0.05, 0.1, 0.2, 0.4}


def test_extra_is_added_to_the_content():
    detector = build().eval()
    images, extra = torch.rand(1, 3, 64, 64), torch.randn(1, 7, 64)
    asked = detector.queries(images, extra=extra)
    with torch.no_grad():
        detector.module.query_embed.weight[:, 64:] += extra[0]
    torch.testing.assert_close(asked.hidden, detector.queries(images).hidden)


def test_two_stage_queries_are_the_best_proposals():
    detector = build(levels=1, refine=True, two_stage=True, num_queries=3).eval()
    captured = []
    detector.module.transformer.decoder.layers[0].register_forward_pre_hook(lambda _, given: captured.append(given[2]))
    answers = detector.queries(torch.rand(2, 3, 128, 128))
    assert answers.first is not None
    for b in range(2):
        best = answers.first[0][b, :, 0].argsort(descending=True)[:3]
        torch.testing.assert_close(captured[0][b, 0].T, answers.first[1][b, best])


def test_more_queries_than_cells_ask_proposals_twice():
    detector = build(levels=1, refine=True, two_stage=True, num_queries=7).eval()
    answers = detector.queries(torch.rand(1, 3, 64, 64))  # 2 x 2 cells
    assert answers.boxes_cxcywh.shape == (3, 1, 7, 4)
    assert torch.isfinite(answers.hidden).all()


def test_two_stage_queries_cannot_be_told_apart():
    detector = build(refine=True, two_stage=True)
    images = torch.rand(1, 3, 64, 64)
    for asked in ({"extra": torch.zeros(1, 7, 64)}, {"attend": torch.ones(7, 7, dtype=torch.bool)}):
        with pytest.raises(SettingsError, match=r"two_stage.*expected detector\.two_stage=false"):
            detector.queries(images, **asked)


def test_detections_are_the_best_pairs_of_query_and_class():
    module = build(detections=4).module
    logits = torch.tensor([[[0.0, 3, 2], [4, -1, 1]]])
    boxes = torch.tensor([[[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 0.5]]])
    (found,) = module.best(logits, boxes, [(100, 200)])
    assert found["labels"].tolist() == [1, 2, 3, 3]
    torch.testing.assert_close(found["scores"], torch.tensor([4.0, 3, 2, 1]).sigmoid())
    whole, part = [0.0, 0, 200, 100], [0.0, 25, 100, 75]
    assert found["boxes"].tolist() == [part, whole, whole, part]


def test_wrong_settings_say_what_was_expected():
    for values, words in [
        ({"two_stage": True}, "expected refine: true"),
        ({"levels": 3}, "1 or 4"),
        ({"heads": 7}, "multiple of both heads and 4"),
    ]:
        with pytest.raises(SettingsError, match=words):
            validate(DeformableDETRSettings, values)


def test_weights_move_between_one_map_and_four():
    one, four = build(levels=1), build(levels=4)
    for source, target, pair in ((one, four, ("0", "2")), (four, one, ("2", "0"))):
        adapted, said = target.adapt(source.module.state_dict())
        report = load_state(target.module, adapted, "file")
        assert len(said) == 1
        assert "C5's projection" in said[0]
        for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
            kept = target.module.state_dict()[f"input_proj.{pair[1]}.{name}"]
            assert torch.equal(kept, source.module.state_dict()[f"input_proj.{pair[0]}.{name}"])
        assert len([key for key in report.unexpected if "(of a map" in key]) == (12 if target is one else 0)


def test_weights_move_between_shared_and_own_heads():
    shared, own = build(), build(refine=True)
    adapted, said = own.adapt(shared.module.state_dict())
    assert said == ["class and box layers copied to all 3 decoder layers"]
    own.module.load_state_dict(adapted)
    assert torch.equal(own.module.class_embed[2].weight, shared.module.class_embed[0].weight)
    with torch.no_grad():
        own.module.bbox_embed[2].layers[1].weight += 1
    adapted, said = shared.adapt(own.module.state_dict())
    assert said == ["class and box layers taken from the last of 3 decoder layers"]
    load_state(shared.module, adapted, "file")
    assert torch.equal(own.module.bbox_embed[2].layers[1].weight, shared.module.bbox_embed[0].layers[1].weight)
    assert own.adapt(own.module.state_dict())[1] == []


def test_the_papers_model():
    detector = detectors.build(DeformableDETRSettings(num_classes=91))
    sizes = {name: tuple(value.shape) for name, value in detector.module.state_dict().items()}
    assert sizes["query_embed.weight"] == (300, 512)
    assert sizes["class_embed.0.weight"] == (91, 256)
    assert sizes["input_proj.3.0.weight"] == (256, 2048, 3, 3)
    assert sizes["transformer.level_embed"] == (4, 256)
    assert sizes["transformer.decoder.layers.5.linear1.weight"] == (1024, 256)
    rule = detector.set_loss
    assert (rule.kind, rule.class_cost, rule.class_weight, rule.l1_weight, rule.giou_weight) == ("focal", 2, 2, 5, 2)
    assert detector.tuning().lr_scale == {"backbone": 0.1, "sampling_offsets": 0.1, "reference_points": 0.1}
    assert "reference_points" not in build(refine=True, two_stage=True).tuning().lr_scale
