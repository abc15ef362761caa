"""What a compiled layer moves and keeps, as gates. The widths are a sixteenth of those of Llama-3.1-8B, and so are the
bytes of a token, but for a few that do not depend on the widths."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from rasa_train.bench.compiled_counters import count_compiled
from rasa_train.bench.engines import engines

SCALE = 16
LAYER = LlamaConfig(
    vocab_size=64,
    hidden_size=4096 // SCALE,
    intermediate_size=14336 // SCALE,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
)
OURS, BASE = (next(e for e in engines(LAYER.hidden_size, 0.05) if e.label == label)
              for label in (("ours", "rasa"), ("base", None)))  # fmt: skip


def test_light_keeps_little() -> None:
    light = count_compiled(OURS, LAYER, light=True)
    assert light.graphs == 1
    assert 60e3 < light.saved_bytes_per_token_and_layer * SCALE <= 120e3


@pytest.mark.slow
def test_fused_layers_move_little() -> None:
    base, ours = count_compiled(BASE, LAYER), count_compiled(OURS, LAYER)
    assert base.graphs == ours.graphs == 1
    assert base.moved_bytes_per_token_and_layer * SCALE <= 860e3  # eager: 2,214 KB
    assert ours.moved_bytes_per_token_and_layer - base.moved_bytes_per_token_and_layer <= 600e3 / SCALE
    assert ours.saved_bytes_per_token_and_layer * SCALE <= 150e3  # eager: 185 KB
