"""Questions of evaluation sets in training rows: copies are found however they are written, and nothing else is."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_data import write_lines

from rasa_train.data.config import DataConfig
from rasa_train.data.demo_problems import held_out
from rasa_train.data.prepare import PreparedData, prepare
from rasa_train.data.word_runs import Text, WordRuns
from rasa_train.errors import UserError
from rasa_train.recipe.load import load_recipe

Jsonl = Callable[[list[Any]], str]
CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
MATHS = (
    "If $\\frac{x^2}{4} \\leq 1{,}000$ and $x$ is a positive\ninteger, what is the largest possible value of "
    "$x \\cdot y$, where $y$ is the number of primes below twenty?"
)
ORIGINAL = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
FUNCTION = {
    "task_id": "HumanEval/900",
    "entry_point": "spread",
    "prompt": "from typing import List\n\n\ndef spread(numbers: List[float], threshold: float) -> bool:\n"
    '    """ Check whether the numbers of the list that are neighbours are further from each other than the threshold '
    'says.\n    >>> spread([1.0, 2.0], 0.5)\n    True\n    """\n',
    "canonical_solution": "    for one, other in zip(numbers, numbers[1:]):\n"
    "        if abs(one - other) <= threshold:\n            return False\n"
    "    if not numbers or threshold < 0:\n        raise ValueError(threshold)\n"
    "    return len(numbers) > 1\n",
    "test": "def check(candidate): pass",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RASA_TRAIN_CACHE", str(tmp_path / "cache"))


def question(numbers: random.Random) -> str:
    """A word problem in the manner of GSM8K, whose sentences are few but whose words are many."""
    name, friend = numbers.sample(["Tom", "Ana", "Liu", "Sara", "Ben", "Eve", "Max", "Ida", "Noor", "Jan"], 2)
    thing = numbers.choice(["apples", "marbles", "books", "stamps", "coins", "shells", "cards", "pens"])
    places = ["at the market", "in the garden", "at school", "on the beach", "in a shop", "at home"]
    first, second, third = (numbers.randint(2, 99) for _ in range(3))
    return numbers.choice(
        [
            f"{name} has {first} {thing}. {friend} gives {name} {second} more {numbers.choice(places)} and takes "
            f"{third} away. How many {thing} does {name} have left?",
            f"{name} buys {first} boxes of {thing} {numbers.choice(places)}. Each box costs {second} dollars, and "
            f"{friend} pays {third} dollars. How much money does {name} have to pay?",
        ]
    )


def made(rows: str, tokenizer: Any, sets: Any, **options: Any) -> PreparedData:
    return prepare(DataConfig(dataset=rows, decontaminate=sets, num_workers=1, **options), tokenizer)


def test_planted_copies_are_found_among_questions_of_the_same_manner(tmp_path: Path, jsonl: Jsonl, bpe: Any) -> None:
    numbers = random.Random(5)
    asked = list(dict.fromkeys(question(numbers) for _ in range(700)))
    test, rows = asked[:60], [{"query": text, "response": "It is 3."} for text in asked[60:]]
    planted = {100 + 25 * i: text for i, text in enumerate(test[:20])}
    for place, text in planted.items():
        changed = text.upper().replace(" ", "  \n", 5).replace(".", " …").replace("?", "")
        rows.insert(place, {"query": f"Think step by step.\n\n{changed}", "response": "It is 3."})
    evaluation = write_lines(tmp_path / "test.jsonl", [{"question": text, "answer": "3"} for text in test])
    path = jsonl(rows)
    prepared = made(path, bpe, [str(evaluation)])
    stats = prepared.stats
    assert (stats.contaminated, stats.contaminated_rows) == ({str(evaluation): 20}, 20)
    assert (stats.rows, stats.examples) == (len(rows), len(rows) - 20)
    assert stats.contaminated_places[0].startswith(f'{path}:101 has "')
    assert f"{evaluation}:1 has" in stats.contaminated_places[0]
    assert prepared.notes[0].startswith("20 training rows have questions of evaluation sets and are left out")
    reported = made(path, bpe, {"sets": [str(evaluation)], "action": "report"})
    assert (reported.stats.contaminated_rows, reported.stats.examples) == (20, len(rows))
    assert "are kept" in reported.notes[0]
    left = {tuple(example.input_ids) for example in prepared.train}
    for place in planted:
        assert tuple(reported.train[place].input_ids) not in left
    # The identity of the set is in the key of the cache: with one question less, 19 are found.
    write_lines(evaluation, [{"question": text, "answer": "3"} for text in test[1:]])
    assert made(path, bpe, [str(evaluation)]).stats.contaminated_rows == 19


@pytest.mark.parametrize(
    "copy",
    [
        MATHS,
        "Solve. If \\( \\dfrac{x^{2}}{4}\\le 1000 \\) and x is a positive integer,\n\nwhat is the largest\u00a0"
        "possible value of \\(x\\times y\\), where y is the number of primes below twenty? Answer briefly.",
        "IF X²/4 ≤ 1,000 AND X IS A POSI\u00adTIVE INTEGER, WHAT IS THE LARGEST POSSIBLE VALUE OF X·Y, WHERE Y IS THE "
        "NUMBER OF PRIMES BELOW TWENTY",
    ],
)
def test_spacing_signs_and_case_hide_nothing(copy: str) -> None:
    index = WordRuns.of([Text(MATHS, 7)], 0.8)
    [hit] = index.hits(["nothing", copy])
    assert (hit.part, hit.label) == (1, 7)
    assert "is a positive integer what is the largest possible value" in hit.words


