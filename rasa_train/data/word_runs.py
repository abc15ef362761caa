"""The words of texts, and which texts of a collection another text has word for word.

Words are runs of letters or of digits, without case, accents and punctuation, so that neither line breaks nor the
spacing of LaTeX tell a copy from its original. In scripts without spaces, each character is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

RUN = 13
"""Words of the runs that are compared (Brown et al., 2020, appendix C)."""
SHORTEST = 8
"""Words from which a text is found anywhere in another. A shorter one is found only where it is all of the other."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[0-9]+|[^\W0-9_{_UNSPACED}]+")
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[-+*/=<>^](?=[\s$({{\[]*(?:[0-9]|\\|[^\W0-9_](?![^\W0-9_])))")
"""Signs count before numbers, letters and commands of LaTeX: others are punctuation, or Markdown's."""
_UNSEEN = re.compile("[\u00ad\u0300-\u036f\u200b-\u200f\u2060\ufeff]")  # soft hyphens, accents, characters of no width
_SIGNS = str.maketrans(
    "\u2010\u2011\u2012\u2013\u2014\u2212\u00d7\u22c5\u00b7\u00f7\u2215\u2264\u2265", "------***//<>"
)
_GROUPED = re.compile(r"(?<=[0-9])(?:,|\{,\}|\\!?,|\\ )(?:\\!)?(?=[0-9]{3}(?![0-9]))")  # 1,000 and 1{,}000
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigmaf sigma tau upsilon "
    "phi chi psi omega"
)
_UNSEEN_COMMANDS = """
    left right big bigl bigr bigg biggl biggr quad qquad hspace vspace displaystyle textstyle limits phantom
    text textbf textit textrm mbox mathrm mathbf mathit mathsf mathbb mathcal operatorname boldsymbol
    dots ldots cdots circ degree sqrt infty in notin subset subseteq cap cup setminus emptyset angle triangle perp
    parallel pm mp ne neq approx equiv sim cong to rightarrow implies iff mapsto sum prod int
    lfloor rfloor lceil rceil mid
"""
_COMMANDS = {
    **dict.fromkeys(("cdot", "times"), "*"),
    **dict.fromkeys(("div",), "/"),
    **dict.fromkeys(("le", "leq", "leqslant"), "<"),
    **dict.fromkeys(("ge", "geq", "geqslant"), ">"),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(_UNSEEN_COMMANDS.split(), " "),
    **{name: chr(0x3B1 + place) for place, name in enumerate(_GREEK.split())},
}
"""Commands of LaTeX that set the same text in another way or that a sign of Unicode replaces, and what stands for
each: nothing for what is no word as a sign of Unicode either."""
_COMMAND = re.compile(rf"\\({'|'.join(sorted(_COMMANDS, key=len, reverse=True))})(?![a-z])")


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return _WORD.findall(_plain(text))


def exactly(text: str) -> str:
    """Return the words and signs of arithmetic of a text, with a space around each: ``2 + 2`` is not ``2 * 2``."""
    return f" {' '.join(_WORD_OR_SIGN.findall(_plain(text)))} "


def _plain(text: str) -> str:
    if not text.isascii():
        text = _UNSEEN.sub("", unicodedata.normalize("NFKD", text)).translate(_SIGNS)
    text = text.casefold().replace("**", " ")
    if "," in text or "\\" in text:
        text = _GROUPED.sub("", text)
    if "\\" in text:
        text = _COMMAND.sub(lambda found: f" {_COMMANDS[found[1]]} ", text)
    return text


class Text(NamedTuple):
    """A text to look for."""

    text: str
    label: int
    """What it belongs to, as the caller numbers it."""
    whole: bool = False
    """Whether only all of it counts, unchanged."""


class Hit(NamedTuple):
    """A text that was found."""

    part: int
    """Place of the other text in the list that was looked at."""
    label: int
    words: str
    """The longest run of words that the two share."""


@dataclass(frozen=True)
class WordRuns:
    """An index of texts.

    A text is found in another that shares runs of ``RUN`` words with it if these runs together are at least ``share``
    of its words, and one of them is in no other text of the index: what several texts have in common is a phrase. A
    text that has no run of its own, because it is short or all of it is in another, is found if all of it is in the
    other, and if it has fewer than ``SHORTEST`` words, only if it is all of the other.

    Args:
        vocabulary: word -> number, from 1.
        numbers: int32 numbers of the words of all texts, one text after another, each followed by a 0.
        starts: int64, the place of each text in ``numbers``, and the end of the last.
        exact: ``exactly`` of each text that is found as a whole; empty for the others.
        labels: the label of each text.
        share: part of a text's words.
    """

    vocabulary: dict[str, int]
    numbers: np.ndarray
    starts: np.ndarray
    exact: list[str]
    labels: list[int]
    share: float

    @classmethod
    def of(cls, texts: Iterable[Text], share: float) -> WordRuns:
        """Return the index of texts. Of texts with the same words and signs, one is kept for each label."""
        vocabulary: dict[str, int] = {}
        kept: dict[tuple[str, int], tuple[np.ndarray, bool]] = {}
        for text, label, whole in texts:
            if (key := (exactly(text), label)) not in kept:
                known = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in words(text)]
                if known:
                    kept[key] = np.array(known, np.int32), whole
        end = np.zeros(1, np.int32)
        numbers = np.concatenate([part for array, _ in kept.values() for part in (array, end)] or [end])
        starts = np.cumsum([0, *(len(array) + 1 for array, _ in kept.values())])
        made = cls(vocabulary, numbers, starts, [""] * len(kept), [label for _, label in kept], share)
        own = made._has_own_run()
        made.exact[:] = [
            exact if whole or not own[i] else "" for i, ((exact, _), (_, whole)) in enumerate(kept.items())
        ]
        return made

    def __len__(self) -> int:
        return len(self.labels)

    def hits(self, parts: Sequence[str]) -> Iterator[Hit]:
        """Yield the texts of the index that are in the parts: for each part and each label, one at most."""
        get = self.vocabulary.get
        split = [words(part) for part in parts]
        numbers = np.array([get(word, 0) for part in split for word in (*part, "")], np.int32)
        starts = np.cumsum([0, *(len(part) + 1 for part in split)])
        found: dict[tuple[int, int], Hit] = {}
        for part, text, run in sorted({*self._in_runs(numbers, starts), *self._as_a_whole(numbers, starts, parts)}):
            hit = Hit(part, self.labels[text], run)
            found.setdefault((part, hit.label), hit)
        yield from found.values()

    def _in_runs(self, numbers: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, int, str]]:
        """Yield (part, text, shared words) of the texts that are found by their runs."""
        hashes, places = self._runs
        found, at = _lookup(_hashes(numbers, RUN), hashes)
        covered: dict[tuple[int, int], set[int]] = {}  # (part, text) -> places of runs in the text
        for here, first in zip(at.tolist(), found.tolist(), strict=True):
            part = int(np.searchsorted(starts, here, "right")) - 1
            last = min(np.searchsorted(hashes, hashes[first], "right"), first + _MOST_EQUAL)
            for place in places[first:last]:
                if (self.numbers[place : place + RUN] == numbers[here : here + RUN]).all():
                    text = int(np.searchsorted(self.starts, place, "right")) - 1
                    covered.setdefault((part, text), set()).add(int(place))
        for (part, text), runs in covered.items():
            start, end = self.starts[text], self.starts[text + 1] - 1
            mask = np.zeros(end - start, bool)
            for place in runs:
                mask[place - start : place - start + RUN] = True
            if not self.exact[text] and mask.mean() >= self.share and any(self._is_own(place) for place in runs):
                yield part, text, self._shown(start + _longest(mask))

    def _as_a_whole(
        self, numbers: np.ndarray, starts: np.ndarray, parts: Sequence[str]
    ) -> Iterator[tuple[int, int, str]]:
        """Yield (part, text, shared words) of the texts that are found only as a whole."""
        hashes, places = self._beginnings
        found, at = _lookup(_hashes(numbers, SHORTEST), hashes)
        for here, first in zip(at.tolist(), found.tolist(), strict=True):
            part = int(np.searchsorted(starts, here, "right")) - 1
            for place in places[first : np.searchsorted(hashes, hashes[first], "right")]:
                text = int(np.searchsorted(self.starts, place, "right")) - 1
                if self.exact[text] in exactly(parts[part]):
                    yield part, text, self._shown(np.arange(self.starts[text], self.starts[text + 1] - 1))
        for part in np.nonzero(np.diff(starts) <= SHORTEST)[0].tolist():
            for text in self._short.get(exactly(parts[part]), ()):
                yield part, text, self._shown(np.arange(self.starts[text], self.starts[text + 1] - 1))

    def _shown(self, places: np.ndarray) -> str:
        return " ".join(self._names[number] for number in self.numbers[places].tolist())

    @cached_property
    def _names(self) -> list[str]:
        return ["", *self.vocabulary]

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of all runs, sorted, and their places in ``numbers``."""
        hashes = _hashes(self.numbers, RUN)
        places = np.nonzero(_whole_windows(self.numbers, RUN))[0]
        order = np.argsort(hashes[places], kind="stable")
        return hashes[places][order], places[order]

    @cached_property
    def _beginnings(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of the beginnings of the texts that are found as a whole, sorted, and their places."""
        lengths = np.diff(self.starts) - 1
        wanted = [i for i, exact in enumerate(self.exact) if exact and lengths[i] >= SHORTEST]
        places = self.starts[wanted]
        hashes = _hashes(self.numbers, SHORTEST)[places]
        order = np.argsort(hashes, kind="stable")
        return hashes[order], places[order]

    @cached_property
    def _short(self) -> dict[str, list[int]]:
        lengths = np.diff(self.starts) - 1
        short: dict[str, list[int]] = {}
        for text, exact in enumerate(self.exact):
            if exact and lengths[text] < SHORTEST:
                short.setdefault(exact, []).append(text)
        return short

    @cached_property
    def _own(self) -> np.ndarray:
        """Whether the run at each place of ``numbers`` is in one text only, whatever its label; bool."""
        hashes, places = self._runs
        own = np.zeros(len(self.numbers), bool)
        if len(hashes):
            texts = self._same[np.searchsorted(self.starts, places, "right") - 1]
            first = np.nonzero(np.append(True, hashes[1:] != hashes[:-1]))[0]
            one = np.minimum.reduceat(texts, first) == np.maximum.reduceat(texts, first)
            own[places] = np.repeat(one, np.diff(np.append(first, len(hashes))))
        return own

    @cached_property
    def _same(self) -> np.ndarray:
        """For each text the first one that has the same words; int64."""
        seen: dict[bytes, int] = {}
        ends = self.starts[1:]
        spans = zip(self.starts, ends, strict=False)
        return np.array([seen.setdefault(self.numbers[a:b].tobytes(), i) for i, (a, b) in enumerate(spans)], np.int64)

    def _is_own(self, place: int) -> bool:
        return bool(self._own[place])

    def _has_own_run(self) -> np.ndarray:
        return np.array([self._own[a:b].any() for a, b in zip(self.starts, self.starts[1:], strict=False)], bool)


_MOST_EQUAL = 1000  # texts that have a run in common and are looked at
_BASE = np.uint64(0x9E3779B97F4A7C15)


def _hashes(numbers: np.ndarray, width: int) -> np.ndarray:
    """Return the hash of the words from each place on; uint64, of the shape of ``numbers``."""
    mixed = numbers.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> np.uint64(32)
    padded = np.append(mixed, np.zeros(width, np.uint64))
    total = np.zeros(len(numbers), np.uint64)
    for i in range(width):
        total = total * _BASE + padded[i : i + len(numbers)]
    total[~_whole_windows(numbers, width)] = 0
    return total


def _whole_windows(numbers: np.ndarray, width: int) -> np.ndarray:
    """Return whether ``width`` known words start at each place; bool."""
    unknown = np.append(np.cumsum(np.append(0, numbers == 0)), np.zeros(width, np.int64))
    last = len(numbers) - width
    whole = np.zeros(len(numbers), bool)
    if last >= 0:
        whole[: last + 1] = unknown[width : width + last + 1] == unknown[: last + 1]
    return whole


def _lookup(hashes: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first place in ``known`` of the hashes that are there, and their places in ``hashes``."""
    at = np.nonzero(hashes)[0]
    first = np.searchsorted(known, hashes[at])
    hit = (first < len(known)) & (known[np.minimum(first, len(known) - 1)] == hashes[at]) if len(known) else first < 0
    return first[hit], at[hit]


def _longest(mask: np.ndarray) -> np.ndarray:
    """Return the places of the longest run of True."""
    edges = np.nonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))[0].reshape(-1, 2)
    start, end = max(edges.tolist(), key=lambda edge: edge[1] - edge[0])
    return np.arange(start, end)
