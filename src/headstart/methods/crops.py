"""Crops of boxes, and what a frozen backbone says of each: what DETReg, UP-DETR and JoinDet have queries describe.

On the device the images are on, a batch at a time: nothing but boxes and images leaves the data workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms.v2.functional import gaussian_blur

from headstart.detectors.detector import Detector, as_float

CROP_PX = 128  # DETReg's and UP-DETR's
TOGETHER = 256  # crops a backbone sees at a time
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
# SimCLR's colours, as both released codes set them.
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE, JITTER_PROB, GREY_PROB, BLUR_PROB, BLUR_SIGMA = 0.1, 0.8, 0.2, 0.5, (0.1, 2.0)


@torch.no_grad()
def describe(
    detector: Detector,
    images: Tensor,
    boxes: Sequence[Tensor],
    *,
    stage: int | None = None,
    px: int = CROP_PX,
    colour: float = 0.0,
) -> Tensor:
    """(M, C) float32: what ``detector``'s backbone says of each box, image by image. M may be 0.

    Args:
        images: (B, 3, H, W) uint8 or float in [0, 1].
        boxes: (k, 4) xyxy px of its image, one an image; k may be 0.
        stage: of the map (3: stride 8, ResNet's ``layer2``); None: the backbone's last.
        px: side of the squares that boxes are resized to.
        colour: strength of the colour augmentation of each crop; 0: none.
    """
    return encode(detector, recolour(cut(images, boxes, px), colour), stage)


def cut(images: Tensor, boxes: Sequence[Tensor], px: int = CROP_PX) -> Tensor:
    """(M, 3, px, px) float32 in [0, 1]: each box of (B, 3, H, W), resized to a square.

    Bilinear where it grows. Where it shrinks, each pixel is the mean of as many samples as it covers pixels, so that
    nothing aliases; this is why it is RoIAlign, and no grid of single samples.
    """
    if not sum(len(b) for b in boxes):
        return torch.zeros(0, 3, px, px, device=images.device)
    boxes = [b.to(torch.float32) for b in boxes]
    return roi_align(as_float(images).float(), boxes, px, sampling_ratio=-1, aligned=True)


@torch.no_grad()
def encode(detector: Detector, crops: Tensor, stage: int | None = None) -> Tensor:
    """(M, C) float32: the mean over a map of the backbone, of crops (M, 3, h, w) in [0, 1].

    Batch norm is used as it stands: call it with the backbone frozen, in evaluation mode.
    """
    if not len(crops):
        return torch.zeros(0, detector.stage_width(stage), device=crops.device)
    return torch.cat([detector.stage_map(some, stage).float().mean(dim=(2, 3)) for some in crops.split(TOGETHER)])


def recolour(crops: Tensor, strength: float) -> Tensor:
    """SimCLR's colour augmentation of each of (M, 3, h, w) in [0, 1], drawn from torch's own random state.

    Brightness, contrast, saturation and hue in this order, grey, blur. All but the blur are one affine map of a crop's
    colours, so that they cost one pass; values are clipped once, at the end. The hue turns round the grey axis at
    constant luma. Blurred crops of a call share one sigma. In float32 under autocast too: 8 bits of a matrix of colours
    shift all of them.

    Args:
        strength: 1: SimCLR's; scales all but the sigma of the blur and how often crops are jittered. 0: none.
    """
    if not strength or not len(crops):
        return crops
    draws = torch.rand(len(crops), 7)  # on the host, so that no device has to be waited for
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * float(torch.rand(()))
    jittered = (draws[:, 0] < JITTER_PROB).float() * strength
    factors = 1 + jittered[:, None] * (2 * draws[:, 1:4] - 1) * torch.tensor([BRIGHTNESS, CONTRAST, SATURATION])
    turns = jittered * HUE * (2 * draws[:, 4] - 1)
    factors[draws[:, 5] < GREY_PROB * strength, 2] = 0.0
    blurred = (draws[:, 6] < BLUR_PROB * strength).nonzero()[:, 0].to(crops.device)
    with torch.autocast(crops.device.type, enabled=False):
        coloured = adjust(crops, factors.to(crops.device), turns.to(crops.device))
        if len(blurred):
            radius = min(math.ceil(3 * sigma), crops.shape[-1] - 1, crops.shape[-2] - 1)  # it mirrors at the edges
            coloured[blurred] = gaussian_blur(coloured[blurred], [2 * radius + 1] * 2, [sigma] * 2)
    return coloured


def adjust(crops: Tensor, factors: Tensor, turns: Tensor) -> Tensor:
    """(M, 3, h, w) in [0, 1] -> the same, each crop with its own brightness, contrast, saturation and hue.

    Args:
        factors: (M, 3) of brightness, contrast, saturation; 1 changes nothing, 0 is black, even, grey.
        turns: (M,) the hue's, of the whole circle.
    """
    luma = crops.new_tensor(LUMA)
    brightness, contrast, saturation = factors.to(crops.dtype).unbind(dim=1)
    # x -> contrast * brightness * x + shift: towards the mean grey of the brighter crop.
    mean_grey = brightness * (crops.mean(dim=(2, 3)) @ luma)
    shift = (1 - contrast) * mean_grey
    # Then colours (saturation, hue), which leave greys, and so the shift, as they are.
    colours = _turned(turns.to(crops.dtype), saturation, luma)
    matrix = (contrast * brightness)[:, None, None] * colours
    pixels = torch.baddbmm(shift[:, None, None].expand(-1, 3, 1), matrix, crops.flatten(2))
    return pixels.clamp(0, 1).view_as(crops)


def _turned(turns: Tensor, saturation: Tensor, luma: Tensor) -> Tensor:
    """(M, 3, 3) linear maps of colours that keep luma: saturation, and a turn of the chroma plane (YIQ's).

    The plane is spanned by two colours without luma, at right angles once the differences to luma are taken as the
    coordinates of YIQ; greys stay.
    """
    to_yiq = luma.new_tensor([list(LUMA), [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    angle = 2 * math.pi * turns
    turn = torch.zeros(len(turns), 3, 3, device=luma.device, dtype=luma.dtype)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 1, 2] = saturation * angle.sin()
    turn[:, 2, 1] = -saturation * angle.sin()
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq
