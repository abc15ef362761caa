"""Scores of generated text against several references: BLEU, NIST, METEOR, ROUGE-L and CIDEr, as in the E2E challenge.

The figures are those of the challenge's own script (tuetschek/e2e-metrics): BLEU-4 and NIST-5 on lower-cased
mteval-13a tokens; METEOR 1.5, ROUGE-L and CIDEr on Penn Treebank tokens without punctuation. The script has two
variants of NIST, and both are computed: ``nist`` is that of its option ``-p`` (pymteval), with which the scores of the
LoRA paper were made; ``nist_perl`` is that of mteval-v13a, with which those of the challenge were made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from ..errors import UserError
from .nlg_java import JavaFailed, meteor, treebank

Ngram = tuple[str, ...]

BETA = -math.log(0.5) / math.log(1.5) ** 2
"""Steepness of NIST's length penalty: 0.5 for a text of two thirds of the length of its references."""
NIST_N, BLEU_N = 5, 4
METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider", "nist_perl")


@dataclass(frozen=True)
class Scored:
    """Scores of all texts together, why others are missing, and the scores of each text on its own."""

    metrics: dict[str, float]
    missing: dict[str, str]
    """Why a metric is not among ``metrics``, by its name."""
    rows: list[dict[str, Any]]
    """``index``, ``prediction``, and for this text alone ``bleu``, ``sentence_bleu`` (each count plus one), ``nist``,
    ``meteor``, ``rouge_l`` and ``cider``; inverse document frequencies of CIDEr are those of all references."""


def score_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """Return the scores of texts, each against one or more references.

    Raises:
        UserError: sacrebleu is not installed. METEOR, ROUGE-L and CIDEr are left out without pycocoevalcap or Java.
    """
    needs("sacrebleu")
    texts = [_one_line(text) for text in predictions]
    targets = [[_one_line(text) for text in group] for group in references]
    bleu, nist, rows = _by_ngrams(texts, targets)
    for index, row in enumerate(rows):
        row["index"], row["prediction"] = index, predictions[index]
    metrics = {"bleu": bleu, **nist}
    missing = _by_words(texts, targets, metrics, rows)
    return Scored({name: metrics[name] for name in METRICS if name in metrics}, missing, rows)


def needs(package: str) -> None:
    """Raise ``UserError`` unless a package of the extra ``nlg`` is installed."""
    if find_spec(package) is None:
        raise UserError(f"scores of generated text need {package}: pip install 'rasa_train[nlg]'")


def _one_line(text: str) -> str:
    return " ".join(text.split())


# BLEU and NIST


