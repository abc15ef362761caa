"""The sets that a recipe names without a path: the hub id, columns, labels and splits of each. Those of GLUE (Wang et
al., 2019) are as on the hub, in ``nyu-mll/glue``."""

from __future__ import annotations

from typing import NamedTuple

from ..models.task import Head

BUILT_IN = {
    "metamathqa": ("meta-math/MetaMathQA", {"query": "query", "response": "response"}),
    "magicoder": ("ise-uiuc/Magicoder-Evol-Instruct-110K", {"query": "instruction", "response": "response"}),
    "e2e": ("tuetschek/e2e_nlg", {"query": "meaning_representation", "response": "human_reference"}),
    "samsum": ("knkarthick/samsum", {"query": "dialogue", "response": "summary"}),
}
"""Name -> (hub id, columns). The paper's two training sets (Appendix C), and two of LoRA's. ``demo`` is built in as
well."""
REVISIONS = {"e2e": "refs/convert/parquet"}
"""Revision of a built-in set whose main branch has a script for rows, which datasets no longer runs."""

HUB = "nyu-mll/glue"
"""Hub id of the sets of GLUE; the name of a set is its subset."""


class Glue(NamedTuple):
    """A set of GLUE."""

    texts: tuple[str, ...]
    """The columns of a text, or of a pair of texts."""
    labels: tuple[str, ...]
    """Names of the labels 0, 1, ...; empty for a regression."""
    splits: tuple[str, ...] = ("validation",)
    """The labelled splits that are held out. The labels of the test splits are not published."""

    @property
    def columns(self) -> dict[str, str]:
        """The columns, as ``data.columns`` names them."""
        return dict(zip(("text", "text_pair"), self.texts, strict=False)) | {"label": "label"}

    @property
    def head(self) -> Head:
        return Head(self.labels, "single_label" if self.labels else "regression")


_ENTAILED = ("entailment", "not_entailment")
GLUE = {
    "glue/sst2": Glue(("sentence",), ("negative", "positive")),
    "glue/cola": Glue(("sentence",), ("unacceptable", "acceptable")),
    "glue/mrpc": Glue(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "glue/qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate")),
    "glue/stsb": Glue(("sentence1", "sentence2"), ()),
    "glue/rte": Glue(("sentence1", "sentence2"), _ENTAILED),
    "glue/qnli": Glue(("question", "sentence"), _ENTAILED),
    "glue/mnli": Glue(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("validation_matched", "validation_mismatched"),
    ),
}
"""The sets by their name in ``data.dataset``."""
CLASSIFIED = ("classification", *GLUE)
"""Suites of classifiers. ``classification`` is any file of texts and labels."""
