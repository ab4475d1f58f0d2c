"""Figures as inline SVG. Text stays text, colours become CSS variables: one figure for light, dark and print.

Colours are Okabe and Ito's, which readers with any common colour blindness can tell apart; every line has a
marker and a dash pattern of its own besides.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from headstart.files import replacing

# matplotlib wants real colours, the page wants variables: these stand-ins are replaced in the finished SVG.
N_SERIES = 7
SERIES = [f"#0a0b{i:02x}" for i in range(1, N_SERIES + 1)]
INK, MUTED, GRID, PAPER = "#0a0c01", "#0a0c02", "#0a0c03", "#0a0c04"
VARIABLES = {color: f"var(--s{i})" for i, color in enumerate(SERIES)} | {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
}
# The page's light colours, for pictures that stand alone.
PRINTED = dict(zip(SERIES, ("#5d6874", "#0072b2", "#d55e00", "#00875f", "#b0508f", "#a87700", "#3b8fd1"), strict=True))
PRINTED |= {INK: "#1b2025", MUTED: "#59636e", GRID: "#e3e6ea", PAPER: "#ffffff"}
MARKERS = "osD^vPX"
DASHES: list[str | tuple[float, tuple[float, ...]]] = [
    "solid",
    (0, (4, 1.8)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (1.2, 1.4)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2, 2)),
]
# The same markers for legends in HTML, around (17, 6).
MARKER_PATHS = {
    "o": "M13 6a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "s": "M13.4 2.4h7.2v7.2h-7.2z",
    "D": "M17 1.2l4.8 4.8l-4.8 4.8l-4.8 -4.8z",
    "^": "M17 1.4l4.8 8.6h-9.6z",
    "v": "M17 10.6l4.8 -8.6h-9.6z",
    "P": "M15.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "X": "M14 1l3 3l3 -3l2 2l-3 3l3 3l-2 2l-3 -3l-3 3l-2 -2l3 -3l-3 -3z",
}
POINTS = 300  # a line has at most this many; more would not be seen and make the file large

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class or a run may be called "$x$"
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and dashes of one way of starting; the same in every figure and table."""

    index: int
    dash: int = 0  # 0 is a solid line

    @property
    def color(self) -> str:
        return SERIES[self.index % N_SERIES]

    @property
    def css(self) -> str:
        return VARIABLES[self.color]

    @property
    def marker(self) -> str:
        # Past seven series colours come round again, each then with another marker.
        return MARKERS[(self.index + self.index // N_SERIES) % len(MARKERS)]

    @property
    def dashes(self) -> str | tuple[float, tuple[float, ...]]:
        return DASHES[self.dash % len(DASHES)]

    @property
    def dasharray(self) -> str:
        return "" if isinstance(self.dashes, str) else " ".join(f"{1.6 * length:g}" for length in self.dashes[1])

    @property
    def marker_path(self) -> str:
        return MARKER_PATHS[self.marker]


@dataclass(frozen=True)
class Series:
    """One line: ``values[x]`` holds what the seeds gave at x."""

    label: str
    look: Look
    values: dict[float, list[float]]


@contextmanager
def _figure(width: float = 4.4, height: float = 2.9) -> Iterator[tuple[Figure, Axes]]:
    """Inches of 72 units. The page shows a figure at most 1.4 times that wide, so text keeps its size."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """Inline SVG: no document header, ids of its own, scales with the page, text for screen readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    body = text[text.index(">") + 1 :]
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, variable)
    body = re.sub(r"'DejaVu Sans'(, sans-serif)?", "inherit", body)
    body = re.sub(r"font: ([^;\"]*?)([\d.]+)px inherit", r"\1font-size: \2px", body)
    body = re.sub(r"(\d+\.\d\d)\d+", r"\1", body)  # a hundredth of a pixel is enough
    label = _attribute(alt)
    return f'<svg class="figure" viewBox="{view.group(1)}" role="img" aria-label="{label}">\n{body.strip()}'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def ap_against_labels(series: Sequence[Series], name: str, alt: str, metric: str = "AP") -> str:
    """AP in % against the number of labelled images: mean as a line, seeds as dots, their range as a bar."""
    budgets = sorted({x for s in series for x in s.values})
    with _figure(5.6, 3.4) as (figure, axes):
        # At one budget the seeds of different lines would cover each other: each line stands a little aside.
        offsets = np.linspace(-1, 1, len(series)) * min(0.02 * len(series), 0.06) if len(series) > 1 else [0.0]
        for one, offset in zip(series, offsets, strict=True):
            x = np.array(sorted(one.values)) * np.exp(offset)
            values = [100 * np.array(one.values[b]) for b in sorted(one.values)]
            means = np.array([v.mean() for v in values])
            low, high = np.array([v.min() for v in values]), np.array([v.max() for v in values])
            look = one.look
            axes.vlines(x, low, high, color=look.color, linewidth=4, alpha=0.3)
            axes.plot(x, means, color=look.color, linestyle=look.dashes, marker=look.marker, markersize=7,
                      markeredgecolor=PAPER)  # fmt: skip
            for at, seeds in zip(x, values, strict=True):
                axes.plot([at] * len(seeds), seeds, look.marker, color=look.color, markersize=3, alpha=0.75)
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{b:g}" for b in budgets])
        axes.minorticks_off()
        axes.margins(x=0.08)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("labelled images")
        axes.set_ylabel(f"{metric}, %")
        return to_svg(figure, name, alt)


@dataclass(frozen=True)
class BandLine:
    """One line with its band: (points,) each, in the axes' units; NaN in ``low`` and ``high`` where there is none."""

    label: str
    look: Look
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def ap_bands(lines: Sequence[BandLine], name: str, alt: str) -> str:
    """AP in % against the number of labelled images, with bands."""
    with _figure(5.6, 3.4) as (figure, axes):
        _draw_bands(axes, lines, {})
        return to_svg(figure, name, alt)


def save_ap_bands(lines: Sequence[BandLine], path: Path) -> None:
    """The same as a picture that stands alone, with a legend: PNG or SVG, as ``path`` ends."""
    style = {k: PRINTED.get(v, v) if isinstance(v, str) else v for k, v in STYLE.items()}
    with matplotlib.rc_context({**style, "svg.hashsalt": path.name}), replacing(path) as temporary:
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        _draw_bands(axes, lines, PRINTED)
        axes.legend(handlelength=2.6)
        kind = path.suffix[1:]
        plain = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        figure.savefig(temporary, format=kind, dpi=150, facecolor=PRINTED[PAPER], metadata=plain)


def _draw_bands(axes: Axes, lines: Sequence[BandLine], paint: Mapping[str, str]) -> None:
    for line in lines:
        look, color = line.look, paint.get(line.look.color, line.look.color)
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
        if len(line.x) == 1:  # a band of one point has no width
            axes.vlines(line.x, line.low, line.high, color=color, linewidth=4, alpha=0.3)
        axes.plot(line.x, line.mean, color=color, linestyle=look.dashes, marker=look.marker, markersize=6.5,
                  markeredgecolor=paint.get(PAPER, PAPER), label=line.label)  # fmt: skip
    budgets = sorted({float(x) for line in lines for x in line.x})
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{b:g}" for b in budgets])
    axes.minorticks_off()
    axes.margins(x=0.06)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("labelled images")
    axes.set_ylabel("AP, %")


def seeds_strip(series: Sequence[Series], paired: Sequence[dict[int, float]], name: str, alt: str) -> str:
    """One label budget: a row a way of starting, a mark a seed, a tick at the mean, lines join seeds."""
    n = len(series)
    with _figure(5.6, 0.7 + 0.5 * n) as (figure, axes):
        for seed in sorted({seed for values in paired for seed in values}):
            rows = [(100 * values[seed], row) for row, values in enumerate(paired) if seed in values]
            axes.plot([x for x, _ in rows], [-row for _, row in rows], color=MUTED, linewidth=0.7, alpha=0.6)
        for row, one in enumerate(series):
            values = 100 * np.array([v for seeds in one.values.values() for v in seeds])
            look = one.look
            axes.hlines(-row, values.min(), values.max(), color=look.color, linewidth=7, alpha=0.25)
            axes.plot(values, [-row] * len(values), look.marker, color=look.color, markersize=6.5,
                      markeredgecolor=PAPER)  # fmt: skip
            axes.vlines(values.mean(), -row - 0.22, -row + 0.22, color=look.color, linewidth=2.4)
        axes.set_ylim(-n + 0.45, 0.55)
        axes.set_yticks([-row for row in range(n)], [one.label for one in series])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
        axes.set_xlabel("AP, %")
        return to_svg(figure, name, alt)


def error_bars(series: Sequence[Series], types: Sequence[str], name: str, alt: str) -> str:
    """A block of bars a type of error, one bar a way of starting; ``values[k]`` are the gains of type k, in 0..1."""
    n, step = len(series), 1.0 / (len(series) + 0.8)
    with _figure(5.6, 0.75 + len(types) * (0.24 + 0.17 * n)) as (figure, axes):
        for row, one in enumerate(series):
            look = one.look
            for k, values in one.values.items():
                if not values:
                    continue
                points, at = 100 * np.array(values), k + (row - (n - 1) / 2) * step
                axes.barh(at, points.mean(), height=0.82 * step, color=look.color, alpha=0.55, linewidth=0)
                axes.hlines(at, points.min(), points.max(), color=INK, linewidth=1.0)
                # The marker tells the bars apart without colours; the number stands clear of the range.
                axes.plot(points.mean(), at, look.marker, color=look.color, markersize=5.5, markeredgecolor=PAPER)
                axes.annotate(f"{points.mean():.1f}", (max(points.max(), points.mean()), at), (7, 0),
                              textcoords="offset points", va="center", fontsize=7.5, color=MUTED)  # fmt: skip
        axes.set_ylim(len(types) - 0.45, -0.55)
        axes.set_yticks(range(len(types)), types)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
        axes.set_xlabel("points of AP50")
        return to_svg(figure, name, alt)


@dataclass(frozen=True)
class Curve:
    """Values logged at steps, one row a run: ``values`` is (runs, steps), NaN where a run has none."""

    label: str
    look: Look
    steps: np.ndarray
    values: np.ndarray


def curves(
    lines: Sequence[Curve],
    name: str,
    alt: str,
    *,
    title: str,
    ylabel: str,
    legend: bool = False,
    zero: bool = False,
) -> str:
    """Means over runs, and the band from the lowest to the highest run where there is more than one."""
    with _figure() as (figure, axes):
        for line in lines:
            steps, mean, low, high = smooth_band(line.steps, line.values)
            look = line.look
            if len(line.values) > 1:
                axes.fill_between(steps, low, high, color=look.color, alpha=0.18, linewidth=0)
            single = {"marker": look.marker, "markersize": 5} if len(steps) == 1 else {}
            axes.plot(steps, mean, color=look.color, linestyle=look.dashes, label=line.label, **single)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
        if zero:
            axes.set_ylim(bottom=0)
        if legend:
            axes.legend(handlelength=2.6)
        return to_svg(figure, name, alt)


def level_shares(steps: np.ndarray, shares: np.ndarray, labels: Sequence[str], name: str, alt: str) -> str:
    """Share of boxes by pyramid level, stacked; ``shares`` is (steps, levels)."""
    with _figure() as (figure, axes):
        keep = _thin(len(steps))
        patterns = ["", "///", "...", "xxx", "\\\\\\", "++", "oo"]
        areas = axes.stackplot(
            steps[keep],
            100 * shares[keep].T,
            colors=[SERIES[i % N_SERIES] for i in range(len(labels))],
            alpha=0.55,
        )
        for i, (area, label) in enumerate(zip(areas, labels, strict=True)):
            area.set_edgecolor(PAPER)
            area.set_hatch(patterns[i % len(patterns)])
            area.set_label(label)
        axes.set_title("Boxes by pyramid level")
        axes.set_xlabel("step")
        axes.set_ylabel("share of boxes, %")
        axes.set_ylim(0, 100)
        axes.margins(x=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(labels),
                      handlelength=1.6)  # fmt: skip
        return to_svg(figure, name, alt)


def histogram(
    values: np.ndarray,
    bins: np.ndarray,
    name: str,
    alt: str,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    ratios: bool = False,
) -> str:
    """``ratios``: a logarithmic axis around 1."""
    with _figure() as (figure, axes):
        axes.hist(values, bins=bins, color=SERIES[1], alpha=0.8, edgecolor=PAPER, linewidth=0.8)
        axes.axvline(float(np.median(values)), color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.text(
            float(np.median(values)), 1.0, f" median {np.median(values):.3g}", va="top", fontsize=8.5,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        if ratios:
            axes.set_xscale("log")
            axes.set_xticks([1 / 4, 1 / 2, 1, 2, 4], ["1:4", "1:2", "1:1", "2:1", "4:1"])
            axes.minorticks_off()
        axes.margins(y=0.14)
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(_short_number))
        axes.grid(axis="x", visible=False)
        return to_svg(figure, name, alt)


def smoothing_window(points: int) -> int:
    """Logged steps in the moving mean: a fortieth of the run, odd, so that it is centred."""
    return 2 * (points // 80) + 1


def smooth_band(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, lowest, highest) over runs after a centred moving mean of each, thinned to ``POINTS``."""
    window = smoothing_window(values.shape[1])
    smooth = np.stack([moving_mean(row, window) for row in values])
    has_any = np.isfinite(smooth).any(axis=0)
    steps, smooth = steps[has_any], smooth[:, has_any]
    keep = _thin(len(steps))
    chosen = smooth[:, keep]
    return steps[keep], np.nanmean(chosen, axis=0), np.nanmin(chosen, axis=0), np.nanmax(chosen, axis=0)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the defined values within ``window // 2`` places, fewer at the ends; NaN without any."""
    defined = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(defined, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(defined)])
    left = np.clip(np.arange(len(values)) - window // 2, 0, None)
    right = np.clip(np.arange(len(values)) + window // 2 + 1, None, len(values))
    n = count[right] - count[left]
    return np.where(n > 0, (total[right] - total[left]) / np.maximum(n, 1), np.nan)


def _thin(points: int) -> np.ndarray:
    """Indices of at most ``POINTS`` places, first and last among them."""
    return np.unique(np.linspace(0, points - 1, min(points, POINTS)).round().astype(int))


def _short_number(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