def _by_ngrams(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, dict[str, float], list[dict[str, Any]]]:
    """Return BLEU, both variants of NIST, and a row with the scores of each text."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    scorer, tokenizer = BLEU(lowercase=True, tokenize="none", max_ngram_order=BLEU_N), Tokenizer13a()
    hits, totals, lengths = [0] * BLEU_N, [0] * BLEU_N, [0, 0]
    whole, rows = Nist(), []
    for text, group in zip(texts, references, strict=True):
        words, targets = tokenizer(text).lower(), [tokenizer(target).lower() for target in group]
        found = scorer.corpus_score([words], [[target] for target in targets])
        hits = [a + b for a, b in zip(hits, found.counts, strict=True)]
        totals = [a + b for a, b in zip(totals, found.totals, strict=True)]
        lengths = [lengths[0] + found.sys_len, lengths[1] + found.ref_len]
        own = Nist()
        for nist in (whole, own):
            nist.add(words.split(), [target.split() for target in targets])
        rows.append(
            {
                "bleu": _bleu(found.counts, found.totals, found.sys_len, found.ref_len),
                "sentence_bleu": _bleu(
                    [n + 1 for n in found.counts], [n + 1 for n in found.totals], found.sys_len, found.ref_len
                ),
                "nist": own.scores()["nist"],
            }
        )
    return _bleu(hits, totals, *lengths), whole.scores(), rows


def _bleu(hits: Sequence[int], totals: Sequence[int], length: int, reference: int) -> float:
    """Return BLEU of counts, without smoothing: 0 if any count of hits is."""
    from sacrebleu.metrics.bleu import BLEU

    found = BLEU.compute_bleu(list(hits), list(totals), length, reference, "none", max_ngram_order=BLEU_N)
    return float(found.score) / 100


@dataclass
class Nist:
    """Counts for NIST-5 (Doddington 2002): matched n-grams weigh what they inform, which the references say."""

    seen: Counter[Ngram] = field(default_factory=Counter)
    """Occurrences of each n-gram in all references; of the empty one, their words."""
    matched: list[Counter[Ngram]] = field(default_factory=lambda: [Counter() for _ in range(NIST_N)])
    totals: list[int] = field(default_factory=lambda: [0] * NIST_N)
    texts: int = 0
    references: int = 0
    expected: float = 0.0
    """Sum over the texts of the mean length of a text's references."""

    def add(self, words: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add a text and its references, as tokens."""
        most: Counter[Ngram] = Counter()
        for reference in references:
            counts = Counter(gram for n in range(1, NIST_N + 1) for gram in _ngrams(reference, n))
            self.seen.update(counts)
            most |= counts
        self.seen[()] += sum(map(len, references))
        for n in range(1, NIST_N + 1):
            own = Counter(_ngrams(words, n))
            self.matched[n - 1].update(own & most)
            self.totals[n - 1] += own.total()
        self.texts += 1
        self.references += sum(bool(reference) for reference in references)
        self.expected += sum(map(len, references)) / len(references)

    def scores(self) -> dict[str, float]:
        """Return ``nist`` and ``nist_perl``. They differ only in the length that a shorter text is held against: the
        sum of each text's mean length of its references, or all references' mean length times the texts."""
        total = sum(
            sum(hits * math.log2(self.seen[gram[:-1]] / self.seen[gram]) for gram, hits in matched.items())
            / max(possible, 1)
            for matched, possible in zip(self.matched, self.totals, strict=True)
        )
        pooled = self.seen[()] / max(self.references, 1) * self.texts
        lengths = {"nist": self.expected, "nist_perl": pooled}
        return {name: total * _penalty(self.totals[0], length) for name, length in lengths.items()}


def _penalty(length: int, expected: float) -> float:
    if length >= expected:
        return 1.0
    return math.exp(-BETA * math.log(length / expected) ** 2) if length else 0.0


def _ngrams(words: Sequence[str], n: int) -> list[Ngram]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


# METEOR, ROUGE-L and CIDEr


def _by_words(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: dict[str, float],
    rows: Sequence[dict[str, Any]],
) -> dict[str, str]:
    """Add METEOR, ROUGE-L and CIDEr to the metrics and rows. Return why those that are missing are."""
    names = ("meteor", "rouge_l", "cider")
    if find_spec("pycocoevalcap") is None:
        return dict.fromkeys(names, "needs pycocoevalcap: pip install 'rasa_train[nlg]'")
    try:
        words = treebank([*texts, *(text for group in references for text in group)])
    except JavaFailed as error:
        return dict.fromkeys(names, str(error))
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rest = iter(words[len(texts) :])
    results = {i: [text] for i, text in enumerate(words[: len(texts)])}
    truths = {i: [next(rest) for _ in group] for i, group in enumerate(references)}
    found = {
        "rouge_l": Rouge().compute_score(truths, results),
        "cider": Cider().compute_score(truths, results),
    }
    missing = {}
    try:
        found["meteor"] = meteor(truths, results)
    except JavaFailed as error:
        missing["meteor"] = str(error)
    for name, (together, each) in found.items():
        metrics[name] = float(together)
        for row, value in zip(rows, each, strict=True):
            row[name] = float(value)
    return missing
