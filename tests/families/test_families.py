"""Every model family that transformers builds: right, or refused in one message, but never wrong without a word.

About ten families run with every test run; all of them are marked slow, and ``make test-families`` makes their table,
docs/MODELS.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .harness import examine
from .specs import FAMILIES, UNBUILT
from .table import PAGE, kinds_of

ALWAYS = (
    "llama_tied", "gemma2", "gemma3_vl", "qwen3_moe", "deepseek_v3", "gpt_oss", "mamba", "falcon_rope", "bert_mlm",
    "qwen2_5_vl",
)  # fmt: skip


def _param(name: str) -> Any:
    return pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow])


@pytest.mark.parametrize("name", [_param(name) for name in FAMILIES if name not in UNBUILT])
def test_a_family_is_right_or_refused(name: str, tmp_path: Path) -> None:
    record = examine(name, tmp_path)
    assert record.faults == []
    kinds = [outcome.kind for outcome in record.outcomes.values()]
    assert kinds == kinds_of(name), "docs/MODELS.md says something else: make test-families"


def test_the_page_has_every_family() -> None:
    text = PAGE.read_text()
    assert [name for name in FAMILIES if f"| {name} |" not in text] == []
    assert "SILENT" not in text and "TRACEBACK" not in text
