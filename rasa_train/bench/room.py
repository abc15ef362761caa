"""Compute how many tokens of a step fit in memory, from the bytes that each engine keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..kernels.linear_cross_entropy import CHUNK
from .counters import Saved
from .engines import Engine, contender
from .workloads import language_model

MOST_TOKENS, LEAST_TOKENS = 16_384, 512
"""Bounds on the tokens of a step on a GPU, unless the command gives a number. The lower bound is also the number of
tokens of the trial run, and the result is a multiple of it."""
BYTES_PER_LOGIT = 10
"""Bytes of a logit and its gradient: both in the base's 16 bits, once in fp32, and softmax's temporary value."""


def most_tokens(base: PreTrainedModel, engines: Sequence[Engine], own_stacks: bool, room: int) -> int:
    """Return the largest number of tokens of a step, from ``LEAST_TOKENS`` to ``MOST_TOKENS``, that fits for every
    engine.

    Args:
        room: free bytes while the base is loaded.
    """
    most = MOST_TOKENS
    for engine in engines:
        stock = own_stacks and engine.stock
        logits = base.config.vocab_size * BYTES_PER_LOGIT
        per_token = saved_bytes_per_token(base, engine, own_stacks) + (logits if stock else 0)
        at_once = 0 if stock else logits * CHUNK
        most = min(most, int(max(room - at_once, 0) / per_token))
    return max(most // LEAST_TOKENS * LEAST_TOKENS, LEAST_TOKENS)


def saved_bytes_per_token(base: PreTrainedModel, engine: Engine, own_stacks: bool) -> float:
    """Return the bytes that a forward pass keeps for the backward pass, per token."""
    ran = contender(engine, language_model(base, [LEAST_TOKENS], flat=True), own_stack=own_stacks)
    with Saved(ran.model) as saved:
        ran.loss()
    return saved.bytes / LEAST_TOKENS
