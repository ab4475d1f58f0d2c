from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headstart.datasets import images
from headstart.datasets.detection import Annotations, Category, DetectionData, ImageRecord, masks_of
from headstart.datasets.torch_dataset import DetectionDataset
from headstart.errors import DataError, ImageError

SQUARE = [[2.0, 3.0, 12.0, 3.0, 12.0, 23.0, 2.0, 23.0]]


@pytest.fixture
def data(tmp_path: Path) -> DetectionData:
    """One image with two objects and a crowd, and one with nothing."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    for name in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    boxes = np.array([[2, 3, 12, 23], [0, 0, 60, 40], [5, 5, 9, 9]], np.float32)
    objects = Annotations(
        boxes,
        np.array([1, 2, 2]),
        np.array([200, 2400, 16], np.float32),
        np.array([False, True, False]),
        [SQUARE, {"size": [40, 60], "counts": [0, 2400]}, SQUARE],
    )
    return DetectionData(
        tmp_path / "train.json",
        [Category(1, "cat"), Category(2, "dog")],
        [ImageRecord(n, tmp_path / f"{n}.png", f"{n}.png", 60, 40) for n in ("a", "b")],
        [objects, objects.keep(np.zeros(3, bool))],
    )


def test_sample_is_what_torchvision_expects(data: DetectionData) -> None:
    pixels, target = DetectionDataset(data, masks=True)[0]
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(images.decode(data.images[0].path)))
    assert set(target) == {"boxes", "labels", "image_id", "area", "iscrowd", "masks"}
    assert target["boxes"].tolist() == [[2, 3, 12, 23], [5, 5, 9, 9]]  # the crowd is no target
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 2]
    assert target["labels"].dtype == torch.int64
    assert target["area"].tolist() == [200, 16]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["image_id"] == 1
    expected = masks_of(data.annotations[0], 40, 60)[[0, 2]]
    assert torch.equal(target["masks"], torch.from_numpy(expected))
    assert target["masks"][0].sum() == 200


def test_image_without_objects(data: DetectionData) -> None:
    _, target = DetectionDataset(data, masks=False)[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert "masks" not in target
    assert DetectionDataset(data, masks=True)[1][1]["masks"].shape == (0, 40, 60)


def test_indices(data: DetectionData) -> None:
    chosen = DetectionDataset(data, indices=[1, 0, 1])
    assert len(chosen) == 3
    assert [chosen[i][1]["image_id"] for i in range(3)] == [2, 1, 2]
    assert len(DetectionDataset(data)) == 2


def test_a_torchvision_detector_trains_on_it(data: DetectionData) -> None:
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, box_detections_per_img=5
    )
    samples = DetectionDataset(data, masks=True)
    pixels, targets = zip(*(samples[i] for i in range(2)), strict=True)
    losses = model([p / 255 for p in pixels], list(targets))
    assert {"loss_classifier", "loss_box_reg", "loss_mask"} <= set(losses)
    assert all(torch.isfinite(v) for v in losses.values())


def test_bad_images_raise_image_errors(data: DetectionData, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"a\.png: empty file"):
        DetectionDataset(data)[0]
    Image.new("RGB", (40, 60)).save(tmp_path / "b.png")
    with pytest.raises(ImageError, match=r"b\.png: is 40 x 60 \(upright\), but train\.json says 60 x 40; its boxes"):
        DetectionDataset(data)[1]


def test_masks_that_are_missing_or_broken(data: DetectionData) -> None:
    data.annotations[0].segmentations[2] = {"size": [40, 60], "counts": [7]}
    with pytest.raises(DataError, match=r"train\.json: image a\.png: object 1: the segmentation can't be decoded"):
        DetectionDataset(data, masks=True)[0]
    data.annotations[0].segmentations[2] = None
    with pytest.raises(DataError, match=r"train\.json: has objects without a mask"):
        DetectionDataset(data, masks=True)
    assert len(DetectionDataset(data, masks=False)[0][1]["boxes"]) == 2
