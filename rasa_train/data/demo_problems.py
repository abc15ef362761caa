"""Word problems in the shape of MetaMathQA (``query``, ``response``, ``type``), made from templates.

Everything is deterministic in the seed and uses the standard library only. The response is a short chain of
reasoning whose last line is ``The answer is: N``, so the answers are scored as MetaMathQA's are.
"""

from __future__ import annotations

import random
from collections.abc import Callable

# Name and pronoun. The model of the demo has seen these words, but not the questions.
NAMES = [
    ("Tom", "he"), ("Ann", "she"), ("Ben", "he"), ("Eva", "she"), ("Sam", "he"), ("Mia", "she"),
    ("Leo", "he"), ("Zoe", "she"), ("Max", "he"), ("Lily", "she"), ("Jack", "he"), ("Emma", "she"),
    ("Noah", "he"), ("Ruth", "she"), ("Paul", "he"), ("Nina", "she"), ("Omar", "he"), ("Rosa", "she"),
]  # fmt: skip
THINGS = [
    "apples", "pears", "plums", "nuts", "shells", "stones", "coins", "cards", "books", "pens", "balls",
    "stamps", "beads", "eggs", "cakes", "flowers",
]  # fmt: skip
CONTAINERS = [("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars")]

ANSWER_PREFIX = "The answer is: "


def _people(rng: random.Random) -> tuple[str, str, str]:
    """Return two different names and the pronoun of the first."""
    (first, pronoun), (second, _) = rng.sample(NAMES, 2)
    return first, second, pronoun


def _two_step(rng: random.Random) -> tuple[str, str, int]:
    name, other, he = _people(rng)
    things = rng.choice(THINGS)
    a, b = rng.randint(5, 60), rng.randint(3, 38)
    middle = a + b
    c = rng.randint(2, middle - 1)
    end = middle - c
    query = rng.choice(
        [
            f"{name} has {a} {things}. {he.capitalize()} finds {b} more and gives {c} to {other}. "
            f"How many {things} does {name} have now?",
            f"{name} had {a} {things}. First {he} bought {b} {things}, then {he} lost {c}. How many {things} are left?",
            f"There were {a} {things} on the table. {name} put {b} more there and {other} took {c} away. "
            f"How many {things} are on the table now?",
            f"How many {things} does {name} have if {he} starts with {a}, gets {b} more from {other} "
            f"and then sells {c}?",
        ]
    )
    response = (
        f"At first there are {a} {things}. With {b} more there are {a} + {b} = {middle}. "
        f"Without {c} there are {middle} - {c} = {end}."
    )
    return query, response, end


def _three_step(rng: random.Random) -> tuple[str, str, int]:
    name, other, he = _people(rng)
    things = rng.choice(THINGS)
    a = rng.randint(20, 70)
    b = rng.randint(2, a - 10)
    c = rng.randint(3, 25)
    d = rng.randint(2, a - b + c - 1)
    first, second, end = a - b, a - b + c, a - b + c - d
    query = rng.choice(
        [
            f"{name} has {a} {things}. {he.capitalize()} gives {b} to {other}, finds {c} and then loses {d}. "
            f"How many {things} does {name} have now?",
            f"On Monday {name} had {a} {things}. On Tuesday {he} sold {b}, on Friday {he} bought {c} "
            f"and on Sunday {he} gave {d} to {other}. How many {things} are left?",
            f"A shop has {a} {things}. {name} buys {b}, {c} more come in, and {other} buys {d}. "
            f"How many {things} does the shop have now?",
        ]
    )
    response = (
        f"At first there are {a} {things}. Without {b} there are {a} - {b} = {first}. "
        f"With {c} more there are {first} + {c} = {second}. Without {d} there are {second} - {d} = {end}."
    )
    return query, response, end


def _groups(rng: random.Random) -> tuple[str, str, int]:
    name, other, he = _people(rng)
    things = rng.choice(THINGS)
    box, boxes = rng.choice(CONTAINERS)
    n, m = rng.randint(2, 9), rng.randint(2, 9)
    full = n * m
    start = f"In {n} {boxes} of {m} there are {n} * {m} = {full} {things}."
    if rng.random() < 0.5:
        c = rng.randint(2, 30)
        query = rng.choice(
            [
                f"{name} has {n} {boxes} with {m} {things} in each {box}, and {c} more on the table. "
                f"How many {things} does {name} have in all?",
                f"Each {box} holds {m} {things}. {name} fills {n} {boxes} and has {c} {things} left over. "
                f"How many {things} are there in all?",
            ]
        )
        return query, f"{start} With {c} more there are {full} + {c} = {full + c}.", full + c
    c = rng.randint(1, full - 1)
    query = rng.choice(
        [
            f"{name} has {n} {boxes} with {m} {things} in each {box}. {he.capitalize()} gives {c} {things} "
            f"to {other}. How many {things} are left?",
            f"There are {m} {things} in each {box}. {name} buys {n} {boxes} and {other} takes {c} {things}. "
            f"How many {things} does {name} still have?",
        ]
    )
    return query, f"{start} Without {c} there are {full} - {c} = {full - c}.", full - c


