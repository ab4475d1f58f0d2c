"""A file of proposals as one picture: boxes on some of its images, and the two histograms of SoCo's Figure 3."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from headstart import boxes as box_ops
from headstart.datasets.image_set import ImageSet
from headstart.errors import DataError, ImageError, SettingsError
from headstart.files import replacing
from headstart.proposals import READ_BY, ProposalSettings
from headstart.proposals.store import metadata_of, readable

# Okabe and Ito's bright colours, which readers with any common colour blindness can tell apart. Black beside every
# line keeps them readable on light photos.
COLOURS = ("#F0E442", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#FFFFFF", "#D55E00")
INK, MUTED, BAR = "#222222", "#666666", "#0072B2"
EMPTY = 230  # grey in the place of a photo that can't be read
STYLE = {"text.parse_math": False, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8}

DPI = 150
WIDTH, MARGIN, GAP = 1800, 40, 16  # all lengths in px
COLUMNS = 6
PHOTO_HEIGHT, CAPTION_HEIGHT, LINE_HEIGHT = 230, 52, 24
HISTOGRAM_HEIGHT = 420
MAX_BINS = 40
SHOWN_SHARE = 0.995  # of what a histogram counts; a few very large values would squeeze all others together
FALLBACK_WORDS = {"ratio": "aspect rule only", "any_box": "no filter"}


def preview(
    proposals: Path | str,
    images: Path | str,
    out: Path | str | None = None,
    *,
    count: int = 24,
    boxes: int = 6,
    seed: int = 0,
) -> Path:
    """Draw proposals on a sample of the images, with histograms over all: proposals an image, and their size.

    The sample is spread over the whole set: one random image from each of ``count`` equal parts of it, in its order.

    Args:
        proposals: file that ``headstart propose`` wrote; read a piece at a time, however large.
        images: the folder or tar shard it was made from.
        out: PNG file; default: beside ``proposals``, with the suffix .png.
        count: images shown.
        boxes: boxes drawn in an image, at most: a random choice of all it has, as in SoCo's Figure 2.
        seed: of both choices.

    Returns:
        The PNG file.

    Raises:
        DataError: no such file, a damaged one, or one of images of which none can be read.
        SettingsError: ``out`` is no PNG, or a number is below 1.
        RunError: ``out`` can't be written.
    """
    proposals = Path(proposals)
    out = proposals.with_suffix(".png") if out is None else Path(out)
    if out.suffix.lower() != ".png":
        raise SettingsError(f"{out}: the preview is a PNG picture; expected a name that ends in .png")
    if min(count, boxes) < 1:
        raise SettingsError(f"preview: count={count} and boxes={boxes} must be at least 1")
    rng = np.random.default_rng(seed)
    facts = _facts(proposals)
    found = ImageSet(images)
    tiles = [_tile(found, row, boxes, rng) for row in _sample(facts, min(count, facts.images), rng)]
    if all(tile.picture is None for tile in tiles):
        raise DataError(
            f"{images}: none of {len(tiles)} images of {proposals} can be read, for example {tiles[0].name}: "
            f"{tiles[0].trouble}. Expected the folder that these proposals were made from."
        )
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Names in scripts that the font lacks are drawn as empty boxes; the picture is still worth having.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = _draw(facts, tiles, boxes)
        with replacing(out) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return out


@dataclass
class _Facts:
    """What one pass over the file tells."""

    path: Path
    metadata: dict[str, Any]
    usable: np.ndarray  # (row groups,) images that have boxes
    failures: int
    fallbacks: int
    per_image: np.ndarray  # [k] images with k proposals
    sizes: np.ndarray  # [s] proposals with s <= sqrt(w*h) < s + 1, px

    @property
    def images(self) -> int:
        return int(self.usable.sum())

    @property
    def proposals(self) -> int:
        return int(self.sizes.sum())


@dataclass
class _Tile:
    """An image of the sample. ``boxes`` are in px of ``picture``, (H, W, 3) uint8."""

    name: str
    picture: np.ndarray | None
    boxes: np.ndarray
    found: int
    fallback: str
    trouble: str = ""

    @property
    def height(self) -> int:
        return PHOTO_HEIGHT // 2 if self.picture is None else len(self.picture)

    @property
    def caption(self) -> str:
        if self.picture is None:
            return "can't be read"
        if self.fallback == "whole_image":
            return "no box: the whole image"
        number = f"{self.found} box{'es' * (self.found != 1)}"
        if len(self.boxes) < self.found:
            number = f"{len(self.boxes)} of {number}"
        return f"{number} ({FALLBACK_WORDS[self.fallback]})" if self.fallback else number


def _facts(path: Path) -> _Facts:
    per_image, sizes = np.zeros(1, np.int64), np.zeros(1, np.int64)
    usable, failures, fallbacks = [], 0, 0
    with readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        metadata = metadata_of(path, file.schema_arrow)
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, ["boxes", "fallback", "error"])
            good = rows.filter(rows["error"].is_null())
            usable.append(len(good))
            failures += len(rows) - len(good)
            fallbacks += len(good) - pc.sum(pc.equal(good["fallback"], "")).as_py() if len(good) else 0
            per_image = _add(per_image, pc.list_value_length(good["boxes"]).to_numpy())
            found = pc.list_flatten(pc.list_flatten(good["boxes"])).to_numpy().reshape(-1, 4)
            sizes = _add(sizes, box_ops.size(found).astype(np.int64))
    if not sum(usable):
        raise DataError(f"{path}: none of its {failures} images could be used; there is nothing to show")
    return _Facts(path, metadata, np.array(usable), failures, fallbacks, per_image, sizes)


def _add(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``counts[v]`` and one more for each v of ``values``."""
    new = np.bincount(values, minlength=len(counts))
    new[: len(counts)] += counts
    return new


