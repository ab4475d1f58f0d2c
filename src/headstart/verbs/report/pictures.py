"""Photos with boxes: the photo once as a small JPEG, the boxes as SVG on top, sharp at any size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from headstart.datasets.images import decode
from headstart.datasets.shards import Member

THUMBNAIL_PX = 256
JPEG_QUALITY = 80
TEXT_PX = 10.0  # of labels, in units; report.css draws them at this size
FLAG_PX = 9.0  # side of the filled corner of a false detection, in units
CLASS_COLORS = ("#56b4e9", "#e69f00", "#2fd3a2", "#f0e442", "#ff7f50", "#f2a7d6", "#7b9cff", "#ffffff")
CLASS_DASHES = ("", "6 3", "2 2", "8 2 2 2")
LABELS_UP_TO = 10  # boxes; in a fuller picture labels would hide the objects, they come back when it is enlarged


@dataclass(frozen=True)
class Thumbnail:
    """A photo stored once in the page, shown wherever ``<use href="#key">`` stands.

    It is drawn ``THUMBNAIL_PX`` units long whatever pixels it has, so that labels look alike on all photos.
    """

    key: str
    uri: str
    width: float  # units, as all that is drawn on it
    height: float
    scale: float  # units a pixel of the original


@dataclass(frozen=True)
class Told:
    """What is said of a box besides its class: what a filter goes by, and what is seen without colours.

    Attributes:
        label: class, 1..C.
        kinds: what the box is, a word, or several with blanks between.
        code: stands after its label; all that does in a crowded picture.
        form: "flagged" has a corner filled, "dotted" is a row of dots.
    """

    label: int
    kinds: str
    code: str = ""
    form: Literal["plain", "flagged", "dotted"] = "plain"


@dataclass(frozen=True)
class Mark:
    """A box in the units of its thumbnail, as the template draws it."""

    x: float
    y: float
    width: float
    height: float
    color: str
    dashes: str
    label: str
    text_x: float
    text_y: float
    told: Told | None = None

    @property
    def outline(self) -> str:
        return f"M{self.x:g} {self.y:g}h{self.width:g}v{self.height:g}h-{self.width:g}z"

    @property
    def flag(self) -> str:
        side = min(FLAG_PX, self.width, self.height)
        return f"M{self.x:g} {self.y:g}h{side:g}l-{side:g} {side:g}z"


@dataclass(frozen=True)
class Picture:
    thumbnail: Thumbnail
    marks: tuple[Mark, ...]
    caption: str
    alt: str
    crowded: bool
    dots: str = ""  # the path of points drawn on it


def thumbnail(path: Path | Member, key: str, width: int) -> Thumbnail:
    """Args: width: of the original, px, upright.

    Raises:
        ImageError: the image can't be read.
    """
    pixels = decode(path, short_side_px=THUMBNAIL_PX)
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    units = THUMBNAIL_PX / max(image.size)
    drawn_width, drawn_height = round(units * image.width, 2), round(units * image.height, 2)
    return Thumbnail(key, uri, drawn_width, drawn_height, drawn_width / width)


def class_style(label: int) -> tuple[str, str]:
    """Colour and dashes of class ``label`` (1 is the first); a colour comes again only with other dashes."""
    index = label - 1
    return CLASS_COLORS[index % len(CLASS_COLORS)], CLASS_DASHES[index // len(CLASS_COLORS) % len(CLASS_DASHES)]


def marks(
    thumb: Thumbnail,
    boxes: np.ndarray,
    styles: Sequence[tuple[str, str]],
    labels: Sequence[str],
    told: Sequence[Told] | None = None,
) -> tuple[Mark, ...]:
    """``boxes`` (n, 4) xyxy in pixels of the original."""
    drawn: list[Mark] = []
    said: Sequence[Told | None] = told or [None] * len(boxes)
    for (x1, y1, x2, y2), (color, dashes), label, of in zip(boxes * thumb.scale, styles, labels, said, strict=True):
        text_x, text_y = _label_place((x1, y1, x2, y2), _text(label, of), thumb, drawn)
        drawn.append(
            Mark(
                x=round(float(x1), 1),
                y=round(float(y1), 1),
                width=round(float(max(x2 - x1, 0.5)), 1),
                height=round(float(max(y2 - y1, 0.5)), 1),
                color=color,
                dashes=dashes,
                label=label,
                text_x=round(text_x, 1),
                text_y=round(text_y, 1),
                told=of,
            )
        )
    return tuple(drawn)


def _label_place(
    box: tuple[float, float, float, float], label: str, thumb: Thumbnail, placed: Sequence[Mark]
) -> tuple[float, float]:
    """Left end and baseline of a label: inside the picture, near its box, off other labels if possible."""
    x1, y1, x2, y2 = (float(v) for v in box)
    longest = max(1.0, thumb.width - _text_width(label) - 2)
    candidates = [
        (min(max(x, 1.0), longest), y)
        for y in (y1 - 2.5, y2 + TEXT_PX, y1 + TEXT_PX, y2 - 3.5)
        for x in (x1, x2 - _text_width(label))
        if TEXT_PX <= y <= thumb.height - 2
    ]
    free = [c for c in candidates if not any(_text(m.label, m.told) and _touch(c, label, m) for m in placed)]
    return (free or candidates or [(min(max(x1, 1.0), longest), TEXT_PX)])[0]


def _touch(place: tuple[float, float], label: str, other: Mark) -> bool:
    (x, y), width = place, _text_width(label)
    beside = x + width < other.text_x or other.text_x + _text_width(_text(other.label, other.told)) < x
    return not beside and abs(y - other.text_y) < TEXT_PX


def _text(label: str, told: Told | None) -> str:
    return f"{label} {told.code}".strip() if told else label


def _text_width(label: str) -> float:
    """A rough guess, in units: the page's font is not known here."""
    return 0.62 * TEXT_PX * len(label)


def evenly_spaced(total: int, count: int) -> list[int]:
    """``count`` of ``total`` places, spread evenly and not picked by what they show."""
    if total <= count:
        return list(range(total))
    return sorted({int((i + 0.5) * total / count) for i in range(count)})


def dots(thumb: Thumbnail, centres: np.ndarray) -> str:
    """The path of points (n, 2) in pixels of the original, for a round pen."""
    inside = np.clip(centres * thumb.scale, 0, (thumb.width, thumb.height))
    return "".join(f"M{x:.4g} {y:.4g}h0" for x, y in inside)
