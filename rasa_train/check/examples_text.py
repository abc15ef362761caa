"""Examples and their numbers as text for a terminal, at 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from ..errors import shown
from .examples import DatasetFacts, Inspection, Piece, Shown

WIDTH = 80
MOST, HEAD, TAIL = 900, 600, 200
"""Characters of a part that is shown whole, and of the beginning and the end of a longer one."""
PARTS = 40
"""Most parts of an example, trained and not trained by turns, that are all shown."""


def marked(pieces: Sequence[Piece], *, whole: bool = False) -> Text:
    """Return the text of an example with what is trained on marked »like this«.

    Args:
        whole: whether to show all of it, however long it is.
    """
    joined = ((on, "".join(piece.text for piece in run)) for on, run in groupby(pieces, key=lambda p: p.trained))
    parts = [(on, shown(text)) for on, text in joined]
    if len(parts) > PARTS and not whole:
        left_out = len(parts) - PARTS
        parts = [*parts[: PARTS // 2], (False, f"\n[... {left_out:,} parts ...]\n"), *parts[-PARTS // 2 :]]
    found = Text()
    for on, text in parts:
        if len(text) > MOST and not whole:
            text = f"{text[:HEAD]} [... {len(text) - HEAD - TAIL:,} characters ...] {text[-TAIL:]}"
        found.append(f"»{text}«" if on else text, style="green" if on else "")
    return found


def text_of(example: Shown, *, whole: bool = False) -> Text:
    """Return the text of an example; of a text to classify, with its answer."""
    found = marked(example.pieces, whole=whole)
    return found if example.answer is None else found.append(f" -> {shown(example.answer)}")


def title(example: Shown) -> str:
    """Return a line about an example."""
    trained = "" if example.answer is not None else f", {example.trained_tokens:,} trained"
    return f"example {example.index} ({example.why}): {example.tokens:,} tokens{trained}"


def show(found: Inspection, *, examples: bool = True) -> None:
    """Print what was found, and its ``examples``."""
    probe = Console()
    console = Console(width=min(probe.width, 100) if probe.is_terminal else WIDTH, highlight=False)

    def line(text: str, style: str = "") -> None:
        console.print(Text(shown(text), style=style))

    for name, value in facts(found):
        line(f"{name:<10} {value}")
    for dataset in found.facts:
        line("")
        line(f"{dataset.name}: {_numbers(dataset)}" if len(found.facts) > 1 else "examples by length in tokens", "bold")
        for bar in bars(dataset.histogram):
            line(bar)
    for example in found.examples if examples else ():
        line("")
        several = f"{example.dataset}, " if len(found.facts) > 1 else ""
        line(f"{several}{title(example)}", "bold")
        console.print(text_of(example))
    if examples and not found.labels:
        line("")
        line("What is trained on is marked »like this«. --html FILE writes a page with every token of the examples.")


def facts(found: Inspection) -> list[tuple[str, str]]:
    """Return the numbers of all data sets together, as (name, words)."""
    stats, sets = found.stats, found.facts
    tokens = sum(dataset.tokens for dataset in sets)
    cut = [
        f"{stats.truncated:,} cut at data.max_length" if stats.truncated else "",
        f"{stats.dropped_over_length:,} dropped as too long" if stats.dropped_over_length else "",
        f"{stats.dropped_unsupervised:,} dropped because nothing of them is trained on"
        if stats.dropped_unsupervised
        else "",
    ]
    rows = [
        ("data", found.dataset if found.labels else f"{found.dataset}, template {found.template}"),
        ("rows", ", ".join([f"{stats.rows:,}", *filter(None, cut)])),
        ("examples", f"{stats.examples:,}, and {found.validation_examples:,} held out"),
    ]
    if found.labels:
        return [*rows, *found.labels.lines(), *(("note", note) for note in found.notes)]
    rows.append(("tokens", f"{tokens:,}, of which {stats.supervised_tokens / max(tokens, 1):.1%} are trained on"))
    looked = [dataset for dataset in sets if dataset.end_trained_share is not None]
    if looked:
        share = sum(d.examples * (d.end_trained_share or 0.0) for d in looked) / sum(d.examples for d in looked)
        rows.append(("end", f"{' or '.join(found.end_tokens)} is trained on in {share:.1%} of the examples"))
    return [*rows, *(("note", note) for note in found.notes)]


def bars(histogram: Sequence[tuple[int, int, int]]) -> list[str]:
    """Return the lines of a histogram."""
    if not histogram:
        return ["  none"]
    most = max(count for _, _, count in histogram)
    wide, high = (len(f"{max(bar[i] for bar in histogram):,}") for i in (1, 2))
    room = WIDTH - 2 * wide - high - 8
    return [
        f"  {least:>{wide},} - {largest:>{wide},}  {count:>{high},} {'█' * -(-count * room // most)}".rstrip()
        for least, largest, count in histogram
    ]


def _numbers(facts: DatasetFacts) -> str:
    words = [f"{facts.examples:,} examples"]
    if facts.trained_share is not None:
        words.append(f"{facts.trained_share:.1%} of {facts.tokens:,} tokens trained on")
    if facts.end_trained_share is not None:
        words.append(f"the end in {facts.end_trained_share:.1%}")
    return ", ".join(words)
