"""Expressions for the names of linears: those of ``re``, matched within a bound of time."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rasa_train.adapters import patterns
from rasa_train.adapters.inject import adapt
from rasa_train.adapters.patterns import path_pattern
from rasa_train.adapters.registry import METHODS
from rasa_train.errors import UserError

NAMES = ["q_proj"]
SLOW = r"(([a-z_.0-9]+)+)+!"
"""Takes ``re`` longer than anybody waits, for the path of a linear."""


@pytest.mark.parametrize("text", [r"(a+)+$", r"(a|aa)+$", r"(.*)*x", r"(?:a?){40}a{40}b", SLOW])
def test_an_expression_that_would_take_years(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    start = time.monotonic()
    try:
        matches = path_pattern(text, "adapter.targets")
        assert not any([matches("a" * 60 + "c") for _ in range(100)])
    except UserError as error:
        assert "adapter.targets takes more than 0.2 seconds" in str(error)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "rasa", "targets": SLOW},
        {"method": "full", "targets": SLOW},
        {"method": "peft", "config": {"peft_type": "LORA", "r": 2, "target_modules": SLOW}},
        {"method": "peft", "config": {"peft_type": "LORA", "r": 2, "target_modules": NAMES, "rank_pattern": {SLOW: 4}}},
        {"method": "peft", "config": {"peft_type": "LOHA", "r": 2, "target_modules": NAMES, "exclude_modules": SLOW}},
    ],
    ids=["rasa", "full", "peft", "ranks of peft", "exclusions of peft"],
)  # fmt: skip
def test_a_recipe_or_adapter_whose_expression_never_ends(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object]
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    start = time.monotonic()
    with suppress(UserError):  # it takes too long, or matches nothing
        adapt(model, METHODS[str(fields["method"])].model_validate(fields))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("text", [r".*\.(q|v)_proj", r"(?i).*Q_PROJ", r"(?P<a>.*)_proj", r"model\.layers\.[0-1]\..*"])
def test_expressions_mean_what_they_mean_to_re(text: str) -> None:
    import re

    names = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "lm_head", "q_proj\n"]
    matches = path_pattern(text, "adapter.targets")
    assert [matches(name) for name in names] == [re.fullmatch(text, name) is not None for name in names]


@pytest.mark.parametrize("text", ["(", "a{1,99999999999}", "(?P<a>x)(?P<a>y)", "\\"])
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(UserError, match=r"adapter\.targets is not a regular expression"):
        path_pattern(text, "adapter.targets")
