"""Questions of evaluations, in any of the forms in which they are published or kept in files."""

from __future__ import annotations

import ast
import contextlib
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..io.bounded import weight
from .columns import Row, listed
from .hub_source import HubSource, SourceMissing
from .sources import SUFFIXES, Source, find_source, splits_of
from .word_runs import words

HubSets = tuple[tuple[str, str | None], ...]
"""Hub ids and subsets, whose splits ``test`` together are the questions."""
MATH: HubSets = tuple(
    ("EleutherAI/hendrycks_math", subject)
    for subject in (
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    )
)
GSM8K: HubSets = (("openai/gsm8k", "main"),)
HUMANEVAL: HubSets = (("evalplus/humanevalplus", None),)
PUBLISHED = {
    "math": MATH,
    "gsm8k": GSM8K,
    "humaneval": HUMANEVAL,
    "mbpp": (("google-research-datasets/mbpp", "full"),),
}
"""Name in ``data.decontaminate`` -> the sets of the hub. ``demo`` is known as well."""
KNOWN = (*PUBLISHED, "demo")

_KEY = "data.decontaminate"
_MOST = 1 << 28  # bytes of the rows of one set
_QUESTIONS = ("problem", "question", "query", "instruction", "prompt", "text", "sentence", "ctx", "input")
_DIALOGUES = ("messages", "conversations", "conversation", "prompt")
_ANSWERING = {"assistant", "gpt", "model", "bot", "chatgpt"}
_SOLUTIONS = ("canonical_solution", "code")
LEAST_OF_SOLUTION = 25
"""Words that a program needs to be looked for. Shorter ones, such as that of the greatest common divisor, are written
by anybody."""
_LEAST_OF_TASK = 13


class Text(NamedTuple):
    """A text of a row: its question, or its solution, which is looked for as a whole."""

    text: str
    whole: bool


def evaluation_sets(names: list[str]) -> dict[str, list[Source]]:
    """Return the sources of each name.

    Args:
        names: names of ``KNOWN``, files, or directories, of which the test split is taken if they have one.
    Raises:
        UserError: a name is neither known nor a file, or there are no such files.
    """
    return {name: _sources(name) for name in dict.fromkeys(names)}


def _sources(name: str) -> list[Source]:
    if name in PUBLISHED:
        return [HubSource(hub, subset, "test", None) for hub, subset in PUBLISHED[name]]
    if name == "demo":
        return [_Demo()]
    path = Path(name).expanduser()
    if not path.exists() and not (name.startswith((".", "/", "~")) or name.lower().endswith(SUFFIXES)):
        close = difflib.get_close_matches(name.lower(), KNOWN, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"{_KEY}: {name!r} is neither an evaluation set that is known ({', '.join(KNOWN)}) nor a file{hint}",
            key=_KEY,
        )
    splits = (splits_of(name) or ()) if path.exists() else ()
    split = next((split for split in ("test", "validation") if split in splits), "train")
    with _about_this_key():
        return [find_source(name, split=split)[0]]


class _Demo:
    """The held-out word problems of the package."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        from .demo_problems import held_out

        for number, problem in enumerate(held_out(), 1):
            yield f"demo problem {number}", dict(problem)

    def fingerprint(self) -> str:
        return str(list(self.rows()))


@contextlib.contextmanager
def _about_this_key() -> Iterator[None]:
    """A context in which errors about ``data.dataset`` are errors about ``data.decontaminate``."""
    try:
        yield
    except UserError as error:
        message = str(error).replace("data.dataset", _KEY)
        raise type(error)(message if _KEY in message else f"{_KEY}: {message}", key=_KEY) from None


def fingerprint(name: str, sources: list[Source]) -> str:
    """Return the identity of the content of an evaluation set.

    Raises:
        UserError: the set cannot be read, or is not here.
    """
    try:
        with _about_this_key():
            return "|".join(source.fingerprint() for source in sources)
    except SourceMissing as error:
        if name not in PUBLISHED:
            raise
        hubs = ", ".join(dict.fromkeys(hub for hub, _ in PUBLISHED[name]))
        raise SourceMissing(
            f"{_KEY}: the questions of {name} ({hubs}) are not on this machine, and the hub cannot be reached or does "
            f"not have them. Run the same command once with a network connection, or name a file of them: {_KEY}: "
            f"[{name}_test.jsonl]\n({error})",
            key=_KEY,
        ) from None


def texts_of(name: str, sources: list[Source]) -> Iterator[tuple[str, Text]]:
    """Yield the place of each row and the texts of it that are looked for.

    Raises:
        UserError: a row has no question, or the rows are too many; the message names the row.
    """
    total = found = 0
    with _about_this_key():
        for source in sources:
            for where, row in source.rows():
                if (total := total + weight(row)) > _MOST:
                    raise UserError(f"{where}: the rows up to this one take more than {_MOST >> 20} MiB; split the set")
                for text in _texts(row, where):
                    found += bool(words(text.text))
                    yield where, text
        if not found:
            raise UserError(f"{name} has no question with a word in it")


def _texts(row: Row, where: str) -> Iterator[Text]:
    function = isinstance(row.get("entry_point"), str) and isinstance(row.get("prompt"), str)
    yield Text(_task(str(row["prompt"])) if function else _question(row, where), False)
    if function or "test_list" in row:
        solutions = [str(row[key]) for key in _SOLUTIONS if isinstance(row.get(key), str)]
        yield from (Text(text, True) for text in solutions if len(words(text)) >= LEAST_OF_SOLUTION)


def _question(row: Row, where: str) -> str:
    for key in _DIALOGUES:
        if isinstance(turns := row.get(key), list):
            asked = [_said(turn) for turn in turns if isinstance(turn, Mapping) and _role(turn) in ("user", "human")]
            if any(asked):
                return "\n".join(asked)
    for key in _QUESTIONS:
        if isinstance(text := row.get(key), str) and text.strip():
            more = row.get("input") if key == "instruction" else None
            return f"{text}\n\n{more}" if isinstance(more, str) else text
    raise UserError(
        f"{where}: there is no question in this row; it has {listed(row)}, and a question is a text in "
        f"{', '.join(_QUESTIONS)}, or a message of the user in {_DIALOGUES[0]}"
    )


def _role(turn: Mapping[str, Any]) -> str:
    return str(turn.get("role", turn.get("from"))).lower()


def _said(turn: Mapping[str, Any]) -> str:
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _task(prompt: str) -> str:
    """Return what the docstring of a function says, without the examples if that is long enough to be recognised. The
    signature is left out: others write it too."""
    try:
        body = ast.parse(f"{prompt.rstrip()}\n    pass\n").body
        described = [ast.get_docstring(node) for node in body if isinstance(node, ast.FunctionDef)][-1] or prompt
    except (SyntaxError, IndexError, ValueError, RecursionError, MemoryError):
        return prompt
    said = described.partition(">>>")[0]
    return said if len(words(said)) >= _LEAST_OF_TASK else described
