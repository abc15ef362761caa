"""Scores of the suites e2e (and any texts with references), samsum and wikisql: of responses, and of files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..data.columns import listed
from ..errors import UserError
from .nlg import Scored, score_texts
from .nlg_sets import PUBLISHED, add_tables, text_of
from .problems import Row, find_file, local_rows
from .rouge import score_summaries
from .wikisql import BadQuery, Engine, Query, Table, parse, read_query, read_table

SUITES = ("e2e", "samsum", "wikisql")
"""Suites whose metrics are computed here. ``--score`` calls the metrics of e2e ``nlg``, whatever the texts are."""
Prediction = Query | str
"""A query, or why there is none."""


def score_responses(suite: str, questions: Sequence[Row], responses: Sequence[str]) -> Scored:
    """Return the scores of responses to questions of ``nlg_sets.load``, whose values but ``query`` are JSON text."""
    if suite != "wikisql":
        return _texts(suite, responses, [json.loads(row["references"]) for row in questions])
    tables = [read_table(json.loads(row["table"])) for row in questions]
    predictions = [_parsed(text, table) for text, table in zip(responses, tables, strict=True)]
    golds = [read_query(json.loads(row["sql"])) for row in questions]
    return score_queries(golds, tables, predictions, responses)


def score_samples(suite: str, samples: Sequence[tuple[str, Row]], data: str | None) -> Scored:
    """Return the scores of the rows of a file.

    Args:
        samples: place and row. ``nlg`` (or ``e2e``) and ``samsum``: ``prediction`` and ``references``. ``wikisql``:
            ``prediction`` (text, or a query) or the published ``query`` and ``error``, and perhaps ``sql``, ``table``
            or ``table_id``.
        data: for ``wikisql``, a file or directory of the questions, in the order of the samples.
    Raises:
        UserError: a row lacks a field, or is of another kind.
    """
    if suite == "wikisql":
        return _queries(samples, data)
    if data is not None:
        raise UserError(f"--data is not for --score with --suite {suite}: its rows hold their `references`")
    texts = [text_of(row, where, ("prediction",), "the prediction") for where, row in samples]
    return _texts(suite, texts, [_references(row, where) for where, row in samples])


def _texts(suite: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    if suite == "samsum":
        rows, metrics = score_summaries(texts, references)
        return Scored(metrics, {}, rows)
    return score_texts(texts, references)


def _references(row: Row, where: str) -> list[str]:
    found = row.get("references")
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{where}: `references` must be a list of texts; the row has {listed(row)}")
    if not any(text.strip() for text in found):
        raise UserError(f"{where}: `references` is empty; give at least one text, or remove the row")
    return [text for text in found if text.strip()]


# WikiSQL


def score_queries(
    golds: Sequence[Query], tables: Sequence[Table | None], predictions: Sequence[Prediction], shown: Sequence[Any]
) -> Scored:
    """Return logical-form accuracy, for conditions in any order and in the same order, and execution accuracy: the
    share of queries that select the same values as the gold query does.

    Args:
        tables: None where a table is not known; then execution accuracy is not measured.
        shown: what the rows are to show as ``prediction``.
    Raises:
        UserError: a gold query does not run on its table.
    """
    rows: list[dict[str, Any]] = []
    engine: Engine | None = None
    for index, (gold, table, prediction) in enumerate(zip(golds, tables, predictions, strict=True)):
        form, reason = isinstance(prediction, Query), prediction if isinstance(prediction, str) else ""
        row = {
            "index": index,
            "prediction": shown[index],
            "lf": form and gold.same(prediction),  # type: ignore[arg-type]
            "lf_ordered": form and gold.same(prediction, ordered=True),  # type: ignore[arg-type]
        }
        if table is not None:
            if engine is None or engine.table != table:
                engine = Engine(table)  # questions on one table follow one another
            try:
                expected = engine.run(gold)
            except BadQuery as error:
                raise UserError(f"question {index + 1}: its own query does not run on its table: {error}") from None
            row["ex"], reason = _executes(engine, prediction, expected)
        row["correct"] = row.get("ex", row["lf"])
        rows.append({**row, "reason": reason or ("" if row["correct"] else "different")})
    names = {"lf_accuracy": "lf", "lf_accuracy_ordered": "lf_ordered", "ex_accuracy": "ex"}
    missing = {}
    if absent := sum(table is None for table in tables):
        del names["ex_accuracy"]
        missing["ex_accuracy"] = f"needs the tables, and {absent} of {len(tables)} rows have none (--data DIRECTORY)"
    return Scored({name: sum(row[key] for row in rows) / len(rows) for name, key in names.items()}, missing, rows)


def _executes(engine: Engine, prediction: Prediction, expected: list[Any]) -> tuple[bool, str]:
    if isinstance(prediction, str):
        return False, prediction
    try:
        return engine.run(prediction) == expected, ""
    except BadQuery as error:
        return False, str(error)


def _parsed(text: str, table: Table) -> Prediction:
    try:
        return parse(text, table.header)
    except BadQuery as error:
        return str(error)


def _queries(samples: Sequence[tuple[str, Row]], data: str | None) -> Scored:
    questions, path = list(samples), None
    if data is not None:
        path = find_file("wikisql", data, PUBLISHED["wikisql"].files)
        questions = list(local_rows(path))
        if len(questions) != len(samples):
            raise UserError(
                f"--data: {path} has {len(questions):,} questions for {len(samples):,} predictions; the two must be in "
                "the same order"
            )
    add_tables(questions, path, required=False)
    golds, tables, predictions = [], [], []
    for (where, row), (place, sample) in zip(questions, samples, strict=True):
        try:
            golds.append(read_query(row.get("sql")))
            tables.append(read_table(row["table"]) if "table" in row else None)
        except BadQuery as error:
            raise UserError(f"{where}: the gold query (`sql`) or `table`: {error}; the row has {listed(row)}") from None
        predictions.append(_prediction(sample, place, tables[-1]))
    shown = [sample.get("prediction", sample.get("query")) for _, sample in samples]
    return score_queries(golds, tables, predictions, shown)


def _prediction(row: Row, where: str, table: Table | None) -> Prediction:
    if row.get("error"):
        return str(row["error"])[:200]
    value = row.get("prediction", row.get("query"))
    if isinstance(value, str):
        if table is None:
            raise UserError(
                f"{where}: a prediction in text is read by the names of its table's columns: give the tables by "
                "--data, or a `table` in each row"
            )
        return _parsed(value, table)
    if value is None:
        raise UserError(f"{where}: there must be a `prediction` or `query`; the row has {listed(row)}")
    try:
        return read_query(value)
    except BadQuery as error:
        return str(error)


def scored_file(suite: str, samples: Sequence[tuple[str, Row]], data: str | None) -> dict[str, Any]:
    """Return the result of ``score.score_file``, with ``variants``, the definition of each metric."""
    scored = score_samples(suite, samples, data)
    return {
        "suite": suite,
        "samples": len(scored.rows),
        "metrics": scored.metrics,
        "not_measured": scored.missing,
        "variants": VARIANTS["e2e" if suite == "nlg" else suite],
        "rows": scored.rows,
    }


VARIANTS = {
    "e2e": {
        "bleu": "BLEU-4, lower case, mteval-13a tokens, closest reference length, no smoothing (sacrebleu)",
        "nist": "NIST-5 as measure_scores.py -p prints it (pymteval): mean reference length of each text",
        "nist_perl": "NIST-5 as measure_scores.py prints it without -p (mteval-v13a): mean length of all references",
        "meteor": "METEOR 1.5, English, -norm, on Penn Treebank tokens (pycocoevalcap)",
        "rouge_l": "ROUGE-L of coco-caption, beta 1.2, in [0, 1] (pycocoevalcap)",
        "cider": "CIDEr as coco-caption computes it, document frequencies of all references, x 10 (pycocoevalcap)",
    },
    "samsum": dict.fromkeys(
        ("rouge1", "rouge2", "rougeL"),
        "rouge-score with Porter's stemmer, mean F1 x 100; of several references the best; rougeL over the whole text",
    ),
    "wikisql": {
        "lf_accuracy": "logical form, conditions in any order, values as lower-case text",
        "lf_accuracy_ordered": "logical form, conditions in the same order",
        "ex_accuracy": "the selected values equal those of the gold query, on SQLite in lower case",
    },
}
