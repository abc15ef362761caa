"""The search for a setting, against a machine whose memory is a formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rasa_train.errors import UserError
from rasa_train.training.memory_search import ENOUGH, MOST, Setting, search

LAYERS = 32


def machine(capacity: float) -> tuple[Callable[[Setting], bool], list[Setting]]:
    """A layer keeps 10 units a token, a recomputed one 1, and 20 while it is recomputed."""
    tried: list[Setting] = []

    def fits(setting: Setting) -> bool:
        tried.append(setting)
        kept = 10 * (LAYERS - setting.checkpointed) + setting.checkpointed + (20 if setting.checkpointed else 0)
        return setting.tokens * kept <= capacity

    return fits, tried


def found(capacity: float, longest: int = 1000, tokens: Any = "auto", checkpointing: Any = "auto") -> Setting:
    fits, _ = machine(capacity)
    return search(fits, longest=longest, layers=LAYERS, tokens=tokens, checkpointing=checkpointing)


def test_what_is_chosen_as_memory_shrinks() -> None:
    full = 10 * LAYERS
    assert found(MOST * full) == Setting(MOST, 0)
    assert found(MOST * full - 1) == Setting(MOST // 2, 0), "fewer tokens before recomputing"
    assert found(ENOUGH * full) == Setting(ENOUGH, 0)
    assert found(ENOUGH * full - 1) == Setting(ENOUGH, 3), "the fewest layers that will do: 20 more, 9 less for each"
    assert found(ENOUGH * (LAYERS + 20)) == Setting(ENOUGH, LAYERS)
    halved = found(ENOUGH * (LAYERS + 20) - 1)
    assert halved.tokens == ENOUGH // 2 and 0 < halved.checkpointed < LAYERS
    assert found(1000 * (LAYERS + 20)) == Setting(1000, LAYERS), "the longest example alone"
    with pytest.raises(UserError, match=r"no memory for 1,000 tokens .* 32 of 32 layers"):
        found(1000 * (LAYERS + 20) - 1)


def test_what_the_recipe_says_is_kept() -> None:
    assert found(MOST * 320, checkpointing=True) == Setting(MOST, LAYERS)
    assert found(1500 * 320, checkpointing=False) == Setting(1024, 0)
    assert found(1e9, tokens=3000, checkpointing=7) == Setting(3000, 7)
    assert found(3000 * 320 - 1, tokens=3000) == Setting(3000, 3)
    with pytest.raises(UserError, match=r"activation_checkpointing: auto, training\.micro_batch_size: auto"):
        found(3000 * 320 - 1, tokens=3000, checkpointing=False)


def test_the_most_is_tried_first() -> None:
    fits, tried = machine(5e5)
    search(fits, longest=1000, layers=LAYERS, tokens="auto", checkpointing="auto")
    assert tried[0] == Setting(MOST, 0) and len(tried) < 12
    fits, tried = machine(1e9)
    assert search(fits, longest=30_000, layers=LAYERS, tokens="auto", checkpointing="auto") == Setting(30_000, 0)
    assert len(tried) == 1


@given(st.integers(10_000, 20_000_000), st.integers(1, 40_000), st.sampled_from(["auto", False, True, 5]))
def test_what_is_chosen_fits_and_holds_the_longest(capacity: int, longest: int, checkpointing: Any) -> None:
    fits, _ = machine(capacity)
    try:
        setting = search(fits, longest=longest, layers=LAYERS, tokens="auto", checkpointing=checkpointing)
    except UserError:
        most = LAYERS if checkpointing in ("auto", True) else int(checkpointing)
        assert not fits(Setting(longest, most))
        return
    assert fits(setting) and setting.tokens >= longest
    if checkpointing == "auto" and setting.checkpointed:
        assert not fits(Setting(setting.tokens, 0))
        assert setting.checkpointed == 1 or not fits(Setting(setting.tokens, setting.checkpointed - 1))
