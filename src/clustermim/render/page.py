"""One self-contained HTML page: sections, sortable tables, charts, picture galleries. It loads nothing from anywhere.

A page is built in reading order and turned into text once, by `Page.html`. All text is escaped; `code` between
backticks and **strong** between double asterisks are the only marks. Pictures are data URIs, charts inline SVG, and the
page's own Content-Security-Policy forbids everything else.
"""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.figure import Figure

from clustermim.render.figures import inline_svg
from clustermim.render.scatter import SCATTER_SCRIPT, SCATTER_STYLE, Axis, ScatterPoint, scatter_html
from clustermim.render.sheets import Tile, png
from clustermim.render.style import SCRIPT, style

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table: which key of a row it shows, and how."""

    key: str
    title: str
    kind: Literal["text", "number"] = "number"
    digits: int = 3
    """Decimal places of a number."""
    low: str | None = None
    """Key of the lower end of an interval, shown small behind the value."""
    high: str | None = None
    """Key of the upper end."""
    best: Literal["max", "min"] | None = None
    """Which value is set in bold: muted rows do not compete."""
    optional: bool = False
    """Leave the column out where no row has a value."""


class Section:
    """A part of a page under one heading; filled from top to bottom."""

    def __init__(self, title: str, identity: str) -> None:
        self.title = title
        self.identity = identity
        self._parts: list[str] = []
        self._charts = 0

    def paragraph(self, text: str) -> None:
        """A paragraph of running text."""
        self._parts.append(f"<p>{_marked(text)}</p>")

    def note(self, *texts: str) -> None:
        """Paragraphs that must not be overlooked, on a coloured ground."""
        self._parts.append(f'<div class="note">{"".join(f"<p>{_marked(text)}</p>" for text in texts)}</div>')

    def chart(self, figure: Figure, *, description: str, caption: str = "", folded: str = "") -> None:
        """A figure, in the page's colours. `description` is for readers who do not see it; `folded` as for `table`."""
        self.charts((figure, description, caption), folded=folded)

    def charts(self, *charts: tuple[Figure, str, str], folded: str = "") -> None:
        """Figures with description and caption, side by side where there is room."""
        drawn = []
        for figure, description, caption in charts:
            self._charts += 1
            svg = inline_svg(figure, prefix=f"{self.identity}-{self._charts}", description=description)
            drawn.append(f'<figure class="chart">{svg}{_caption(caption)}</figure>')
        together = drawn[0] if len(drawn) == 1 else f'<div class="pair">{"".join(drawn)}</div>'
        self._parts.append(_folded(together, folded))

    def gallery(self, tiles: Sequence[Tile], *, side: int, caption: str = "", folded: str = "") -> None:
        """Tiles in a grid that wraps to the width there is; a picture is up to `side` CSS pixels wide.

        With `folded`, the grid is behind that heading until the reader opens it (and printed open or not as it is).
        """
        items = "".join(_tile(tile, side) for tile in tiles)
        figure = f'<figure><ul class="gallery" style="--side:{side}px">{items}</ul>{_caption(caption)}</figure>'
        self._parts.append(_folded(figure, folded))

    def table(
        self,
        columns: Sequence[Column],
        rows: Sequence[Mapping[str, Any]],
        *,
        caption: str,
        muted: Sequence[int] = (),
        sortable: bool = True,
        filterable: bool = False,
        folded: str = "",
    ) -> None:
        """A table; the first column names the row. Rows whose index is in `muted` are there for comparison only.

        With `filterable`, a field above it keeps the rows that hold each of the words typed there; with `folded`, all
        of it is behind that heading until the reader opens it.
        """
        held = {key for row in rows for key, value in row.items() if value not in (None, "")}
        shown = [column for column in columns if not column.optional or column.key in held]
        table = _table(shown, rows, caption, frozenset(muted), sortable)
        if filterable:
            self._charts += 1
            name = f"{self.identity}-filter-{self._charts}"
            table = (
                f'<div class="filtered"><p class="filter"><label for="{name}">Show rows with '
                f'<input type="search" id="{name}" autocomplete="off"></label> '
                f'<output for="{name}">{len(rows)} rows</output></p>{table}</div>'
            )
        self._parts.append(_folded(table, folded))

    def scatter(self, points: Sequence[ScatterPoint], xs: Sequence[Axis], ys: Sequence[Axis], *, caption: str) -> None:
        """A scatter plot whose axes the reader picks; see `render.scatter`."""
        self._charts += 1
        self._parts.append(scatter_html(f"{self.identity}-scatter-{self._charts}", points, xs, ys, caption))

    def commands(self, commands: Sequence[tuple[str, str]]) -> None:
        """What to type, each with a sentence on what it does."""
        items = "".join(f"<li>{_marked(says)}<pre><code>{_command(line)}</code></pre></li>" for says, line in commands)
        self._parts.append(f'<ol class="commands">{items}</ol>')

    def facts(self, facts: Mapping[str, object]) -> None:
        """Names and values, such as versions and hardware."""
        items = "".join(f"<dt>{html.escape(name)}</dt><dd>{_marked(str(value))}</dd>" for name, value in facts.items())
        self._parts.append(f'<dl class="facts">{items}</dl>')

    def html(self) -> str:
        """The section as HTML."""
        heading = f'<h2 id="{self.identity}-title">{_marked(self.title)}</h2>'
        body = "\n".join(self._parts)
        return f'<section id="{self.identity}" aria-labelledby="{self.identity}-title">\n{heading}\n{body}\n</section>'


