"""How the boxes that a detector makes for itself change while it is pretrained (JoinDet), on some of its photos.

    python examples/priors.py RUN PHOTOS [--images 6] [--boxes 10] [--out priors.png]

A row a photo, a column a refresh of the run, the first from the frozen backbone alone. The surest boxes are drawn, the
brighter the surer; a last column has Selective Search's first boxes, for comparison.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from headstart.datasets.image_set import ImageSet
from headstart.proposals import ProposalSettings
from headstart.proposals.finder import Finder

TILE = 2.2  # inches
COLUMNS = 6  # refreshes shown, at most: the first, the last, and evenly what is between


def surest(file: Path, name: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (k, 4) xyxy px of the photo and their scores, best first, of one file of priors."""
    (row,) = pq.read_table(file, columns=["image", "boxes", "scores"], filters=[("image", "=", name)]).to_pylist()
    boxes, scores = np.array(row["boxes"] or [], float).reshape(-1, 4), np.array(row["scores"] or [], float)
    order = np.argsort(-scores, kind="stable")[:most]
    return boxes[order], scores[order]


def draw_boxes(axes: Axes, photo: np.ndarray, boxes: np.ndarray, brightness: np.ndarray) -> None:
    axes.imshow(photo)
    axes.set_axis_off()
    for (x1, y1, x2, y2), value in reversed(list(zip(boxes, brightness, strict=True))):
        line = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1.3)
        line.set_edgecolor(matplotlib.colormaps["plasma"](0.2 + 0.75 * value))
        line.set_path_effects([withStroke(linewidth=2.2, foreground="black")])
        axes.add_patch(line)


def draw(run: Path, found: ImageSet, images: int, boxes: int) -> Figure:
    """
    Raises:
        SystemExit: the run made no boxes of its own.
    """
    files = sorted((run / "priors").glob("*.parquet"))
    if not files:
        raise SystemExit(f"{run}: no priors/*.parquet; expected a run whose method makes its own boxes")
    chosen = [files[int(i)] for i in np.linspace(0, len(files) - 1, min(COLUMNS, len(files)))]
    names = [found.names[int(i)] for i in np.linspace(0, len(found) - 1, min(images, len(found)))]
    figure = Figure((TILE * (1 + len(chosen)), TILE * len(names)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(names), 1 + len(chosen), squeeze=False)
    search = Finder(ProposalSettings(aspect_max=None, size_min=0.0, size_max=1.0, top_k=boxes))
    for row, name in zip(grid, names, strict=True):
        photo = found.decode(name)
        for axes, file in zip(row, chosen, strict=False):
            draw_boxes(axes, photo, *surest(file, name, boxes))
        height, width = photo.shape[:2]
        pixels = found.decode(name, search.decode_px(width, height))
        theirs = search(pixels, width, height, name).boxes
        draw_boxes(row[-1], photo, theirs, np.full(len(theirs), 0.5))
    for axes, file in zip(grid[0], chosen, strict=False):
        axes.set_title(f"from step {int(file.stem)}", fontsize=8)
    grid[0][-1].set_title("Selective Search", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--boxes", type=int, default=10, help="drawn in a photo, at most")
    parser.add_argument("--out", type=Path, default=Path("priors.png"))
    options = parser.parse_args()
    draw(options.run, ImageSet(options.photos), options.images, options.boxes).savefig(options.out)
    print(f"Written: {options.out}")


if __name__ == "__main__":
    main()
