"""Figures of token scores and of the augmentation graph: confused classes, learning curves, spectra, small graphs."""

from collections.abc import Collection, Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from clustermim.render.figures import _STYLE, _blank
from clustermim.render.palette import SERIES, light

MOST_CLASSES = 30
WRITTEN = 12


def confusion_chart(names: Sequence[str], lift: Float[np.ndarray, "l l"]) -> Figure:
    """Where the walk class → token → class leads, against chance: one cell a pair, the first class at the top left.

    Cells above chance (lift > 1) take the first colour, below it the second, stronger the further away; up to twelve
    classes the lift is written in. More than thirty classes are cut to the first thirty.

    Parameters
    ----------
    names
        Name of each class, the most interesting first.
    lift
        C[c, c'] / p[c'], (L, L), rows: from; 1 is chance.
    """
    shown = min(len(names), MOST_CLASSES)
    lift = lift[:shown, :shown]
    top = max(float(lift.max()) - 1.0, 1e-12)
    with matplotlib.rc_context(_STYLE):
        cell = 30 if shown <= WRITTEN else 14
        figure = _blank(110 + cell * shown, 90 + cell * shown)
        axes = figure.subplots()
        for a in range(shown):
            for b in range(shown):
                value = float(lift[a, b])
                strength = (value - 1.0) / top if value > 1 else 1.0 - value
                colour = light("series-1" if value > 1 else "series-2")
                square = Rectangle(
                    (b - 0.5, a - 0.5), 1, 1, facecolor=colour, alpha=0.05 + 0.75 * strength, linewidth=0
                )
                axes.add_patch(square)
                if shown <= WRITTEN:
                    text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
                    axes.text(b, a, text, ha="center", va="center", fontsize=9, color=light("ink"))
        axes.set_xlim(-0.5, shown - 0.5)
        axes.set_ylim(shown - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.set_xticks(range(shown), names[:shown])
        if max(len(name) for name in names[:shown]) > 2:
            axes.tick_params(axis="x", labelrotation=90)
        axes.set_yticks(range(shown), names[:shown])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set_xlabel("leads to")
        axes.set_ylabel("from class")
        for spine in axes.spines.values():
            spine.set_visible(False)
        return figure


def learning_chart(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float], Sequence[float]]], *, y_label: str
) -> Figure:
    """A figure against the number of labelled images, with its range over the draws, on a logarithmic axis.

    Parameters
    ----------
    curves
        Name -> (images, value, lowest, highest).
    y_label
        What the value is.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _blank(420, 260 + 12 * len(curves))
        axes = figure.subplots()
        for i, (name, (images, values, lowest, highest)) in enumerate(curves.items()):
            colour, marker = light(SERIES[i % len(SERIES)]), "osD^v"[i % 5]
            axes.fill_between(images, lowest, highest, color=colour, alpha=0.15, linewidth=0)
            axes.plot(images, values, color=colour, marker=marker, markersize=4, label=name)
        axes.set_xscale("log")
        ticks = next(iter(curves.values()))[0]
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("labelled images")
        axes.set_ylabel(y_label)
        figure.legend(loc="outside upper left", ncols=_columns(curves))
        return figure


def spectrum_chart(spectra: Mapping[str, Sequence[float]]) -> Figure:
    """Eigenvalues in falling order, a line a graph.

    Parameters
    ----------
    spectra
        Name -> eigenvalues, descending, in [0, 1].
    """
    with matplotlib.rc_context(_STYLE):
        figure = _blank(420, 250 + 12 * len(spectra))
        axes = figure.subplots()
        for i, (name, values) in enumerate(spectra.items()):
            colour, marker = light(SERIES[i % len(SERIES)]), "osD^v"[i % 5]
            axes.plot(
                range(1, len(values) + 1), values, color=colour, marker=marker, markersize=3, linewidth=1.2, label=name
            )
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("number of the eigenvalue")
        axes.set_ylabel("eigenvalue λ")
        figure.legend(loc="outside upper left", ncols=_columns(spectra))
        return figure


def _columns(names: Collection[str]) -> int:
    """Three columns of a legend where three names are short enough."""
    return 3 if len(names) == 3 and sum(map(len, names)) < 40 else 2


def graph_chart(
    graphs: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
) -> Figure:
    """Small augmentation graphs side by side: visible views (circles) left, hidden nodes (squares) right.

    A node has the colour of its commonest class, the greyer the more it mixes. A hidden node is the larger the more
    weight it has, so tokens, which merge hidden views, stand out; lines are the darker the more weight they carry.

    Parameters
    ----------
    graphs
        Name -> (weights (n1, n2) ≥ 0, class memberships of the visible views (n1, L) or None).
    """
    sides = [max(weights.shape) for weights, _ in graphs.values()]
    height = 60.0 + min(max(13 * max(sides), 130), 460)
    with matplotlib.rc_context(_STYLE):
        figure = _blank(40 + 150 * len(graphs), height)
        panels = np.atleast_1d(figure.subplots(1, len(graphs)))
        for axes, (name, (weights, members)) in zip(panels, graphs.items(), strict=True):
            shown = np.ones((len(weights), 2)) if members is None else members
            _draw_graph(axes, weights, shown, height - 60)
            axes.set_title(name, loc="center")
        return figure


def _draw_graph(
    axes: Axes, weights: Float[np.ndarray, "n1 n2"], members: Float[np.ndarray, "n1 l"], height: float
) -> None:
    visible, hidden = weights.shape
    left = np.linspace(0, 1, visible) if visible > 1 else np.array([0.5])
    # Hidden nodes stand in the order of the mean height of their neighbours, which crosses the fewest lines.
    mass = weights.sum(axis=0)
    order = np.argsort(left @ weights / mass, kind="stable")
    right = np.empty(hidden)
    right[order] = np.linspace(0, 1, hidden) if hidden > 1 else 0.5
    top = weights.max()
    for a, b in zip(*np.nonzero(weights), strict=True):
        axes.plot(
            [0, 1], [left[a], right[b]], color=light("muted"), alpha=0.12 + 0.5 * weights[a, b] / top, linewidth=0.9
        )
    # No node may touch the next: sides in points, at most three quarters of the way between two.
    gap = float(0.75 * height / max(visible, hidden))
    _draw_nodes(axes, 0.0, left, np.full(visible, min(gap, 7.0) ** 2), members, "o")
    sides = np.clip(0.75 * height / hidden, 3.0, 14.0) * np.sqrt(mass / mass.max())
    _draw_nodes(axes, 1.0, right, np.maximum(sides, 3.0) ** 2, weights.T @ members, "s")
    axes.set_xlim(-0.2, 1.2)
    axes.set_ylim(1.06, -0.06)
    axes.set_xticks([0, 1], ["visible", "hidden"])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_nodes(
    axes: Axes, x: float, y: Float[np.ndarray, " n"], area: Float[np.ndarray, " n"], members: np.ndarray, marker: str
) -> None:
    """Grey nodes under the colour of the commonest class, the stronger the larger its share beyond an even one."""
    shares = members / members.sum(axis=1, keepdims=True)
    even = 1.0 / max(2, int(np.count_nonzero(shares.sum(axis=0))))
    strength = np.clip((shares.max(axis=1) - even) / (1 - even), 0.0, 1.0)
    colours = [light(SERIES[int(c) % len(SERIES)]) for c in shares.argmax(axis=1)]
    where = np.full(len(y), x)
    axes.scatter(where, y, s=area, c=light("muted"), marker=marker, zorder=3, linewidths=0)
    axes.scatter(where, y, s=area, c=colours, alpha=strength, marker=marker, zorder=4, linewidths=0)
