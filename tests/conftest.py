"""Small things that many tests need: generated photos, a tiny detector, one thread a process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)

TINY = {
    "backbone": "resnet18",
    "fpn_channels": 8,
    "head_width": 16,
    "short_side_px": 64,
    "long_side_px": 96,
    "anchor_px": [8, 16, 32, 64, 96],
    "rois_train": 16,
    "proposals_train": 32,
    "proposals_test": 16,
}


@pytest.fixture(scope="session")
def tiny() -> dict:
    """Detector settings that build and run in a moment."""
    return dict(TINY)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated data set: unlabelled/, train.json, val.json."""
    from headstart.datasets.scenes import make_scenes

    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, unlabelled=12, train=8, val=4, size_px=64, seed=0, progress=False)
    return folder


@pytest.fixture
def photo() -> np.ndarray:
    """(60, 80, 3) uint8 with structure at several scales."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60), Image.BICUBIC)
    noise = rng.integers(-12, 13, (60, 80, 3))
    return np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8)
