"""The tokens that a server sees: those of each prompt encoded by itself, and of the turn that follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .served_turns import Rendered, Span, Turn

MARGIN = 1024
"""Tokens beyond the longest example on which a cut could have an effect."""
_ANCHORS = ("", "\n", ":", "a")
"""Texts before an answer of which at least one leaves its tokens as they are: some tokenizers put a space before a
text, and some join the anchor with the answer."""


class Tokens(NamedTuple):
    """Token ids, and the characters [begin, end) of each token; arrays of shape (length,), int32 and int64."""

    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


class Masked(NamedTuple):
    """Token ids, int32, and which of them carry loss, bool; both of shape (length,)."""

    ids: np.ndarray
    trained: np.ndarray


def tokens_of(encoding: Any) -> Tokens:
    """Return the ids and the characters [begin, end) of each token, which may be empty (byte-level lone spaces)."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return Tokens(np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1])


def overlaps(begins: np.ndarray, ends: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Return which tokens [begin, end) share a character with one of the spans, which are in order; bool, one per
    token."""
    if not spans:
        return np.zeros(len(begins), bool)
    starts, stops = np.array(spans, np.int64).T
    nearest = np.searchsorted(starts, ends, side="left") - 1  # the last span that starts before the token's end
    hit: np.ndarray = (nearest >= 0) & (stops[nearest] > begins)
    return hit


class ServedTokens:
    """Examples of one tokenizer whose prompts have the tokens that a server sees.

    A tokenizer may join the end of a prompt with the beginning of the answer when it encodes both at once. A server
    encodes the prompt alone, so such an answer is encoded by itself, behind the tokens of its prompt.

    Args:
        backend: the tokenizer's Rust half.
        encode: encodes a text, or a beginning of it that is longer than ``most`` tokens.
        most: the number of tokens of an example that are kept.
    """

    def __init__(self, backend: Any, encode: Callable[[str], Any], most: int) -> None:
        self._backend, self._encode, self._most = backend, encode, most
        added = backend.get_added_tokens_decoder().items()
        plain = (number for number, token in added if not (token.normalized or token.lstrip or token.rstrip))
        self._cutting = np.array(sorted(plain), np.int32)

    def examples(self, rendered: Rendered, where: str) -> tuple[list[Masked], bool]:
        """Return the examples of a text: one, unless the tokens of a prompt are not those of the text; and whether
        that is so.

        Raises:
            UserError: the tokens of an answer behind its prompt cannot be told.
        """
        text, turns = rendered
        whole = tokens_of(self._encode(text))
        if len(whole.ids) >= self._most + MARGIN:  # no more is kept
            reach = int(whole.ends[self._most + MARGIN - 1])
            text, turns = (
                text[:reach],
                [turn._replace(end=min(turn.end, reach)) for turn in turns if turn.start < reach],
            )
        trained = np.zeros(len(whole.ids), bool)
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            length = self._prompt_within(whole, text[: turn.start], in_full=following is None)
            if length is None or (following and not _breaks(whole, turn.end)):
                return list(self._apart(text, turns, where)), True
            hit = overlaps(whole.begins, np.maximum(whole.ends, whole.begins + 1), turn.spans)
            hit[:length] = False
            trained |= hit
        return [Masked(whole.ids, trained)], False

    def _prompt_within(self, whole: Tokens, prompt: str, *, in_full: bool) -> int | None:
        """Return the number of the prompt's tokens if the whole begins with them, else None.

        A tokenizer cuts a text at its special tokens first, so what stands behind such a token has no effect on the
        tokens before it. Unless ``in_full``, the prompt is therefore encoded from its last special token on, so that a
        conversation of many turns is not encoded many times.
        """
        if not prompt:
            return 0
        before, begin = 0, 0
        if not in_full:
            cuts = np.flatnonzero(np.isin(whole.ids, self._cutting) & (whole.ends <= len(prompt)))
            before = int(cuts[-1]) if len(cuts) else 0
            begin = int(whole.begins[before]) if len(cuts) else 0
        ids = self._tokens(prompt[begin:]).ids
        length = before + len(ids)
        return length if np.array_equal(whole.ids[before:length], ids) else None

    def _apart(self, text: str, turns: Sequence[Turn], where: str) -> Iterator[Masked]:
        """Yield examples of the turns, each behind the tokens of its own prompt: those in one example whose prompts
        begin with all the tokens before."""
        ids, trained = np.zeros(0, np.int32), np.zeros(0, bool)
        for turn in turns:
            prompt = self._tokens(text[: turn.start]).ids
            answer = self._answer(prompt, text, turn, where)
            hit = overlaps(answer.begins, np.maximum(answer.ends, answer.begins + 1), turn.spans)
            if len(ids) and not np.array_equal(prompt[: len(ids)], ids):
                yield Masked(ids, trained)
                trained = np.zeros(0, bool)
            trained = np.concatenate([trained, np.zeros(len(prompt) - len(trained), bool), hit])
            ids = np.concatenate([prompt, answer.ids])
        yield Masked(ids, trained)

    def _answer(self, prompt: np.ndarray, text: str, turn: Turn, where: str) -> Tokens:
        """Return the tokens of a turn that follow those of its prompt."""
        upto = text[: turn.end]
        whole = self._tokens(upto)
        if np.array_equal(whole.ids[: len(prompt)], prompt):
            return Tokens(*(part[len(prompt) :] for part in whole))
        meant = self._decoded(whole.ids)
        for anchor in _ANCHORS:
            found = self._tokens(anchor + upto[turn.start :])
            first = int(np.searchsorted(found.begins, len(anchor)))
            ids = found.ids[first:]
            if self._decoded(np.concatenate([prompt, ids])) == meant:
                shift = turn.start - len(anchor)
                return Tokens(ids, found.begins[first:] + shift, found.ends[first:] + shift)
        raise UserError(
            f"{where}: the tokenizer joins the end of a prompt with the beginning of the answer "
            f"({text[max(turn.start - 10, 0) : turn.start + 10]!r}), and the answer has no tokens of its own that give "
            "its text; end the prompt in the template with a special token, or with no space",
            key="data.template",
        )

    def _tokens(self, text: str) -> Tokens:
        return tokens_of(self._backend.encode(text, add_special_tokens=False))

    def _decoded(self, ids: np.ndarray) -> str:
        return str(self._backend.decode(ids.tolist(), skip_special_tokens=False))


def _breaks(tokens: Tokens, at: int) -> bool:
    """Whether a token ends at this character or before it, and none reaches over it."""
    return not bool(((tokens.begins < at) & (tokens.ends > at)).any())
