"""Scores of generated text: the published script's figures, for its own files and for rows of ours."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rasa_train.evaluate.nlg import score_texts
from rasa_train.evaluate.nlg_java import JavaFailed, treebank
from rasa_train.evaluate.nlg_sets import load

pytest.importorskip("sacrebleu")
E2E = Path(__file__).parents[2].parent / "shared/data/slides/e2e"
SAMSUM = E2E.parent / "samsum/test_first200.jsonl"
ROWS = [
    (
        "The Old Mill is a pub near the river, with prices under £20.",
        [
            "The Old Mill is a cheap pub by the river.",
            "A pub near the river, The Old Mill, charges less than £20.",
            "Near the river is the pub The Old Mill (under £20).",
        ],
    ),
    ("Browns serves French food; it isn't family-friendly.", ["Browns serves French food. It is not family-friendly."]),
    (
        "Zizzi has a 3 out of 5 rating and costs 20-25 pounds.",
        ["Rated 3 out of 5, Zizzi costs 20-25 pounds.", "Zizzi: 3 out of 5, 20-25 pounds."],
    ),
    (
        "cotto is a coffee shop",
        [
            "Cotto is a coffee shop in the city centre near The Portland Arms.",
            "Near The Portland Arms there is a coffee shop called Cotto.",
        ],
    ),
]
BLEU, NIST = 0.49495617006873877, 4.713152384266297
SEGMENTS = [
    (0.6251943537695185, 0.6554913610595182, 4.564171476805244),
    (0.33010083098515036, 0.4180134288483488, 2.3595513876309417),
    (0.5038920485259633, 0.5423782837718303, 2.7388278725014645),
    (0.2465969639416065, 0.2465969639416065, 0.08411683418680338),
]
"""BLEU and NIST of ``ROWS``, and BLEU, smoothed BLEU and NIST of each, by pymteval of tuetschek/e2e-metrics@1b9c4d8."""


def parts(rows: list[tuple[str, list[str]]]) -> tuple[list[str], list[list[str]]]:
    return [text for text, _ in rows], [references for _, references in rows]


def test_bleu_and_nist_are_those_of_the_published_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without Java the other scores are left out, each with its reason."""
    monkeypatch.setenv("PATH", "")
    scored = score_texts(*parts(ROWS))
    assert scored.metrics["bleu"] == pytest.approx(BLEU) and scored.metrics["nist"] == pytest.approx(NIST)
    for row, expected in zip(scored.rows, SEGMENTS, strict=True):
        assert [row["bleu"], row["sentence_bleu"], row["nist"]] == pytest.approx(expected)
    assert scored.missing.keys() == {"meteor", "rouge_l", "cider"}
    assert all("Java" in why or "pycocoevalcap" in why for why in scored.missing.values())


def published() -> dict[str, list[tuple[str, list[str]]]]:
    """Return the script's own ten examples, and two systems of the challenge on its test set."""
    blocks = [block.split("\n") for block in (E2E / "devel-conc.txt").read_text().strip().split("\n\n")]
    found = {"example_10": list(zip((E2E / "baseline-output.txt").read_text().splitlines(), blocks, strict=True))}
    references = {row["query"]: row["references"] for row in load("e2e", str(E2E / "testset_w_refs.csv.gz"))}
    for system in ("tgen", "slug"):
        with gzip.open(E2E / f"system_{system}.tsv.gz", "rt", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file, delimiter="\t") if row][1:]
        found[f"test_{system}"] = [(output, references[meaning]) for meaning, output in rows]
    return found


FIGURES = {  # BLEU, NIST (-p), NIST (perl), METEOR, ROUGE-L, CIDEr as printed
    "example_10": "0.7203 7.7889 7.8212 0.4801 0.7910 2.3039",
    "test_tgen": "0.6593 8.5923 8.6094 0.4483 0.6850 2.2338",
    "test_slug": "0.6619 8.5824 8.6130 0.4454 0.6772 2.2615",
}
NAMES = ("bleu", "nist", "nist_perl", "meteor", "rouge_l", "cider")


