"""WikiSQL: queries as text, logical forms against published counts, execution against SQLite by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rasa_train.errors import UserError
from rasa_train.evaluate import wikisql
from rasa_train.evaluate.generated import score_queries
from rasa_train.evaluate.nlg_sets import load
from rasa_train.evaluate.wikisql import BadQuery, Engine, Query, Table, parse, query_text, read_query, read_table

DATA = Path(__file__).parents[2].parent / "shared/data/slides/wikisql"
TABLE = {
    "id": "1-1",
    "header": ["Player", "No.", "Team and city", "Team"],
    "types": ["text", "real", "text", "text"],
    "rows": [["Ann", 7, "Red and Oslo", "Red"], ["BO", 21.5, "Blue and Rome", "Blue"], ["Cy", None, "Red", "Red"]],
}
HEADER = TABLE["header"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.skipif(not DATA.is_dir(), reason="no WikiSQL here")
def test_published_counts() -> None:
    """8,421 example predictions: 3,807 and 3,715 by the published evaluation; and every gold query survives as text."""
    golds, samples = rows_of(DATA / "dev_full.jsonl.gz"), rows_of(DATA / "pred_full.jsonl.gz")
    forms = [read_query(row["sql"]) for row in golds]
    predictions = [row["error"] or read_query(row["query"]) for row in samples]
    scored = score_queries(forms, [None] * len(forms), predictions, predictions)
    assert sum(row["lf"] for row in scored.rows) == 3807 and sum(row["lf_ordered"] for row in scored.rows) == 3715
    assert scored.metrics["lf_accuracy"] == pytest.approx(0.452084, abs=5e-7)
    assert scored.metrics["lf_accuracy_ordered"] == pytest.approx(0.441159, abs=5e-7)
    assert sum(row["lf"] for row in scored.rows[:600]) == 270 == sum(row["lf_ordered"] for row in scored.rows[:600])
    header = [f"Column {i}" for i in range(60)]
    assert all(parse(query_text(form, header), header).same(form, ordered=True) for form in forms[::10])


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("SELECT Player FROM table", Query(0, 0, ())),
        ("select max(no.) from table where TEAM = red", Query(1, 1, ((3, 0, "red"),))),
        ("SELECT COUNT Team FROM table WHERE No. > 7 AND Team and city = Red and Oslo", None),
        (
            "SELECT AVG No. FROM t1 WHERE Team = a AND b AND Player = Ann;",
            Query(1, 5, ((3, 0, "a AND b"), (0, 0, "Ann"))),
        ),
        ('SELECT "Player" FROM table WHERE `Team` < "x"', Query(0, 0, ((3, 2, '"x"'),))),
    ],
)
def test_queries_in_text(text: str, query: Query | None) -> None:
    """The longest column wins, and an AND within a value is none between conditions."""
    expected = query or Query(3, 3, ((1, 1, "7"), (2, 0, "Red and Oslo")))
    assert parse(text, HEADER) == expected


@pytest.mark.parametrize(
    "text",
    ["", "DROP TABLE t", "SELECT", "SELECT x FROM table", "SELECT Player",
     "SELECT Player FROM table WHERE Team ~ Red", "SELECT Player FROM table; DELETE FROM table", "SELECT (Team FROM t",
     "SELECT MAX FROM table", "SELECT Player FROM table WHERE Nobody = 1", "AND " * 5000,
     "SELECT Player FROM table WHERE =", "SELECT No FROM table"],
)  # fmt: skip
def test_texts_that_are_no_query(text: str) -> None:
    with pytest.raises(BadQuery):
        parse(text, HEADER)


def test_execution() -> None:
    engine = Engine(read_table(TABLE))
    assert engine.run(Query(0, 0, ((3, 0, "RED"),))) == ["ann", "cy"]
    assert engine.run(Query(1, 4, ())) == [28.5] and engine.run(Query(0, 3, ((1, 1, "about 7 or so"),))) == [1]
    assert engine.run(Query(0, 0, ((1, 0, "21.5"), (3, 0, "blue")))) == ["bo"]
    assert engine.run(Query(0, 0, ((3, 0, "x' OR '1'='1"),))) == []
    assert engine.run(Query(0, 0, ((1, 0, 10**30),))) == [] and engine.run(Query(1, 1, ((0, 0, "nobody"),))) == [None]
    for bad in (
        Query(4, 0, ()),
        Query(-1, 0, ()),
        Query(0, 6, ()),
        Query(0, 0, ((0, 3, "a"),)),
        Query(0, 0, ((9, 0, "a"),)),
    ):
        with pytest.raises(BadQuery):
            engine.run(bad)
    with pytest.raises(BadQuery, match="a number column is compared with 'red'"):
        engine.run(Query(0, 0, ((1, 0, "Red"),)))
    with pytest.raises(BadQuery, match="SQLite"):
        engine.run(Query(0, 0, ((0, 0, "\ud800"),)))
    with pytest.raises(Exception, match="readonly"):
        engine.connection.execute("DELETE FROM t")


def test_a_query_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikisql, "STEPS", 200_000)
    engine = Engine(Table(("a",), ("text",), tuple((f"value {i}",) for i in range(5_000))))
    with pytest.raises(BadQuery, match="interrupted"):
        engine.run(Query(0, 3, tuple((0, 1, f"v{i}") for i in range(100))))


@pytest.mark.parametrize(
    "value",
    [None, [], {"sel": 0}, {"sel": "0", "agg": 0, "conds": []}, {"sel": True, "agg": 0, "conds": []},
     {"sel": 0, "agg": 0, "conds": [[0, 0]]}, {"sel": 0, "agg": 0, "conds": [[0, 0, None]]},
     {"sel": 0, "agg": 0, "conds": [[[], 0, "a"]]},
     {"sel": 0, "agg": 0, "conds": {"column_index": [1], "operator_index": [], "condition": ["a"]}}],
)  # fmt: skip
def test_objects_that_are_no_query(value: Any) -> None:
    with pytest.raises(BadQuery):
        read_query(value)


def sql(sel: int, agg: int, *conds: list[Any]) -> dict[str, Any]:
    return {"sel": sel, "agg": agg, "conds": list(conds)}


def test_score_with_tables(cli: Any, tmp_path: Path) -> None:
    """Other conditions may select the same; an error, another value and a query that cannot run are wrong."""
    gold = sql(0, 0, [3, 0, "Red"], [1, 1, "5"])
    questions = [{"question": "Who?", "table_id": "1-1", "sql": gold}] * 6
    write(tmp_path / "dev.jsonl", questions)
    write(tmp_path / "dev.tables.jsonl", [{**TABLE, "id": "1-0"}, TABLE])
    samples = [
        {"query": sql(0, 0, [1, 1, 5.0], [3, 0, "red"]), "error": ""},
        {"query": sql(0, 0, [1, 1, "5"], [3, 0, "red"]), "error": ""},
        {"prediction": "SELECT Player FROM table WHERE Team = Red AND No. > 5"},
        {"query": gold, "error": "no such thing"},
        {"prediction": "SELECT Player FROM table"},
        {"query": sql(0, 0, [9, 0, "x"]), "error": ""},
    ]
    path = write(tmp_path / "samples.jsonl", samples)
    done = cli("eval", "--score", path, "--suite", "wikisql", "--data", tmp_path / "dev.jsonl", "--json", check=True)
    found = json.loads(done.stdout)
    rows = found["rows"]
    assert [row["lf"] for row in rows] == [False, True, True, False, False, False]
    assert [row["lf_ordered"] for row in rows] == [False, False, True, False, False, False]
    assert [row["correct"] for row in rows] == [True, True, True, False, False, False]
    assert [row["reason"] for row in rows[2:5]] == ["", "no such thing", "different"]
    assert "a column that is not among the 4" in rows[5]["reason"] and found["not_measured"] == {}
    assert found["metrics"] == pytest.approx({"lf_accuracy": 1 / 3, "lf_accuracy_ordered": 1 / 6, "ex_accuracy": 0.5})
    # Rows with everything in them, without tables
    own = write(tmp_path / "own.jsonl", [{"sql": gold, **sample} for sample in samples[:2]])
    found = json.loads(cli("eval", "--score", own, "--suite", "wikisql", "--json", check=True).stdout)
    assert found["metrics"] == {"lf_accuracy": 0.5, "lf_accuracy_ordered": 0.0}
    assert "2 of 2 rows have none" in found["not_measured"]["ex_accuracy"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": sql(0, 0)}, ":1: the gold query (`sql`) or `table`: not an object with sel, agg and conds"),
        ({"sql": sql(0, 0)}, ":1: there must be a `prediction` or `query`; the row has sql"),
        ({"sql": sql(0, 0), "prediction": "SELECT"}, ":1: a prediction in text is read by the names of its table's"),
        ({"sql": sql(0, 0), "query": sql(0, 0), "table": {}}, "a table must have header, types and rows"),
        ({"sql": sql(8, 0), "query": sql(0, 0), "table": TABLE}, "question 1: its own query does not run on its table"),
    ],
)
def test_bad_rows(cli: Any, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "samples.jsonl", [row])
    done = cli("eval", "--score", path, "--suite", "wikisql", "--json")
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_questions_with_tables(tmp_path: Path) -> None:
    gold = sql(0, 3, [3, 0, "Red"])
    write(tmp_path / "test.jsonl", [{"question": "How many?", "table_id": "1-1", "sql": gold}])
    with pytest.raises(UserError, match="there is no table '1-1' beside the questions"):
        load("wikisql", str(tmp_path))
    write(tmp_path / "test.tables.jsonl", [TABLE])
    (row,) = load("wikisql", str(tmp_path))
    assert row["query"] == "How many?\nColumns: Player, No., Team and city, Team" and row["sql"] == gold
    hub = {"question": "How many?", "table": TABLE, "sql": {"sel": 0, "agg": 3, "human_readable": "",
           "conds": {"column_index": [3], "operator_index": [0], "condition": ["Red"]}}}  # fmt: skip
    write(tmp_path / "hub.jsonl", [hub])
    assert load("wikisql", str(tmp_path / "hub.jsonl")) == [row]
    assert wikisql.training_row("How many?", gold, HEADER) == {
        "query": row["query"],
        "response": "SELECT COUNT Player FROM table WHERE Team = Red",
    }
