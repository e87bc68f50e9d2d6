"""Figures for pages and papers: curves, intervals and dots, drawn by matplotlib without a display.

A figure is drawn once, in the light theme. `inline_svg` gives it to a page, where it follows the page's colours and
fonts; `figure_png` and `figure_svg` give files.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clustermim.render.palette import SERIES, light, themed

_POINT = 72.0
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    # Names are names: a dollar sign in one is not mathematics.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "clustermim",
    "text.color": light("ink"),
    "axes.edgecolor": light("rule"),
    "axes.labelcolor": light("soft"),
    "axes.titlecolor": light("ink"),
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": light("rule"),
    "grid.linewidth": 0.5,
    "xtick.color": light("rule"),
    "ytick.color": light("rule"),
    "xtick.labelcolor": light("soft"),
    "ytick.labelcolor": light("soft"),
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line over training: its name, points, and what the y axis measures."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row of a dot chart: a value, its interval if known, and whether it is only there for comparison."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    muted: bool = False


def loss_curves(curves: Sequence[Curve], *, x_label: str = "epoch") -> Figure:
    """One panel a curve, one under the other: losses of different targets have different units and no common axis."""
    with matplotlib.rc_context(_STYLE):
        figure = _blank(360, 40 + 100 * len(curves))
        panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for i, (panel, curve) in enumerate(zip(panels, curves, strict=True)):
            panel.plot(curve.x, curve.y, color=light(SERIES[i % len(SERIES)]))
            panel.set_title(f"{curve.name}: {curve.unit}" if curve.unit else curve.name)
            panel.yaxis.set_major_locator(MaxNLocator(4))
            panel.margins(x=0.01)
        panels[-1].set_xlabel(x_label)
        panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return figure


@dataclass(frozen=True, kw_only=True)
class Band:
    """One line of a sweep with the ends of its band, and what stands at its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def band_chart(
    bands: Sequence[Band], *, x_label: str, y_label: str, levels: Mapping[str, float] | None = None, log: bool = False
) -> Figure:
    """Lines with bands over a common axis; `levels` are drawn as dotted lines from side to side.

    Parameters
    ----------
    bands
        The lines.
    x_label, y_label
        What the axes are.
    levels
        Name -> value of what has no place on the axis.
    log
        Whether the x axis is logarithmic; its ticks are then the points themselves.
    """
    with matplotlib.rc_context(_STYLE):
        rows = len(bands) + len(levels or {})
        figure = _blank(360, 230 + 16 * ((rows + 1) // 2))
        axes = figure.subplots()
        for i, band in enumerate(bands):
            colour = light(SERIES[i % len(SERIES)])
            axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(band.x, band.y, color=colour, marker="osD^v"[i % 5], markersize=4.5, label=band.name)
        for i, (name, value) in enumerate((levels or {}).items()):
            style = [(0, (1, 1.5)), (0, (4, 2)), (0, (6, 2, 1, 2))][i % 3]
            axes.axhline(value, color=light("muted"), linestyle=style, linewidth=1.3, label=name)
        if log:
            axes.set_xscale("log")
            ticks = sorted({x for band in bands for x in band.x})
            axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
            axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside lower left", ncols=2, handletextpad=0.4, columnspacing=1.0)
        return figure


def interval_chart(points: Sequence[Point], *, x_label: str, zero: bool = True) -> Figure:
    """One row a point, the first at the top: a dot at its value over a line for its interval."""
    with matplotlib.rc_context(_STYLE):
        figure = _blank(360, 50 + 21 * len(points))
        axes = figure.subplots()
        for row, point in enumerate(points):
            colour = light("muted" if point.muted else "series-1")
            if point.low is not None and point.high is not None:
                axes.plot([point.low, point.high], [row, row], color=colour, linewidth=3.5, alpha=0.45)
            axes.plot([point.value], [row], marker="o", markersize=5, color=colour, linestyle="none")
        _name_rows(axes, [point.name for point in points])
        if zero:
            axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.set_xlabel(x_label)
        return figure


def dot_chart(rows: Mapping[str, Mapping[str, float]], *, x_label: str, muted: Sequence[str] = ()) -> Figure:
    """One row a name, the first at the top, with one dot for each measure; names in `muted` are drawn hollow.

    Parameters
    ----------
    rows
        Name -> measure -> value; a measure that a row lacks is left out there.
    x_label
        What the values are.
    muted
        Names that are only there for comparison.
    """
    measures = list(dict.fromkeys(measure for values in rows.values() for measure in values))
    with matplotlib.rc_context(_STYLE):
        figure = _blank(360, 70 + 23 * len(rows))
        axes = figure.subplots()
        for row, (name, values) in enumerate(rows.items()):
            if values:
                ends = [min(values.values()), max(values.values())]
                axes.plot(ends, [row, row], color=light("rule"), linewidth=2)
            for i, measure in enumerate(measures):
                if measure in values:
                    colour, marker = light(SERIES[i % len(SERIES)]), "osD^v"[i % 5]
                    face = "none" if name in muted else colour
                    axes.plot([values[measure]], [row], marker=marker, markersize=6, color=colour, mfc=face, ls="none")
        for i, measure in enumerate(measures):
            axes.plot([], [], marker="osD^v"[i % 5], color=light(SERIES[i % len(SERIES)]), ls="none", label=measure)
        _name_rows(axes, list(rows))
        axes.set_xlabel(x_label)
        figure.legend(loc="outside upper left", ncols=len(measures), handletextpad=0.2)
        return figure


def figure_png(figure: Figure, *, dpi: int = 200) -> bytes:
    """The figure on white, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def figure_svg(figure: Figure) -> bytes:
    """The figure in the light theme, as the bytes of an SVG file; text stays text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Text stays text, so a glyph that matplotlib's font lacks is no matter: the reader's font draws it.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline_svg(figure: Figure, *, prefix: str, description: str) -> str:
    """The figure as an `<svg>` element to stand in a page: themed, as wide as its place, told to screen readers.

    Parameters
    ----------
    figure
        Of this module.
    prefix
        Put before each id, so that two figures of a page share none.
    description
        What the figure shows, in a sentence.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(figure_svg(figure))
    for part in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(part)
    used = set(re.findall(r"[(\"]#([\w.-]+)", ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        _rename_ids(element, prefix, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", description)
    text = ElementTree.tostring(root, encoding="unicode")
    # HTML knows these prefixes; the declarations would only be addresses in a page that promises to have none.
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    return themed(text)


def _rename_ids(element: ElementTree.Element, prefix: str, used: set[str]) -> None:
    name = element.attrib.pop("id", None)
    if name is not None and name in used:
        element.set("id", f"{prefix}-{name}")
    for key, value in element.attrib.items():
        if "#" in value:
            element.set(key, re.sub(r"(^|url\()#(?=[A-Za-z])(?![0-9a-fA-F]{6}\b)", rf"\1#{prefix}-", value))


def _blank(width: float, height: float) -> Figure:
    """A figure of this size in points, which are CSS pixels on a phone."""
    figure = Figure(figsize=(width / _POINT, height / _POINT), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=light("ink"))
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", visible=False)