def _sample(facts: _Facts, count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Rows of ``count`` images; only the row groups that hold one are read."""
    edges = np.linspace(0, facts.images, count + 1).astype(np.int64)
    chosen = rng.integers(edges[:-1], edges[1:])
    first = np.concatenate([[0], facts.usable.cumsum()])
    with readable(facts.path), pq.ParquetFile(facts.path) as file:
        for group in np.unique(np.searchsorted(first, chosen, "right") - 1):
            rows = file.read_row_group(int(group))
            rows = rows.filter(rows["error"].is_null())
            inside = chosen[(chosen >= first[group]) & (chosen < first[group + 1])] - first[group]
            yield from rows.take(pa.array(inside)).to_pylist()


def _tile(images: ImageSet, row: dict[str, Any], most: int, rng: np.random.Generator) -> _Tile:
    found = np.array(row["boxes"], np.float32).reshape(-1, 4)
    drawn = found[np.sort(rng.permutation(len(found))[:most])]
    width, height = row["width"], row["height"]
    scale = min((_tile_width() / width), PHOTO_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    try:
        picture = images.decode(row["image"], short_side_px=min(size))
    except ImageError as error:
        return _Tile(row["image"], None, drawn[:0], len(found), row["fallback"], str(error))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    drawn = box_ops.resize(drawn, size[0] / width, size[1] / height)
    drawn = drawn[np.argsort(-box_ops.area(drawn), kind="stable")]  # small boxes come out on top
    return _Tile(row["image"], picture, drawn, len(found), row["fallback"])


def _tile_width() -> int:
    return (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) // COLUMNS


# The picture. Everything is placed in px from the top left corner.


def _draw(facts: _Facts, tiles: list[_Tile], boxes: int) -> Figure:
    title = _title(facts, boxes)
    rows = [tiles[first : first + COLUMNS] for first in range(0, len(tiles), COLUMNS)]
    top = MARGIN + LINE_HEIGHT * (len(title) + 1)
    captions = top + np.cumsum([max(tile.height for tile in row) + CAPTION_HEIGHT + GAP for row in rows])
    captions -= CAPTION_HEIGHT + GAP  # where each row's photos end
    bottom = captions[-1] + CAPTION_HEIGHT + GAP
    height = bottom + HISTOGRAM_HEIGHT + MARGIN
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    for number, line in enumerate(title):
        look = {"size": 12, "weight": "bold", "color": INK} if number == 0 else {"size": 7.5, "color": MUTED}
        y = MARGIN + LINE_HEIGHT * number + (8 if number else 0)
        figure.text(MARGIN / WIDTH, 1 - y / height, line, va="center", **look)
    for row, below in zip(rows, captions, strict=True):
        for column, tile in enumerate(row):
            _draw_tile(figure, tile, MARGIN + column * (_tile_width() + GAP), int(below))

    half = WIDTH // 2
    inner = {"top": bottom + 80, "height": HISTOGRAM_HEIGHT - 140, "width": half - MARGIN - 130}
    _histogram(
        _axes(figure, left=MARGIN + 90, **inner),
        facts.per_image,
        offset=0.5,  # whole numbers: each bar stands around its own
        title="Proposals an image",
        x="proposals in an image",
        y="images",
    )
    _histogram(
        _axes(figure, left=half + 90, **inner),
        facts.sizes,
        offset=0.0,
        title="Size of the proposals",
        x="√(width · height) of a proposal, px of the original image",
        y="proposals",
    )
    return figure


def _title(facts: _Facts, boxes: int) -> list[str]:
    meta = facts.metadata
    counts = f"{facts.images:,} images, {facts.proposals:,} proposals"
    notes = f"{facts.fallbacks / facts.images:.1%} of the images needed a fallback of the filter"
    if facts.failures:
        notes += f"; {facts.failures:,} could not be read"
    notes += f"; at most {boxes} boxes an image are drawn, chosen at random"
    off = {name for name, field in ProposalSettings.model_fields.items() if field.default is None}
    engine = meta["settings"].get("engine")
    settings = {
        k: v
        for k, v in meta["settings"].items()
        if (v is not None or k not in off) and (k not in READ_BY or engine in READ_BY[k])
    }
    for elsewhere in ("engine", "max_unreadable"):  # in the title already; no matter of the boxes
        settings.pop(elsewhere, None)
    made = f"{meta['engine']} {meta['engine_version']}: " + ", ".join(f"{k}={_short(v)}" for k, v in settings.items())
    return [f"{facts.path.name}: {counts}", notes, *textwrap.wrap(made, 210)]


def _short(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    total = figure.get_figheight() * DPI
    return figure.add_axes((left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))


def _draw_tile(figure: Figure, tile: _Tile, left: int, below: int) -> None:
    """A photo that ends at ``below``, centred above its name and its number of boxes."""
    picture = tile.picture
    if picture is None:
        picture = np.full((tile.height, _tile_width(), 3), EMPTY, np.uint8)
    height, width = picture.shape[:2]
    # On whole pixels, so that the photo is not resampled once more.
    axes = _axes(figure, left + (_tile_width() - width) // 2, below - height, width, height)
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for number, (x1, y1, x2, y2) in enumerate(tile.boxes):
        line = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1.3, joinstyle="miter")
        line.set_edgecolor(COLOURS[number % len(COLOURS)])
        line.set_path_effects([withStroke(linewidth=2.3, foreground="black")])
        axes.add_patch(line)
    total = figure.get_figheight() * DPI
    for text, place, colour in ((tile.name, below + 15, INK), (tile.caption, below + 36, MUTED)):
        centre = (left + _tile_width() / 2) / WIDTH
        _shorten(figure.text(centre, 1 - place / total, text, size=6.5, color=colour, ha="center", va="center"), figure)


def _shorten(text: Text, figure: Figure) -> None:
    """Leave out the beginning of a path that is wider than its image: its end tells images apart."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    name = text.get_text()
    while text.get_window_extent(renderer).width > _tile_width():
        name = name[1:]
        text.set_text("…" + name)


def _histogram(axes: Axes, counts: np.ndarray, offset: float, title: str, x: str, y: str) -> None:
    """``counts[v]``: how often the value v was met. Bins are a round number of values wide."""
    total = counts.sum()
    cumulated = counts.cumsum()
    largest, median = len(counts) - 1, int(np.searchsorted(cumulated, total / 2))
    last = int(np.searchsorted(cumulated, SHOWN_SHARE * total))
    last = largest if largest <= 1.25 * last else last
    first = int(np.flatnonzero(counts)[0])
    if first < last / 4 or last - first < 5:  # from 0, but for a range that lies far from it
        first = 0
    step = _step((last + 1 - first) / MAX_BINS)
    start = first // step * step
    bins = -(-(last + 1 - start) // step)
    shown = np.zeros(bins * step, np.int64)
    part = counts[start : start + bins * step]
    shown[: len(part)] = part
    left = start + step * np.arange(bins) - (offset if step == 1 else 0)
    axes.bar(
        left, shown.reshape(bins, step).sum(axis=1), step, align="edge", color=BAR, edgecolor="white", linewidth=0.5
    )
    axes.axvline(median + 0.5 - offset, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    axes.set_xlim(left[0], left[0] + bins * step)

    mean = ((np.arange(len(counts)) + 0.5 - offset) * counts).sum() / total
    words = f"median {median:,} (dashed), mean {mean:,.1f}, largest {largest:,}"
    beyond = total - shown.sum()
    if beyond:
        words += f"; not shown: {beyond / total:.2%} above {start + bins * step - 1:,}"
    axes.set_title(title, loc="left", size=10, weight="bold", color=INK, pad=22)
    axes.text(0, 1.03, words, transform=axes.transAxes, size=7.5, color=MUTED)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is not below ``least``."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= least:
                return factor * power
        power *= 10
