"""Eigen attention maps on your photos: what stands out in a backbone's features, cut by cut, and the boxes of it.

    python examples/attention_maps.py PHOTOS --weights runs/x [--backbone resnet50] [--out attention.png]

A row a photo; then its map after each cut, bright where something stands out, with the boxes of the parts above the
map's mean. What was found by one cut is taken away (grey) before the next.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from headstart.datasets.image_set import ImageSet
from headstart.proposals import ProposalSettings, ncut
from headstart.proposals.attention import Attention

TILE = 2.2  # inches
BOX = "#E69F00"


def draw(photos: list[np.ndarray], engine: Attention, names: list[str]) -> Figure:
    """A row for each of ``photos`` (H, W, 3) uint8: itself, and the map of each cut."""
    rounds = engine.settings.cut_rounds
    figure = Figure((TILE * (1 + rounds), TILE * len(photos)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(photos), 1 + rounds, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, photo, name in zip(grid, photos, names, strict=True):
        height, width = photo.shape[:2]
        row[0].imshow(photo)
        row[0].set_title(name, fontsize=7)
        gone = None
        for number, (axes, (attention, above)) in enumerate(zip(row[1:], engine.cuts(photo), strict=False), 1):
            shown = np.ma.masked_array(attention, np.zeros(above.shape, bool) if gone is None else gone)
            gone = above if gone is None else gone | above
            colours = matplotlib.colormaps["viridis"].with_extremes(bad="#bbbbbb")
            axes.imshow(shown, extent=(0, width, height, 0), cmap=colours, interpolation="nearest")
            axes.set_title(f"cut {number}", fontsize=7)
            across, down = width / above.shape[1], height / above.shape[0]
            for x1, y1, x2, y2 in ncut.regions(attention, above)[0]:
                place = (x1 * across, y1 * down), (x2 - x1) * across, (y2 - y1) * down
                axes.add_patch(Rectangle(*place, fill=False, edgecolor=BOX, linewidth=1.2))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--weights", required=True, help="run folder, weights file, imagenet, or random")
    parser.add_argument("--backbone", help="default: that of the run, or resnet50")
    parser.add_argument("--stride", type=int, default=16, help="px a cell: 4, 8, 16 or 32")
    parser.add_argument("--px", type=int, default=640, help="long side the backbone sees")
    parser.add_argument("--cuts", type=int, default=3)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    options = parser.parse_args()
    settings = ProposalSettings(
        engine="attention",
        features_backbone=options.backbone,
        features_weights=options.weights,
        features_stride=options.stride,
        features_px=options.px,
        cut_rounds=options.cuts,
    )
    found = ImageSet(options.photos)
    names = [found.names[int(i)] for i in np.linspace(0, len(found) - 1, min(options.images, len(found)))]
    photos = [found.decode(name, short_side_px=options.px) for name in names]
    draw(photos, Attention(settings), [name.rpartition("/")[2] for name in names]).savefig(options.out)
    print(f"Written: {options.out}")


if __name__ == "__main__":
    main()
