"""Figures of scores and graphs: what they must show, whatever the sizes."""

import numpy as np
import pytest

from clustermim.render.figures import inline_svg
from clustermim.render.score_figures import MOST_CLASSES, confusion_chart, learning_chart, spectrum_chart


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_confusions_are_one_cell_a_pair_and_follow_the_theme(classes):
    lift = np.random.default_rng(0).uniform(0.2, 3, (classes, classes))
    figure = confusion_chart([f"class {c}" for c in range(classes)], lift)
    shown = min(classes, MOST_CLASSES)
    axes = figure.axes[0]
    assert len(axes.patches) == shown**2
    assert len(axes.texts) == (shown**2 if classes <= 12 else 0)
    svg = inline_svg(figure, prefix="c", description="confusions")
    assert "var(--series-1" in svg and "var(--series-2" in svg


def test_chance_everywhere_is_drawn_faintly():
    figure = confusion_chart(["0", "1"], np.ones((2, 2)))
    assert all(patch.get_alpha() < 0.1 for patch in figure.axes[0].patches)


def test_learning_curves_and_spectra_have_a_line_each():
    curve = ([50, 200, 800], [0.1, 0.2, 0.3], [0.0, 0.15, 0.3], [0.2, 0.25, 0.3])
    figure = learning_chart({"a": curve, "b": curve}, y_label="alignment")
    assert len(figure.axes[0].lines) == 2 and figure.axes[0].get_xscale() == "log"
    figure = spectrum_chart({"identity": [1, 0.5, 0.1], "pixel": [1, 0.2]})
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3, 2]
    assert "eigenvalue" in inline_svg(figure, prefix="s", description="spectrum")
