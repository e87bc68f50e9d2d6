from xml.etree import ElementTree

from matplotlib.figure import Figure

from clustermim.render.figures import (
    Curve,
    Point,
    dot_chart,
    figure_png,
    figure_svg,
    inline_svg,
    interval_chart,
    loss_curves,
)


def figures() -> dict[str, Figure]:
    points = [Point(name="a<b", value=0.5, low=0.4, high=0.6), Point(name="control", value=0.0, muted=True)]
    return {
        "losses": loss_curves([Curve(name=n, x=[0, 1, 2], y=[3, 2, 1], unit="nats") for n in ("one", "two")]),
        "intervals": interval_chart(points, x_label="alignment"),
        "dots": dot_chart({"x": {"k-NN": 1.0, "linear": 2.0}, "y": {"linear": 3.0}}, x_label="%", muted=["y"]),
    }


def test_files_are_what_they_say() -> None:
    for figure in figures().values():
        assert figure_png(figure, dpi=50).startswith(b"\x89PNG")
        assert ElementTree.fromstring(figure_svg(figure)).tag.endswith("svg")


def test_same_figure_same_bytes() -> None:
    first, second = (figure_svg(figures()["dots"]) for _ in range(2))
    assert first == second


def test_inline_svg_is_themed_and_loads_nothing() -> None:
    for name, figure in figures().items():
        text = inline_svg(figure, prefix=name, description="what <it> shows")
        assert "http" not in text
        assert "var(--ink," in text
        assert text.startswith("<svg")
        root = ElementTree.fromstring(text)
        assert root.get("aria-label") == "what <it> shows"
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(set(ids)) == len(ids)
        assert all(identity.startswith(f"{name}-") for identity in ids)
        for element in root.iter():
            for key in ("href", "clip-path"):
                target = element.get(key, "").removeprefix("url(").removesuffix(")").removeprefix("#")
                assert not target or target in ids


def test_every_name_is_written() -> None:
    text = figure_svg(figures()["intervals"]).decode()
    assert "a&lt;b" in text
    assert "control" in text
