"""Examples and their numbers as one HTML page, which needs no network, no script and no other file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template

from ..errors import shown
from .examples import DatasetFacts, Inspection, Piece, Shown
from .examples_text import facts, title

HERE = Path(__file__).parent
HEADER = 24
"""Most tokens before a trained part that belong to the same turn: the header of the turn."""
_EDGES = re.compile(r"^(\s*)(.*?)(\s*)$", re.DOTALL)
_SIGNS = {" ": "·", "\n": "↵", "\t": "→"}


def page(found: Inspection) -> str:
    """Return the page as text. All text of the data is escaped, and the page may run nothing and load nothing."""
    style = (HERE.parent / "report" / "page.css").read_text() + (HERE / "examples.css").read_text()
    several = len(found.facts) > 1
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{_text(words)}</dd>" for name, words in facts(found))
    sections = [
        f'<dl class="facts">{rows}</dl>',
        _section("sets", "Data sets", _table(found.facts)) if several else "",
        _section("lengths", "Lengths", _histograms(found.facts, several)),
        _section("examples", "Examples", _examples(found, several)),
    ]
    return Template((HERE / "examples.html").read_text()).substitute(
        title=_text(found.dataset), style=style, body="\n".join(filter(None, sections))
    )


def turns(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Return the pieces of an example by turns, as far as the tokens show them: a turn ends with a special token that
    ends a trained part, wherever the token stands; a trained part starts a turn unless only a header is before it."""
    ends = _ends(pieces)
    found: list[list[Piece]] = [[]]
    for piece in pieces:
        now, last = found[-1], found[-1][-1] if found[-1] else None
        if last is None:
            now.append(piece)
            continue
        ended = any(p.special and p.text in ends for p in now)
        starts = piece.trained and not last.trained and sum(p.tokens for p in now) > HEADER
        stops = last.trained and not last.special and not piece.trained and not piece.special and piece.tokens > 1
        if (ended and not _blank(piece)) or starts or stops:
            found.append([piece])
        else:
            now.append(piece)
    return [turn for turn in found if turn]


def _ends(pieces: Sequence[Piece]) -> set[str]:
    """Return the special tokens that end a trained part: the last one in it, or else the next one after it."""
    found: set[str] = set()
    solid = [piece for piece in pieces if not _blank(piece)]  # a line break after an end belongs to it
    for piece, following in pairwise([*solid, Piece("", False)]):
        if piece.trained and not following.trained:
            found |= {end.text for end in (piece, following) if end.special and (end is piece or not piece.special)}
    return found


def _blank(piece: Piece) -> bool:
    return not piece.special and not piece.text.strip()


def _examples(found: Inspection, several: bool) -> str:
    if not found.examples:
        return "<p>There are none.</p>"
    signs = "".join(
        f"<span><i>{sign}</i> {name}</span>" for sign, name in zip("·↵→", ("space", "line", "tab"), strict=True)
    )
    legend = (
        '<p class="legend-line"><span><mark>trained on</mark></span><span><b class="special">special token</b></span>'
        f"{signs}<span>Signs of white space stand where a part begins or ends.</span></p>"
    )
    names = [_name(example, several) for example in found.examples]
    links = "".join(f'<li><a href="#e{i}">{_text(name)}</a></li>' for i, name in enumerate(names))
    contents = f'<ul class="contents">{links}</ul>' if len(names) > 1 else ""
    return legend + contents + "\n".join(_example(i, names[i], example) for i, example in enumerate(found.examples))


def _name(example: Shown, several: bool) -> str:
    return f"{example.dataset}, {title(example)}" if several else title(example).capitalize()


def _example(place: int, name: str, example: Shown) -> str:
    head, _, numbers = name.rpartition(": ")
    parts = [_turn(turn, example) for turn in turns(example.pieces)]
    if example.answer is not None:
        parts.append(f'<div class="turn trained"><small>answer</small><pre>{_text(example.answer)}</pre></div>')
    return (
        f'<article class="example" id="e{place}"><h3>{_text(head)} <small>{_text(numbers)}</small></h3>\n'
        f"{''.join(parts)}</article>"
    )


def _turn(pieces: Sequence[Piece], example: Shown) -> str:
    tokens = sum(piece.tokens for piece in pieces)
    trained = sum(piece.tokens for piece in pieces if piece.trained)
    words = f"{tokens:,} token{'' if tokens == 1 else 's'}" + (
        f", {trained:,} trained" if example.answer is None else ""
    )
    kind = "turn trained" if trained else "turn"
    return f'<div class="{kind}"><small>{words}</small><pre>{"".join(map(_piece, pieces))}</pre></div>'


def _piece(piece: Piece) -> str:
    inner = f'<b class="special">{_text(piece.text)}</b>' if piece.special else _with_signs(piece.text)
    return f"<mark>{inner}</mark>" if piece.trained else inner


def _with_signs(text: str) -> str:
    """Return escaped text with signs for the white space at its edges, and for spaces of other widths anywhere."""
    edges = _EDGES.match(text)
    assert edges
    before, middle, after = edges.groups()
    return _spaces(before, all_of_them=True) + _spaces(middle) + _spaces(after, all_of_them=True)


def _spaces(text: str, *, all_of_them: bool = False) -> str:
    out = []
    for part in re.split(r"(\s)", text):
        if part in _SIGNS:
            sign = _SIGNS[part] if all_of_them else ""
            kept = "" if all_of_them and part == " " else part
            out.append(f"<i>{sign}</i>{kept}" if sign else part)
        elif part and part.isspace() and unicodedata.category(part) == "Zs":
            out.append(f"<i>U+{ord(part):04X}</i>")
        else:
            out.append(_text(part))
    return "".join(out)


def _text(text: str) -> str:
    return escape(shown(text))


def _section(key: str, heading: str, html: str) -> str:
    return f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{heading}</h2>\n{html}</section>'


def _table(sets: Sequence[DatasetFacts]) -> str:
    heads = ("data set", "examples", "tokens", "trained", "end trained", "shortest", "median", "longest")
    rows = []
    for one in sets:
        shares = ("–" if share is None else f"{share:.1%}" for share in (one.trained_share, one.end_trained_share))
        lengths = (f"{length:,.0f}" for length in (one.shortest, one.median, one.longest))
        cells = (f"{one.examples:,}", f"{one.tokens:,}", *shares, *lengths)
        rows.append(f'<tr><th scope="row">{_text(one.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    head = "".join(f'<th scope="col"{"" if i else " class=text"}>{name}</th>' for i, name in enumerate(heads))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Data sets">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _histograms(sets: Sequence[DatasetFacts], several: bool) -> str:
    figures = []
    for one in sets:
        most = max((count for _, _, count in one.histogram), default=1)
        bars = "".join(
            f'<li><span>{least:,} – {largest:,}</span><span class="bar" style="width:{count / most:.2%}"></span>'
            f"<span>{count:,}</span></li>"
            for least, largest, count in one.histogram
        )
        longest = f"shortest {one.shortest:,}, median {one.median:,.0f}, longest {one.longest:,} tokens"
        name = f"{_text(one.name)}: " if several else ""
        caption = f"<figcaption>{name}{longest}</figcaption>"
        figures.append(f'<figure class="card">{caption}<ul class="bars">{bars}</ul></figure>')
    note = '<p class="note">Number of examples by their length in tokens.</p>'
    return f'{note}<div class="histograms">{"".join(figures)}</div>'
