"""Boxes of what stands out in a backbone's features, for any torchvision or timm backbone with weights from anywhere.

JoinDet begins with such boxes; SoCo, ADePT and AlignDet name them as what could take Selective Search's place. The
image goes through the frozen backbone, the normalised cut parts the cells of its map (:mod:`headstart.proposals.ncut`),
and each connected part of the foreground is a box. Then the foreground is taken away and the rest is cut again, as in
MaskCut (Wang et al., "Cut and Learn for Unsupervised Object Detection and Instance Segmentation", CVPR 2023), except
that it masks features of one part and cuts the whole graph, and here all parts leave the graph.

This is the one engine that needs torch, which is imported when it is made.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from headstart.detectors import backbones
from headstart.detectors.checkpoints import to_backbone
from headstart.detectors.weights import load_state, read_state
from headstart.errors import RunError, SettingsError, WeightsError
from headstart.proposals import ProposalSettings, ncut
from headstart.runs import DETECTOR_FILE, read_detector_record

RANDOM, IMAGENET = "random", "imagenet"
BACKBONE = "resnet50"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the detectors' own

# Cells round the image that are its mirror image, cut off again from the map: next to the zeros that convolutions pad
# with, the frame of a photo would stand out more than any object.
MARGIN = 2


class Attention:
    """``version`` names the weights by a hash of them: the same ones elsewhere give the same boxes."""

    name = "attention"

    def __init__(self, settings: ProposalSettings) -> None:
        """
        Raises:
            SettingsError: no weights are named, or the backbone is not known.
            RunError: a run folder that is none, or has not finished.
            WeightsError: the weights can't be read, or leave a part of the backbone random.
        """
        weights = settings.features_weights
        if weights is None:
            raise SettingsError(
                "engine=attention needs a trained backbone. Name its weights with --weights: a run folder, a weights "
                f"file, or {IMAGENET} ({RANDOM}: random weights on purpose)"
            )
        self.settings = settings
        self.backbone = settings.features_backbone or _backbone_of(weights)
        stage = settings.features_stride.bit_length() - 1  # stride 32 is C5
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.body = backbones.body(self.backbone, (stage,))().eval().requires_grad_(False)
        if weights != RANDOM:
            _load(self.body, self.backbone, weights)
        self.version = f"1 {self.backbone} {state_hash(self.body.state_dict())}"

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (N, 4) float32 xyxy: round after round, best first. ``rng`` is not used."""
        boxes = [np.zeros((0, 4), np.float32)]
        for attention, above in self.cuts(image):
            cells, _ = ncut.regions(attention, above)
            height, width = attention.shape
            scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
            boxes.append((cells * scale).astype(np.float32))
        found = np.concatenate(boxes)
        _, first = np.unique(found, axis=0, return_index=True)
        return found[np.sort(first)]

    def cuts(self, image: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The eigen attention map and its foreground, (h, w) each, of every round."""
        s = self.settings
        with self._one_thread():
            features = self.features(image)
            if s.cut_centre:
                features = ncut.centred(features)
            return list(ncut.objects(features, s.cut_rounds, s.cut_tau, s.cut_eps))

    @torch.inference_mode()
    def features(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (h, w, D) float32, each cell of which sees an equal share of the image."""
        s = self.settings
        height, width = image.shape[:2]
        cells = s.features_px / max(height, width) / s.features_stride
        # Whole cells: the image is stretched by less than half of one.
        size = tuple(max(1, round(side * cells)) * s.features_stride for side in (width, height))
        shrinks = size[0] <= width and size[1] <= height
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        image = cv2.copyMakeBorder(image, *[MARGIN * s.features_stride] * 4, cv2.BORDER_REFLECT_101)
        pixels = torch.from_numpy(image).permute(2, 0, 1).float().div_(255)
        mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
        (found,) = self.body(((pixels - mean) / std)[None]).values()
        return found[0, :, MARGIN:-MARGIN, MARGIN:-MARGIN].permute(1, 2, 0).numpy()

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        """There are as many workers as cores; and sums in another order would be other boxes, if only now and then."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with self._blas.limit(limits=1, user_api="blas"):
                yield
        finally:
            torch.set_num_threads(before)

    @cached_property
    def _blas(self) -> ThreadpoolController:
        return ThreadpoolController()


def state_hash(state: Mapping[str, Tensor]) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over names, shapes and numbers."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _backbone_of(weights: str) -> str:
    path = Path(weights)
    if not path.is_dir():
        return BACKBONE
    return str(read_detector_record(path)["config"]["detector"].get("backbone", BACKBONE))


def _load(body: nn.Module, backbone: str, weights: str) -> None:
    if weights == IMAGENET:
        state, source = backbones.pretrained(backbone), IMAGENET
    else:
        path = Path(weights)
        if not path.exists():
            raise RunError(
                f"{weights}: no such run folder or weights file; expected one of these, {IMAGENET} or {RANDOM}"
            )
        file = path / DETECTOR_FILE if path.is_dir() else path
        if not file.is_file():
            raise RunError(f"{path}: has no {DETECTOR_FILE}, so it did not finish")
        source = str(file)
        state = to_backbone(read_state(file), source, body.state_dict()).state
    placed, _ = backbones.place(body, state)
    report = load_state(body, placed, source)
    random = [key for key in report.missing if not key.endswith("num_batches_tracked")]
    random += [key for key, _, _ in report.reshaped]
    if random:
        raise WeightsError(
            f"{source}: no weights that fit for {len(random)} keys of {backbone} ({', '.join(random[:3])}, ...), whose "
            "features would be random. Is it of another --backbone?"
        )
