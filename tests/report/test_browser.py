"""The page in a real browser: no errors, no requests, and it does what it looks like it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rasa_train.check.examples import DatasetFacts, Inspection, Piece, Shown
from rasa_train.check.examples_page import page
from rasa_train.data.tokenise import Stats
from rasa_train.report.page import render
from rasa_train.report.runs import find_runs, read_runs

from .browser import PROGRAM, Page, browser
from .conftest import write_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
HOSTILE = "<img src='http:pwn' onerror=alert(1)>"


def choose(run: Path, step: int) -> None:
    """Give a run a validation loss, by which it has chosen a step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "validation_loss": 1 + abs(row["step"] - step) / 50}) for row in rows]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = json.loads((run / "summary.json").read_text())
    best = {"step": step, "epoch": 3.0, "value": 1.0, "measure": "validation_loss"}
    (run / "summary.json").write_text(json.dumps({**summary, "best": best}))


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for method, floor in (("rasa", 0.3), ("lora", 0.6)):
        for seed in (1, 2):
            write_run(
                root / f"{method},seed={seed}", f"adapter.method={method}", f"seed={seed}", floor=floor + 0.01 * seed
            )
    write_run(root / HOSTILE, "adapter.k=2", steps=17, complete=False, floor=0.9)
    choose(root / "rasa,seed=1", 30)
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


def test_the_chosen_step_is_marked(page_file: Path, chromium: Page) -> None:
    """One circle, at the lowest point of the only curve of a validation loss; and a column of the table."""
    chromium.open(page_file, 1200, 844)
    chart = "[...document.querySelectorAll('#charts figure')].find((f) => f.querySelector('h3').textContent === '%s')"
    view = (
        f"[...({chart % 'Validation loss'}).querySelectorAll('select')].find((s) => s.innerHTML.includes('each run'))"
    )
    chromium.run(f"{view}.value = 'each run', {view}.dispatchEvent(new Event('change'))")
    drawn = f"[...({chart % 'Validation loss'}).querySelectorAll('circle.best')]"
    [[x, y]] = chromium.run(f"{drawn}.map((c) => [c.cx, c.cy].map((v) => v.baseVal.value))")
    points = f"({chart % 'Validation loss'}).querySelector('polyline').getAttribute('points')"
    lowest = max((tuple(map(float, p.split(","))) for p in chromium.run(points).split()), key=lambda point: point[1])
    assert abs(x - lowest[0]) < 0.1 and abs(y - lowest[1]) < 0.1
    assert chromium.run(f"({chart % 'Training loss'}).querySelectorAll('circle.best').length") == 0
    heads = chromium.run("[...document.querySelectorAll('#runs thead th')].map((h) => h.textContent)")
    column = [head.strip() for head in heads].index("best step")
    cells = f"[...document.querySelectorAll('#runs tbody tr')].map((r) => r.cells[{column}].textContent)"
    assert sorted(chromium.run(cells))[0] == "30"


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


@pytest.fixture(scope="module")
def examples_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of ``rasa-train inspect``, of two data sets with hostile names and long lines."""
    pieces = [
        Piece("<|start|>", False, True),
        Piece(f"user\n{HOSTILE}\t\u00a0{'a' * 900}\n", False, tokens=300),
        Piece("<|end|>", False, True),
        Piece("<|start|>", False, True),
        Piece("assistant\n", False, tokens=2),
        Piece(f"{'word ' * 300}  ", True, tokens=300),
        Piece("<|end|>", True, True),
    ]
    names = (HOSTILE, "b" * 200)
    facts = [
        DatasetFacts(name, 3, 900, 300, 1 / 3, 0.5, 1, 5e5, 10**6, [(0, 499_999, 2), (500_000, 999_999, 1)])
        for name in names
    ]
    shown = [Shown(name, i, "first", 606, 301, pieces) for i, name in enumerate(names)]
    stats = Stats(7, 1, 1, 2, 6, 1800, 600, 10**6)
    path = tmp_path_factory.mktemp("examples") / "examples.html"
    path.write_text(page(Inspection(", ".join(names), "chat", stats, facts, ["<|end|>"], 0, ["a note"], shown)))
    return path


@pytest.mark.parametrize(("width", "dark"), [(1200, True), (390, False)])
def test_the_page_of_examples(examples_file: Path, chromium: Page, width: int, dark: bool) -> None:
    chromium.open(examples_file, width, 844, dark=dark)
    assert chromium.complaints() == []
    assert chromium.requests() == [examples_file.as_uri()], "nothing but the page itself is asked for"
    assert chromium.run("document.documentElement.scrollWidth") == width, "no sideways scrolling of the page"
    assert chromium.run("document.querySelectorAll('script, img, iframe, object, form').length") == 0
    turns = "[...document.querySelectorAll('.example')].map((e) => e.querySelectorAll('.turn').length)"
    assert chromium.run(turns) == [2, 2]
    # what is trained on is told apart from the rest by its ground, and can be read on it
    ground = "getComputedStyle(document.querySelector('mark')).backgroundColor"
    assert chromium.run(ground) not in (chromium.run("getComputedStyle(document.body).backgroundColor"), "transparent")
    assert chromium.run("document.querySelector('.turn pre').textContent.includes('onerror=alert(1)')")
    narrow = """[...document.querySelectorAll('.turn, .card, li')].filter(
        (e) => e.getBoundingClientRect().right > innerWidth + 1).length"""
    assert chromium.run(narrow) == 0
    background = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 23, 26)") == dark
    for name in ("light", "dark"):
        scheme = {"name": "prefers-color-scheme", "value": name}
        chromium.call("Emulation.setEmulatedMedia", features=[scheme])
        for part in ("mark", ".special", ".turn > small", "mark .special"):
            assert chromium.run(CONTRAST % part) >= 4.5, (name, part)


CONTRAST = """(() => {
    const light = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const one = document.querySelector('%s');
    let under = one;
    while (getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;
    const [a, b] = [light(getComputedStyle(one).color), light(getComputedStyle(under).backgroundColor)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
})()"""
