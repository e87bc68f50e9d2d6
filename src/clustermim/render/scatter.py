"""A scatter plot that a page draws itself: the reader picks both axes, and points tell their names on hover and focus.

The data stand in the page as JSON; one small script draws them as SVG in the page's colours, so the plot prints and
follows dark mode. One tab stop for all points: arrow keys go from point to point.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, kw_only=True)
class ScatterPoint:
    """One point: its coordinates under every axis it has."""

    name: str
    series: str
    """Points of one series share a colour and a mark."""
    x: Mapping[str, float]
    """Key of a horizontal axis -> value."""
    y: Mapping[str, tuple[float, float, float]]
    """Key of a vertical axis -> value and the ends of its interval."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else is told of it."""
    muted: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One choice for an axis."""

    key: str
    title: str
    digits: int = 3


def scatter_html(
    identity: str, points: Sequence[ScatterPoint], xs: Sequence[Axis], ys: Sequence[Axis], caption: str
) -> str:
    """The plot as HTML; `SCATTER_SCRIPT` brings it to life.

    Parameters
    ----------
    identity
        Unique in the page.
    points
        What is drawn.
    xs, ys
        The axes to choose from; the first ones are shown first.
    caption
        Plain text.
    """
    data = {"points": [asdict(point) for point in points], "x": [asdict(a) for a in xs], "y": [asdict(a) for a in ys]}
    text = json.dumps(data).replace("<", "\\u003c")
    choices = "".join(_choice(identity, which, axes) for which, axes in (("x", xs), ("y", ys)))
    return (
        f'<figure class="scatter" id="{identity}" data-scatter><div class="choices">{choices}</div>'
        f'<div class="plot"></div><p class="told soft" aria-live="polite">Point at a mark, or go through them with the '
        f"arrow keys.</p><figcaption>{html.escape(caption)}</figcaption>"
        f'<script type="application/json">{text}</script></figure>'
    )


def _choice(identity: str, which: str, axes: Sequence[Axis]) -> str:
    options = "".join(f'<option value="{html.escape(a.key)}">{html.escape(a.title)}</option>' for a in axes)
    name = {"x": "across", "y": "up"}[which]
    select = f'<select id="{identity}-{which}" data-axis="{which}">{options}</select>'
    return f'<label for="{identity}-{which}">{name} {select}</label>'


SCATTER_STYLE = """
.scatter .choices,.filter{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;font-size:.9rem;color:var(--soft)}
select,input[type=search]{font:inherit;color:var(--ink);background:var(--panel);border:1px solid var(--rule);
 border-radius:4px;padding:.25rem .5rem;max-width:100%}
