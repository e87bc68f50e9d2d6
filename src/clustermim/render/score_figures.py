"""Figures of token scores and of the augmentation graph: confused classes, learning curves, spectra."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
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
        figure.legend(loc="outside upper left", ncols=2)
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
        figure.legend(loc="outside upper left", ncols=2)
        return figure
