"""The set loss against plain loops."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou

from headstart.detectors.set_loss import Objects, SetLoss, objects_in_all
from headstart.matching import xyxy
from test_distributed import torchrun

LAYERS, BATCH, QUERIES, CLASSES = 2, 3, 5, 4


def scene(kind: str, counts=(2, 0, 3)):
    torch.manual_seed(0)
    outputs = CLASSES + (kind == "softmax")
    logits = torch.randn(LAYERS, BATCH, QUERIES, outputs, dtype=torch.float32, requires_grad=True)
    boxes = (0.2 + 0.3 * torch.rand(LAYERS, BATCH, QUERIES, 4)).requires_grad_()
    wanted = [0.2 + 0.3 * torch.rand(n, 4) for n in counts]
    labels = [torch.randint(1, CLASSES + 1, (n,)) for n in counts]
    return logits, boxes, Objects(wanted, labels)


def pair_cost(loss: SetLoss, logits, box, wanted, label) -> float:
    """One query and one object; DETR's and Deformable DETR's text, number by number."""
    if loss.kind == "softmax":
        of_class = -logits.softmax(0)[label - 1]
    else:
        p = logits[label - 1].double().sigmoid()
        of_class = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    l1 = (box - wanted).abs().sum()
    overlap = 1 - generalized_box_iou(xyxy(box)[None], xyxy(wanted)[None])[0, 0]
    return float(loss.class_cost * of_class + loss.l1_cost * l1 + loss.giou_cost * overlap)


def best(loss: SetLoss, logits, boxes, wanted, labels) -> dict[int, int]:
    """Object -> query, of all ways to choose."""
    ways = itertools.permutations(range(QUERIES), len(wanted))
    total = lambda way: sum(pair_cost(loss, logits[q], boxes[q], wanted[o], labels[o]) for o, q in enumerate(way))
    return dict(enumerate(min(ways, key=total)))


def plain(loss: SetLoss, logits, boxes, objects: Objects) -> dict[str, torch.Tensor]:
    count = max(1, sum(len(w) for w in objects.boxes_cxcywh))
    terms = {name: torch.zeros(()) for name in ("class", "l1", "giou")}
    for layer in range(LAYERS):
        entropy, weights = torch.zeros(()), 0.0
        for b in range(BATCH):
            wanted, labels = objects.boxes_cxcywh[b], objects.labels[b]
            chosen = best(loss, logits[layer, b].detach(), boxes[layer, b].detach(), wanted, labels)
            for o, q in chosen.items():
                box = boxes[layer, b, q]
                terms["l1"] = terms["l1"] + loss.l1_weight * (box - wanted[o]).abs().sum() / count
                overlap = generalized_box_iou(xyxy(box)[None], xyxy(wanted[o])[None])[0, 0]
                terms["giou"] = terms["giou"] + loss.giou_weight * (1 - overlap) / count
            of_query = {q: int(labels[o]) - 1 for o, q in chosen.items()}
            for q in range(QUERIES):
                z = logits[layer, b, q]
                if loss.kind == "softmax":
                    weight = 1.0 if q in of_query else loss.no_object
                    entropy = entropy - weight * F.log_softmax(z, 0)[of_query.get(q, CLASSES)]
                    weights += weight
                else:
                    for c in range(CLASSES):
                        p = z[c].sigmoid()
                        hit = of_query.get(q) == c
                        one = -0.25 * (1 - p) ** 2 * p.log() if hit else -0.75 * p**2 * (1 - p).log()
                        entropy = entropy + one / count
        terms["class"] = terms["class"] + loss.class_weight * (entropy / weights if weights else entropy)
    return terms


@pytest.mark.parametrize("kind", ["softmax", "focal"])
@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0, 0), (1, 1, 1)])
def test_terms_and_gradients_are_those_of_loops(kind, counts):
    loss = SetLoss(kind, class_cost=2.0, class_weight=2.0)
    logits, boxes, objects = scene(kind, counts)
    ours, theirs = loss(logits, boxes, objects), plain(loss, logits, boxes, objects)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
    a = torch.autograd.grad(sum(ours.values()), (logits, boxes), allow_unused=True)
    b = torch.autograd.grad(sum(theirs.values()), (logits, boxes), allow_unused=True)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, atol=1e-5, rtol=1e-4)


def test_matches_of_each_layer_and_by_boxes_alone():
    loss = SetLoss("focal")
    logits, boxes, objects = scene("focal")
    _, matches = loss.with_matches(logits, boxes, objects)
    assert len(matches) == LAYERS
    for layer, found in enumerate(matches):
        again = loss.match(logits[layer], boxes[layer], objects)
        assert [a.tolist() for a in found] == [b.tolist() for b in again]
        for b in range(BATCH):
            chosen = best(loss, logits[layer, b].detach(), boxes[layer, b].detach(), *objects_of(objects, b))
            mine = found[0] == b
            assert dict(zip(found[2][mine].tolist(), found[1][mine].tolist(), strict=True)) == chosen
    by_boxes = SetLoss("focal", class_cost=0.0)
    assert [a.tolist() for a in loss.match(None, boxes[0], objects)] == [
        b.tolist() for b in by_boxes.match(logits[0], boxes[0], objects)
    ]


def objects_of(objects: Objects, b: int):
    return objects.boxes_cxcywh[b], objects.labels[b]


def test_objects_come_from_targets_in_px():
    targets = [{"boxes": torch.tensor([[10.0, 20, 50, 40]]), "labels": torch.tensor([2])}]
    objects = Objects.of(targets, torch.tensor([[80, 100]]))
    torch.testing.assert_close(objects.boxes_cxcywh[0], torch.tensor([[0.3, 0.375, 0.4, 0.25]]))
    assert objects.counts == [1]
    assert float(objects_in_all(objects, torch.zeros(()))) == 1


def test_a_batch_counts_in_float32_under_autocast():
    loss = SetLoss("softmax")
    logits, boxes, objects = scene("softmax")
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(logits.bfloat16(), boxes, objects)
    high = loss(logits.bfloat16().float(), boxes, objects)
    for name in low:
        torch.testing.assert_close(low[name], high[name])


def test_no_weight_of_no_object_and_no_objects():
    logits, boxes, objects = scene("softmax", counts=(0, 0, 0))
    terms = SetLoss("softmax", no_object=0.0)(logits, boxes, objects)
    assert {name: term.item() for name, term in terms.items()} == {"class": 0, "l1": 0, "giou": 0}


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_two_processes_are_one(kind, tmp_path):
    """Terms and gradients, where one process has most of the objects."""
    torchrun(
        tmp_path,
        """
import sys
from unittest.mock import patch
import torch, torch.distributed as dist
from headstart.detectors.set_loss import Objects, SetLoss
sys.path[:0] = FOLDERS
from test_set_loss import scene
dist.init_process_group("gloo")
rank = dist.get_rank()
loss = SetLoss(KIND)
logits, boxes, objects = scene(KIND, counts=(4, 0, 1))
with patch.object(dist, "is_initialized", lambda: False):
    expected = loss(logits, boxes, objects)
    gradients = torch.autograd.grad(sum(expected.values()), (logits, boxes))
mine = slice(0, 1) if rank == 0 else slice(1, 3)
own = Objects(objects.boxes_cxcywh[mine], objects.labels[mine])
terms = loss(logits[:, mine], boxes[:, mine], own)
found = torch.autograd.grad(sum(terms.values()), (logits, boxes))
for mean, whole in [*((terms[k].detach(), expected[k].detach()) for k in terms), *zip(found, gradients)]:
    mean = mean.clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, whole, rtol=1e-5, atol=1e-6)
dist.destroy_process_group()
""".replace("FOLDERS", repr([str(Path(__file__).parent), str(Path(__file__).parents[1])])).replace("KIND", repr(kind)),
    )