.scatter label{display:inline-flex;flex-wrap:wrap;gap:.3rem;align-items:center;max-width:100%}
.scatter .plot svg{display:block;width:100%;max-width:46rem;height:auto;overflow:visible;margin-top:.6rem}
.scatter text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;fill:var(--soft)}
.scatter .mark{cursor:pointer;outline:none}
.scatter .mark:focus,.scatter .mark:hover{stroke:var(--ink);stroke-width:2.5}
.scatter .told{min-height:3em;font-size:.9rem;margin:.4rem 0 0}
.filter{margin:1rem 0 -.6rem}.filter label{display:inline-flex;gap:.2rem .5rem;align-items:center;white-space:nowrap}
.filter{align-items:center}.filter input{min-width:4rem;width:100%;max-width:16rem}
@media (max-width:40rem){.scatter text{font-size:16px}}
@media print{.scatter .choices,.filter,.scatter .told{display:none}}
"""

SCATTER_SCRIPT = """
for (const box of document.querySelectorAll("[data-scatter]")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const plot = box.querySelector(".plot"), told = box.querySelector(".told"), hint = told.textContent;
  const series = [...new Set(data.points.map((p) => p.series))];
  const colour = (p) => p.muted ? "var(--muted)" : `var(--series-${series.indexOf(p.series) % 5 + 1})`;
  const W = 560, H = 380, L = 52, R = 14, T = 12, B = 44 + 20 * Math.ceil(series.length / 2);
  const sample = document.createElement("div");
  sample.innerHTML = "<svg></svg>";
  const ns = sample.firstChild.namespaceURI;
  const make = (name, attributes, text) => {
    const node = document.createElementNS(ns, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const ticks = (low, high) => {
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= raw);
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(v);
    return [found, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
  };
  const shape = (x, y, n) => {
    const s = 6, k = (n + Math.floor(n / 5)) % 5;  // five colours, and other marks the next time round
    if (k === 0) return `M${x - s},${y}a${s},${s} 0 1,0 ${2 * s},0a${s},${s} 0 1,0 ${-2 * s},0`;
    if (k === 1) return `M${x - s},${y - s}h${2 * s}v${2 * s}h${-2 * s}z`;
    if (k === 2) return `M${x},${y - s - 2}l${s + 2},${s + 2}l${-s - 2},${s + 2}l${-s - 2},${-s - 2}z`;
    if (k === 3) return `M${x},${y - s - 1}l${s + 1},${2 * s}h${-2 * s - 2}z`;
    return `M${x},${y + s + 1}l${s + 1},${-2 * s}h${-2 * s - 2}z`;
  };
  const draw = () => {
    const [xa, ya] = ["x", "y"].map((w) => data[w].find((a) => a.key === box.querySelector(`[data-axis=${w}]`).value));
    const shown = data.points.filter((p) => xa.key in p.x && ya.key in p.y);
    const svg = make("svg", {viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": `${ya.title} against ${xa.title}`});
    plot.replaceChildren(svg);
    told.textContent = shown.length ? hint : "No target has both figures.";
    if (!shown.length) return;
    const values = shown.map((p) => p.x[xa.key]);
    const log = Math.min(...values) > 0 && Math.max(...values) > 60 * Math.min(...values);
    const fx = (v) => log ? Math.log10(v) : v;
    const range = (list) => {
      let low = Math.min(...list), high = Math.max(...list);
      if (low === high) { low -= 0.5; high += 0.5; }
      const pad = 0.06 * (high - low);
      return [low - pad, high + pad];
    };
    const [x0, x1] = range(values.map(fx)), [y0, y1] = range(shown.flatMap((p) => p.y[ya.key]));
    const px = (v) => L + (fx(v) - x0) / (x1 - x0) * (W - L - R);
    const py = (v) => H - B - (v - y0) / (y1 - y0) * (H - B - T);
    const [yt, yd] = ticks(y0, y1);
    for (const v of yt) {
      svg.append(make("line", {x1: L, x2: W - R, y1: py(v), y2: py(v), stroke: "var(--rule)", "stroke-width": 0.6}));
      svg.append(make("text", {x: L - 6, y: py(v) + 4, "text-anchor": "end"}, v.toFixed(yd)));
    }
    const [xt, xd] = ticks(x0, x1);
    for (const v of xt) {
      const at = L + (v - x0) / (x1 - x0) * (W - L - R);
      svg.append(make("line", {x1: at, x2: at, y1: H - B, y2: H - B + 4, stroke: "var(--rule)"}));
      const label = log ? (10 ** v).toPrecision(2).replace(/e\\+?/, "e") : v.toFixed(xd);
      svg.append(make("text", {x: at, y: H - B + 17, "text-anchor": "middle"}, log ? String(Number(label)) : label));
    }
    svg.append(make("line", {x1: L, x2: W - R, y1: H - B, y2: H - B, stroke: "var(--rule)"}));
    const across = xa.title + (log ? " (log scale)" : "");
    svg.append(make("text", {x: (L + W - R) / 2, y: H - B + 34, "text-anchor": "middle"}, across));
    const order = [...shown].sort((a, b) => a.x[xa.key] - b.x[xa.key]);
    for (const p of order) {
      const [v, low, high] = p.y[ya.key], x = px(p.x[xa.key]);
      const ends = {x1: x, x2: x, y1: py(low), y2: py(high)};
      svg.append(make("line", {...ends, stroke: colour(p), "stroke-width": 2, opacity: 0.45}));
    }
    const say = (p) => {
      const [v, low, high] = p.y[ya.key];
      const more = Object.entries(p.facts).map(([k, w]) => `${k} ${w}`).join(", ");
      const [middle, from, to] = [v, low, high].map((one) => one.toFixed(ya.digits));
      return `${p.name}: ${ya.title} ${middle} [${from}, ${to}], ` +
        `${xa.title} ${p.x[xa.key].toFixed(xa.digits)}${more ? "; " + more : ""}`;
    };
    const marks = order.map((p, i) => {
      const mark = make("path", {
        d: shape(px(p.x[xa.key]), py(p.y[ya.key][0]), series.indexOf(p.series)), class: "mark", role: "img",
        fill: p.muted ? "transparent" : colour(p), stroke: colour(p), "stroke-width": 1.5,
        tabindex: i ? -1 : 0, "aria-label": say(p)});
      mark.append(make("title", {}, say(p)));
      const show = () => { told.textContent = say(p); };
      mark.addEventListener("mouseenter", show);
      mark.addEventListener("focus", show);
      mark.addEventListener("click", () => mark.focus());
      mark.addEventListener("keydown", (event) => {
        const by = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1}[event.key];
        if (!by) return;
        event.preventDefault();
        const next = marks[(i + by + marks.length) % marks.length];
        for (const other of marks) other.setAttribute("tabindex", -1);
        next.setAttribute("tabindex", 0);
        next.focus();
      });
      svg.append(mark);
      return mark;
    });
    series.forEach((name, n) => {
      const x = L + (n % 2) * (W - L - R) / 2, y = H - B + 58 + 20 * Math.floor(n / 2);
      const one = data.points.find((p) => p.series === name);
      const fill = one.muted ? "none" : colour(one);
      svg.append(make("path", {d: shape(x + 6, y - 4, n), fill, stroke: colour(one)}));
      svg.append(make("text", {x: x + 18, y}, name));
    });
  };
  for (const select of box.querySelectorAll("select")) select.addEventListener("change", draw);
  draw();
}
"""
