"""Models that several files of tests evaluate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rasa_train.evaluate.load import wrap
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import load_model, load_tokenizer


@pytest.fixture(scope="module")
def lm() -> Any:
    """The demo model with noise on its weights: untrained for the task it would say nothing."""
    config = ModelConfig(name="demo", dtype="float32")
    model = load_model(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return wrap(model, load_tokenizer(config))
