import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.render.figures import Curve, loss_curves
from clustermim.render.page import Column, Page
from clustermim.render.sheets import Tile
from page_checker import check


def full_page(text: str = "plain", sections: int = 2) -> str:
    page = Page(text, lead=[text])
    for _ in range(sections):
        section = page.section("Same title")
        section.paragraph(text)
        section.note(text, text)
        figure = loss_curves([Curve(name=text, x=[0, 1], y=[1, 0])])
        section.charts((figure, text, text), (loss_curves([Curve(name="b", x=[0, 1], y=[1, 0])]), text, ""))
        section.gallery([Tile(picture=np.zeros((2, 2, 3), np.uint8), caption="1", bar=0.3)], side=40, caption=text)
        section.table(
            [
                Column(key="name", title="name", kind="text"),
                Column(key="v", title="value", low="l", high="h", best="max"),
            ],
            [{"name": text, "v": 0.5, "l": 0.4, "h": 0.6}, {"name": "b", "v": None}, {"name": "c", "v": 0.9}],
            caption="A table. More.",
            muted=[2],
        )
        section.commands([(text, "clustermim demo --out 'a <b>'")])
        section.facts({"name": text})
    return page.html()


def test_a_page_is_whole_and_loads_nothing() -> None:
    found = check(full_page())
    assert found.links.count("#same-title") == 1
    assert "#same-title-2" in found.links
    assert "Content-Security-Policy" in full_page()


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=30))
@settings(deadline=None, max_examples=3)
def test_any_text_is_escaped(text: str) -> None:
    check(full_page(text, sections=1))


def test_markup_in_text_is_shown_not_run() -> None:
    page = Page("<script>alert(1)</script>")
    page.section("s").paragraph("<img src=x onerror=alert(1)> `a<b` **c&d**")
    text = page.html()
    assert "<script>alert" not in text
    assert "&lt;img src=x" in text
    assert "<code>a&lt;b</code> <strong>c&amp;d</strong>" in text


def test_a_table_marks_the_best_that_competes_and_carries_values_to_sort_by() -> None:
    text = full_page()
    assert re.search(r'<td class="number best" data-value="0\.5">0\.500 <small>\[0\.400, 0\.600\]</small></td>', text)
    assert not re.search(r'best" data-value="0\.9"', text)
    assert '<td class="number">–</td>' in text
    assert text.count('<th scope="col"') == 4
    assert text.count("<caption>") == 2


def test_light_and_dark_define_the_same_colours() -> None:
    css = full_page().split("<style>")[1].split("</style>")[0]
    day, night = css.split("@media screen and (prefers-color-scheme:dark)")
    names = set(re.findall(r"--([\w-]+):#", day))
    assert names == set(re.findall(r"--([\w-]+):#", night.split("}}")[0]))
    assert set(re.findall(r"var\(--([\w-]+)\)", css)) - names <= {"side", "token"}