def test_short_questions_count_as_a_whole() -> None:
    texts = ["Compute $\\sin 60^\\circ$.", "What is 2 + 3?", "How many odd whole numbers are below twenty three?"]
    index = WordRuns.of([Text(text, i) for i, text in enumerate(texts)], 0.8)

    def found(*parts: str) -> list[tuple[int, int]]:
        return [(hit.part, hit.label) for hit in index.hits(parts)]

    assert found("**Compute** \\(\\sin 60^{\\circ}\\)", "Now compute $\\sin 60^\\circ$ and its square.") == [(0, 0)]
    assert found("- What is $2+3$ !") == [(0, 1)]
    assert found("What is 2 * 3?", "what is 2+3", "Tell me: What is 2 + 3?") == [(1, 1)]
    assert found("Hint: how many odd whole numbers\nare below twenty-three? Think.", "How many odd numbers?") == [
        (0, 2)
    ]


def test_what_questions_have_in_common_is_no_evidence() -> None:
    phrase = "Find all pairs of relatively prime positive integers m and n for which the sum of both is"
    index = WordRuns.of([Text(f"{phrase} {end}", i) for i, end in enumerate(("17", "a square", "prime and odd"))], 0.8)
    assert not list(index.hits([f"{phrase} even"]))
    assert [hit.label for hit in index.hits([f"{phrase} a square"])] == [1]


def test_functions_are_known_by_what_they_do_and_not_by_their_signature(tmp_path: Path, jsonl: Jsonl, bpe: Any) -> None:
    evaluation = write_lines(tmp_path / "HumanEval.jsonl", [FUNCTION | {"instruction": "Write a function."}])
    signature = FUNCTION["prompt"].split('"""')[0]
    rows = [
        {"query": f"Complete this.\n{signature}", "response": "    return sorted(numbers)[0] > threshold"},
        {"query": FUNCTION["prompt"], "response": "    return True"},
        {
            "query": "Are they far from each other?",
            "response": f"def far(numbers, threshold):\n{FUNCTION['canonical_solution']}",
        },
        {
            "query": "Compare.",
            "response": "for one, other in zip(numbers, numbers[1:]):\n    if abs(one - other) <= 1: pass",
        },
    ]
    stats = made(jsonl(rows), bpe, [str(evaluation)]).stats
    assert stats.contaminated_rows == 2
    assert [place.partition(" ")[0].rpartition(":")[2] for place in stats.contaminated_places] == ["2", "3"]


def test_every_text_of_a_conversation_is_looked_at(jsonl: Jsonl, characters: Any) -> None:
    characters.chat_template = CHATML
    copied = held_out()[3]["query"]
    plain = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}]
    first, second = copied[: len(copied) // 2], copied[len(copied) // 2 :]
    rows = [
        {"messages": plain},
        {"messages": [{"role": "system", "content": copied}, *plain]},
        {
            "messages": [
                *plain,
                {"role": "user", "content": "More"},
                {"role": "assistant", "content": f"It was: {copied}"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": first}, {"type": "text", "text": second}]},
                plain[1],
            ]
        },
        {"messages": [plain[0], {"role": "assistant", "content": "Yes", "reasoning_content": copied}]},
    ]
    stats = made(jsonl(rows), characters, ["demo"], template="chat").stats
    assert (stats.contaminated, stats.examples) == ({"demo": 4}, 1)
    assert ", as demo problem 4 has" in stats.contaminated_places[0]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["gsm9k"], r"'gsm9k' is neither an evaluation set .* did you mean 'gsm8k'\?\n  at .*recipe\.yaml:5"),
        (["test.jsonl"], r"no file test\.jsonl in .*\n  at .*recipe\.yaml:5"),
        (
            ["no_question.jsonl"],
            r"no_question\.jsonl:2: there is no question in this row; it has answer.*\n  at .*yaml:5",
        ),
        (["wordless.jsonl"], r"wordless\.jsonl has no question with a word in it"),
        ([], r"data\.decontaminate.*(?s:.*)recipe\.yaml:5"),
    ],
)
def test_a_wrong_set_is_an_error_with_the_line_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jsonl: Jsonl, bpe: Any, sets: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "no_question.jsonl", [{"question": "How many?"}, {"answer": "3", "question": None}])
    write_lines(tmp_path / "wordless.jsonl", [{"question": "???"}])
    rows = jsonl([{"query": "a", "response": "b"}])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name: m}\nadapter: {method: lora}\ndata:\n"
        f"  dataset: {rows}\n  decontaminate: {json.dumps(sets)}\noutput_dir: runs\n"
    )
    with pytest.raises(UserError, match=message):
        loaded = load_recipe(str(recipe), [])
        try:
            prepare(loaded.recipe.data, bpe)
        except UserError as error:
            raise loaded.explain(error) from None


def test_rows_of_tokens_cannot_be_looked_through(jsonl: Jsonl, bpe: Any) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl:1: this row is tokens already"):
        made(jsonl([{"input_ids": [1, 2, 3]}]), bpe, ["demo"])