def _compare(rng: random.Random) -> tuple[str, str, int]:
    name, other, _ = _people(rng)
    things = rng.choice(THINGS)
    a = rng.randint(6, 45)
    kind = rng.choice(["more", "fewer", "times"])
    if kind == "more":
        b = rng.randint(2, 20)
        second, step = a + b, f"{a} + {b}"
        relation = f"{b} more {things} than {name}"
    elif kind == "fewer":
        b = rng.randint(2, a - 2)
        second, step = a - b, f"{a} - {b}"
        relation = f"{b} fewer {things} than {name}"
    else:
        a, b = rng.randint(3, 9), rng.randint(2, 6)
        second, step = a * b, f"{a} * {b}"
        relation = f"{b} times as many {things} as {name}"
    query = rng.choice(
        [
            f"{name} has {a} {things}. {other} has {relation}. How many {things} do they have in all?",
            f"{other} has {relation}. {name} has {a}. How many {things} do they have together?",
            f"{name} has {a} {things} and {other} has {relation}. How many {things} do the two have in all?",
        ]
    )
    response = f"{other} has {step} = {second} {things}. Together they have {a} + {second} = {a + second}."
    return query, response, a + second


def _shopping(rng: random.Random) -> tuple[str, str, int]:
    name, _, he = _people(rng)
    first, second = rng.sample(THINGS, 2)
    n, price, other_price = rng.randint(2, 9), rng.randint(2, 8), rng.randint(2, 15)
    cost = n * price
    total = cost + other_price
    paid = rng.choice([p for p in (20, 30, 40, 50, 60, 70, 80, 90, 100) if p > total])
    query = rng.choice(
        [
            f"{name} buys {n} {first} for {price} dollars each and some {second} for {other_price} dollars. "
            f"{he.capitalize()} pays with {paid} dollars. How many dollars does {he} get back?",
            f"{name} has {paid} dollars. {he.capitalize()} buys {n} {first} at {price} dollars each and then "
            f"{second} for {other_price} dollars. How many dollars does {name} have left?",
        ]
    )
    response = (
        f"The {first} cost {n} * {price} = {cost} dollars. With the {second} it is {cost} + {other_price} = "
        f"{total}. Then {paid} - {total} = {paid - total} dollars are left."
    )
    return query, response, paid - total


def _backward(rng: random.Random) -> tuple[str, str, int]:
    name, other, he = _people(rng)
    things = rng.choice(THINGS)
    start = rng.randint(10, 70)
    given = rng.randint(2, start - 2)
    got = rng.randint(2, 25)
    end = start - given + got
    query = rng.choice(
        [
            f"{name} gave {given} {things} to {other} and then found {got}. Now {he} has {end} {things}. "
            f"How many {things} did {name} have at first?",
            f"After {name} sold {given} {things} and bought {got} more, {he} had {end} {things}. "
            f"How many {things} did {he} start with?",
        ]
    )
    before = end - got
    response = (
        f"At the end there are {end} {things}. Before the {got} came there were {end} - {got} = {before}. "
        f"Before the {given} went there were {before} + {given} = {start}."
    )
    return query, response, start


FAMILIES: dict[str, Callable[[random.Random], tuple[str, str, int]]] = {
    "GSM_like/two-step": _two_step,
    "GSM_like/three-step": _three_step,
    "GSM_like/groups": _groups,
    "GSM_like/compare": _compare,
    "GSM_like/shopping": _shopping,
    "GSM_like/backward": _backward,
}


def make_problems(n: int, seed: int) -> list[dict[str, str]]:
    """Return ``n`` problems with pairwise different queries, determined by ``n`` and ``seed``."""
    rng = random.Random(seed)
    kinds = list(FAMILIES)
    problems: list[dict[str, str]] = []
    seen: set[str] = set()
    while len(problems) < n:
        kind = rng.choice(kinds)
        query, reasoning, answer = FAMILIES[kind](rng)
        if query in seen:
            continue
        seen.add(query)
        problems.append({"query": query, "response": f"{reasoning}\n{ANSWER_PREFIX}{answer}", "type": kind})
    return problems


def split(n_train: int, n_test: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return ``n_train`` problems to train on and ``n_test`` held-out ones; no query is in both."""
    problems = make_problems(n_train + n_test, seed)
    # The held-out problems come first, so that they stay the same whatever the number of training problems.
    return problems[n_test:], problems[:n_test]


TRAINING, HELD_OUT, SEED = 3000, 400, 1
"""The demo's problems. Its learning rates were chosen on problems of seed 0, so the held-out ones are new."""


def training_problems() -> list[dict[str, str]]:
    """Return the problems that ``data.dataset: demo`` trains on."""
    return split(TRAINING, HELD_OUT, SEED)[0]


def held_out(n: int = HELD_OUT) -> list[dict[str, str]]:
    """Return the first ``n`` (at most 400) of the problems that ``training_problems`` does not contain."""
    return split(TRAINING, HELD_OUT, SEED)[1][:n]


def extract_answer(text: str) -> str | None:
    """Return the text from the last ``The answer is: `` to a newline or full stop; None if there is no such text."""
    _, found, tail = text.rpartition(ANSWER_PREFIX)
    if not found:
        return None
    return tail.split("\n", 1)[0].split(".", 1)[0].strip() or None