class Page:
    """A page under one title.

    Parameters
    ----------
    title
        Of the page; also what the browser's tab says.
    lead
        The answer, in the first sentences.
    """

    def __init__(self, title: str, *, lead: Sequence[str] = ()) -> None:
        self.title = title
        self.lead = list(lead)
        self.sections: list[Section] = []

    def section(self, title: str) -> Section:
        """A new section at the end of the page; its address is made from its title."""
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"
        taken = {section.identity for section in self.sections}
        identity = next(name for name in [stem, *(f"{stem}-{n}" for n in range(2, 1000))] if name not in taken)
        section = Section(title, identity)
        self.sections.append(section)
        return section

    def html(self) -> str:
        """The whole page as text, to be written as UTF-8."""
        lead = "".join(f'<p class="lead">{_marked(text)}</p>' for text in self.lead)
        links = "".join(f'<li><a href="#{part.identity}">{_marked(part.title)}</a></li>' for part in self.sections)
        nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(self.sections) > 1 else ""
        body = "\n".join(part.html() for part in self.sections)
        return (
            '<!doctype html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n"
            # An empty icon of its own keeps the browser from asking for one.
            f'<link rel="icon" href="data:,">\n<style>{style()}{SCATTER_STYLE}</style>\n</head>\n<body>\n'
            '<a class="skip" href="#main">To the content</a>\n<div class="page">\n'
            f"<header>\n<h1>{_marked(self.title)}</h1>\n{lead}\n{nav}\n</header>\n"
            f'<main id="main">\n{body}\n</main>\n</div>\n<script>{SCRIPT}{SCATTER_SCRIPT}</script>\n</body>\n</html>\n'
        )


def _marked(text: str) -> str:
    """Escaped text with `code` and **strong**."""
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)


def _command(line: str) -> str:
    """A command that is broken between its options, where it takes several lines, and in them only where it must be."""
    return re.sub(r"(?<=\s)(--?[\w-]+(?: (?!-)\S+)?)", r'<span class="whole">\1</span>', html.escape(line))


def _folded(part: str, heading: str) -> str:
    """Behind a heading until the reader opens it; as it is where there is no heading."""
    return f"<details><summary>{_marked(heading)}</summary>{part}</details>" if heading else part


def _caption(text: str) -> str:
    return f"<figcaption>{_marked(text)}</figcaption>" if text else ""


def _tile(tile: Tile, side: int) -> str:
    uri = "data:image/png;base64," + base64.b64encode(png(tile.picture)).decode()
    # Enlarged pictures keep their pixels; those that must shrink may not lose some.
    kinds = ["framed"] * (tile.colour is not None) + ["shrunk"] * (tile.picture.shape[1] > side)
    frame = f' class="{" ".join(kinds)}"' if kinds else ""
    frame += "" if tile.colour is None else ' style="--token:#{:02x}{:02x}{:02x}"'.format(*tile.colour)
    bar = "" if tile.bar is None else f'<span class="bar"><i style="width:{100 * tile.bar:.1f}%"></i></span>'
    alt = html.escape(tile.description or tile.caption)
    return f'<li><img src="{uri}" alt="{alt}"{frame}>{bar}{_marked(tile.caption)}</li>'


def _table(
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    caption: str,
    muted: frozenset[int],
    sortable: bool,
) -> str:
    best = {column.key: _best(column, rows, muted) for column in columns}
    head = "".join(_head(column, sortable) for column in columns)
    body = []
    for i, row in enumerate(rows):
        cells = [
            _cell(column, row, row.get(column.key) == best[column.key], first=not n) for n, column in enumerate(columns)
        ]
        mark = ' class="muted"' if i in muted else ""
        body.append(f"<tr{mark}>{''.join(cells)}</tr>")
    sorts = " data-sortable" if sortable else ""
    label = html.escape(re.sub(r"[`*]", "", caption).split(".")[0])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table{sorts}>'
        f"<caption><span>{_marked(caption)}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _head(column: Column, sortable: bool) -> str:
    first = "ascending" if column.kind == "text" or column.best == "min" else "descending"
    title = _marked(column.title)
    inner = f'<button type="button">{title}</button>' if sortable else title
    return f'<th scope="col" class="{column.kind}" data-kind="{column.kind}" data-first="{first}">{inner}</th>'


def _cell(column: Column, row: Mapping[str, Any], is_best: bool, *, first: bool) -> str:
    value = row.get(column.key)
    tag = 'th scope="row"' if first else "td"
    if value is None or (isinstance(value, float) and value != value):
        return f'<{tag} class="{column.kind}">–</{tag[:2]}>'
    shown = _marked(str(value)) if column.kind == "text" else _number(value, column.digits)
    ends = [row.get(key) for key in (column.low, column.high) if key is not None]
    if len(ends) == 2 and None not in ends:
        shown += f" <small>[{_number(ends[0], column.digits)}, {_number(ends[1], column.digits)}]</small>"
    sort = f' data-value="{html.escape(str(value))}"'
    return f'<{tag} class="{column.kind}{" best" if is_best and column.best else ""}"{sort}>{shown}</{tag[:2]}>'


def _best(column: Column, rows: Sequence[Mapping[str, Any]], muted: frozenset[int]) -> Any:
    values = [row[column.key] for i, row in enumerate(rows) if i not in muted and row.get(column.key) is not None]
    if column.best is None or not values:
        return object()
    return max(values) if column.best == "max" else min(values)


def _number(value: Any, digits: int) -> str:
    return f"{value:z,.{digits}f}".replace("-", "−")
