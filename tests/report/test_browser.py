"""The page in a real browser: no errors, no requests, and it does what it looks like it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rasa_train.report.page import render
from rasa_train.report.runs import find_runs, read_runs

from .browser import PROGRAM, Page, browser
from .conftest import write_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
HOSTILE = "<img src='http:pwn' onerror=alert(1)>"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for method, floor in (("rasa", 0.3), ("lora", 0.6)):
        for seed in (1, 2):
            write_run(
                root / f"{method},seed={seed}", f"adapter.method={method}", f"seed={seed}", floor=floor + 0.01 * seed
            )
    write_run(root / HOSTILE, "adapter.k=2", steps=17, complete=False, floor=0.9)
    path = root / "report.html"
    path.write_text(render(read_runs(find_runs([root]))))
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_it_opens_clean_and_fits(page_file: Path, chromium: Page, width: int, dark: bool) -> None:
    chromium.open(page_file, width, 844, dark=dark)
    assert chromium.complaints() == []
    assert chromium.requests() == [page_file.as_uri()], "nothing but the page itself is asked for"
    assert chromium.run("document.documentElement.scrollWidth") == width, "no sideways scrolling of the page"
    # every chart has its lines inside the picture, and text that is large enough
    assert chromium.run("document.querySelectorAll('#charts figure').length") >= 4
    assert chromium.run("[...document.querySelectorAll('.plot > svg')].every((s) => s.querySelector('polyline'))")
    outside = """[...document.querySelectorAll('.plot > svg')].flatMap((s) => {
        const box = s.getBoundingClientRect();
        return [...s.querySelectorAll('polyline, text')].filter((e) => {
            const b = e.getBoundingClientRect();
            return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1;
        }).map((e) => e.textContent || e.tagName);
    })"""
    assert chromium.run(outside) == []
    smallest = (
        "Math.min(...[...document.querySelectorAll('main *')].map((e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert chromium.run(smallest) >= 11
    assert chromium.run("document.querySelectorAll('canvas').length") == 1
    background = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 23, 26)") == dark


def test_a_table_that_is_cut_says_so(page_file: Path, chromium: Page) -> None:
    said = "(() => { const p = document.querySelector('#runs .sideways'); return p.hidden ? '' : p.textContent; })()"
    cut = "document.querySelector('#runs .scroll').classList.contains('more')"
    chromium.open(page_file, 390, 844)
    assert "Scroll the table sideways: " in chromium.run(said) and chromium.run(cut)
    ended = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
    chromium.run(f"document.querySelector('#runs .scroll').scrollLeft = 99999, {ended}")
    assert "further left" in chromium.run(said) and not chromium.run(cut)
    chromium.open(page_file, 2400, 844)
    chromium.run("document.body.style.maxWidth = 'none'")
    chromium.run(ended)
    assert chromium.run(said) == "" and not chromium.run(cut)


def test_hostile_names_are_shown_as_they_are(page_file: Path, chromium: Page) -> None:
    chromium.open(page_file, 1200, 844)
    names = chromium.run("[...document.querySelectorAll('#runs tbody th')].map((e) => e.textContent)")
    assert HOSTILE in names and chromium.run("document.querySelectorAll('img').length") == 0


def test_tables_sort_on_click_and_by_keyboard(page_file: Path, chromium: Page) -> None:
    chromium.open(page_file, 1200, 844)
    column = "[...document.querySelectorAll('#runs thead th')].findIndex((h) => h.textContent === 'loss')"
    values = f"[...document.querySelectorAll('#runs tbody tr')].map((r) => Number(r.cells[{column}].dataset.v))"
    head = f"document.querySelectorAll('#runs thead th')[{column}]"
    before = chromium.run(values)
    chromium.run(f"{head}.firstElementChild.click()")
    assert chromium.run(values) == sorted(before) != before
    assert chromium.run(f"{head}.getAttribute('aria-sort')") == "ascending"
    chromium.run(f"{head}.firstElementChild.focus()")
    chromium.press("Enter")
    assert chromium.run(values) == sorted(before, reverse=True)
    assert chromium.complaints() == []


def test_unknown_values_are_sorted_last(page_file: Path, chromium: Page) -> None:
    chromium.open(page_file, 1200, 844)
    column = "[...document.querySelectorAll('#runs thead th')].findIndex((h) => h.textContent === 'trained')"
    last = f"[...document.querySelectorAll('#runs tbody tr')].at(-1).cells[{column}].textContent"
    for _ in range(2):
        chromium.run(f"document.querySelectorAll('#runs thead th')[{column}].firstElementChild.click()")
        assert chromium.run(last) == "–"


def test_charts_change_with_their_controls(page_file: Path, chromium: Page) -> None:
    chromium.open(page_file, 1200, 844)
    lines = "document.querySelectorAll('#charts figure:first-child polyline').length"
    choose = """(label, value) => {
        const labels = [...document.querySelectorAll('#charts figure:first-child label')];
        const select = labels.find((l) => l.textContent.startsWith(label)).querySelector('select');
        select.value = value;
        select.dispatchEvent(new Event('change'));
    }"""
    assert chromium.run(lines) == 3, "means over seeds first: two groups and one run"
    chromium.run(f"({choose})('lines', 'each run')")
    assert chromium.run(lines) == 5
    chromium.run("document.querySelector('#charts .legend button').click()")
    assert chromium.run(lines) == 4
    path = "document.querySelector('#charts polyline').getAttribute('points')"
    by_step = chromium.run(path)
    chromium.run(f"({choose})('scale', 'log')")
    assert chromium.run(path) != by_step
    chromium.run(f"({choose})('by', 'tokens')")
    assert chromium.run("[...document.querySelectorAll('#charts svg')][0].textContent.includes('tokens')")
    assert chromium.complaints() == []


def test_arrow_keys_read_points(page_file: Path, chromium: Page) -> None:
    chromium.open(page_file, 390, 844)
    chromium.run("document.querySelector('.plot > svg').focus()")
    chromium.press("End")
    chromium.press("ArrowLeft")
    said = chromium.run("document.querySelector('#charts output').textContent")
    assert said.startswith("step 39") and "rasa" in said
    inside = """(() => { const t = document.querySelector('.tip:not([hidden])').getBoundingClientRect();
        return t.left >= 0 && t.right <= innerWidth; })()"""
    assert chromium.run(inside)