@pytest.mark.skipif(not E2E.is_dir(), reason="no outputs of the challenge here")
@pytest.mark.parametrize("case", FIGURES)
def test_figures_of_the_challenge(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLEU and NIST alone; METEOR reads 60 MB of paraphrases."""
    monkeypatch.setenv("PATH", "")
    metrics = score_texts(*parts(published()[case])).metrics
    assert [f"{metrics[name]:.4f}" for name in NAMES[:3]] == FIGURES[case].split()[:3]


@pytest.mark.slow
@pytest.mark.skipif(not E2E.is_dir(), reason="no outputs of the challenge here")
@pytest.mark.parametrize("case", FIGURES)
def test_all_figures_of_the_challenge(case: str) -> None:
    pytest.importorskip("pycocoevalcap")
    scored = score_texts(*parts(published()[case]))
    if "meteor" in scored.missing:
        pytest.skip(scored.missing["meteor"])
    assert [f"{scored.metrics[name]:.4f}" for name in NAMES] == FIGURES[case].split()
    if case == "example_10":
        with (E2E / "oracle_example_segment_scores.tsv").open(newline="") as file:
            expected = list(csv.DictReader(file, delimiter="\t"))
        columns = ("BLEU", "sentBLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
        names = ("bleu", "sentence_bleu", "nist", "meteor", "rouge_l", "cider")
        assert [[f"{row[name]:.4f}" for name in names] for row in scored.rows] == [
            [row[column] for column in columns] for row in expected
        ]


@pytest.mark.slow
def test_texts_that_no_program_expects() -> None:
    """Nothing, punctuation alone, line ends of Unicode, and METEOR's own separator: as many scores as texts."""
    pytest.importorskip("pycocoevalcap")
    texts, references = ["", "...", "a ||| b"], [["x"], ["?!"], ["a ||| b", "x\u2028y\x85z\r\nw"]]
    scored = score_texts(texts, references)
    if scored.missing:
        pytest.skip(str(scored.missing))
    assert [row["rouge_l"] for row in scored.rows] == [0, 0, 1] and scored.rows[2]["meteor"] > 0.9


def test_treebank_tokens() -> None:
    """Stanford's rules: a hyphenated word is one token, a pound sign is #. Punctuation is dropped, but for parentheses,
    whose names coco-caption looks for in capitals."""
    pytest.importorskip("pycocoevalcap")
    try:
        found = treebank(["It isn't family-friendly; prices: £20-25.", "", "(A) café..."])
    except JavaFailed as error:
        pytest.skip(str(error))
    assert found == ["it is n't family-friendly prices # 20-25", "", "-lrb- a -rrb- café"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_score_nlg(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    path = write(tmp_path / "texts.jsonl", [{"prediction": text, "references": group} for text, group in ROWS])
    done = cli("eval", "--score", path, "--suite", "nlg", "--json", check=True)
    found = json.loads(done.stdout)
    assert found["samples"] == 4 and found["metrics"]["bleu"] == pytest.approx(BLEU)
    assert found["metrics"]["nist"] == pytest.approx(NIST) and "pymteval" in found["variants"]["nist"]
    shown = cli("eval", "--score", path, "--suite", "nlg", check=True).stdout
    assert ["nist", "4.7132"] in [line.split() for line in shown.splitlines()]
    assert "meteor: not measured, needs" in shown


@pytest.mark.parametrize(
    ("suite", "rows", "message"),
    [
        ("nlg", [{"prediction": "a"}], ":1: `references` must be a list of texts; the row has prediction"),
        ("nlg", [{"prediction": "a", "references": []}], ":1: `references` is empty"),
        ("nlg", [{"prediction": "a", "references": ["  "]}], ":1: `references` is empty"),
        ("samsum", [{"prediction": "a", "references": [1]}], ":1: `references` must be a list of texts"),
        ("nlg", [{"references": ["a"]}], ":1: the prediction must be text in `prediction`; the row has references"),
        ("nlg", [], "has no samples"),
        ("nlg", [{"prediction": "a", "references": ["a"]}], "--data is not for --score with --suite nlg"),
    ],
)
def test_bad_rows(cli: Any, tmp_path: Path, suite: str, rows: list[dict[str, Any]], message: str) -> None:
    more = ["--data", "x"] if "--data" in message else []
    done = cli("eval", "--score", write(tmp_path / "texts.jsonl", rows), "--suite", suite, "--json", *more)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_rouge_of_summaries(cli: Any, tmp_path: Path) -> None:
    """By hand: the stems cat, sit are 2 of 3 and of 2 words; the better of two references counts."""
    rows = [
        {"prediction": "cats sitting there", "references": ["dogs", "the cat sits"]},
        {"prediction": "same words", "references": ["same words"]},
    ]
    found = json.loads(cli("eval", "--score", write(tmp_path / "s.jsonl", rows), "--suite", "samsum", "--json").stdout)
    assert found["metrics"] == pytest.approx({"rouge1": 500 / 6, "rouge2": 75.0, "rougeL": 500 / 6})
    assert "stemmer" in found["variants"]["rouge1"]


@pytest.mark.skipif(not SAMSUM.is_file(), reason="no dialogues here")
def test_first_three_lines_of_each_dialogue() -> None:
    from rasa_train.evaluate.rouge import score_summaries

    rows = [json.loads(line) for line in SAMSUM.read_text().splitlines()]
    texts = [" ".join(row["dialogue"].replace("\r", "").split("\n")[:3]) for row in rows]
    _, metrics = score_summaries(texts, [[row["summary"]] for row in rows])
    assert {name: f"{value:.4f}" for name, value in metrics.items()} == {
        "rouge1": "30.8415",
        "rouge2": "8.1212",
        "rougeL": "23.9125",
    }
