"""docs/RECIPE.md is what the schema says, about every key."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from pydantic import BaseModel

from rasa_train.adapters.registry import METHODS
from rasa_train.data.config import DataConfig, ValidationConfig
from rasa_train.distributed.config import DistributedConfig
from rasa_train.models.config import ModelConfig
from rasa_train.optim.optimizers import AdamW, LionW
from rasa_train.optim.schedule import ScheduleConfig
from rasa_train.recipe.schema import EvaluateConfig, TrackingConfig, TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "RECIPE.md").read_text()
SECTIONS: dict[str, type[BaseModel]] = {
    "`model`": ModelConfig,
    "`data`": DataConfig,
    "`data.validation`": ValidationConfig,
    "`training`": TrainingConfig,
    "`training.optimizer: {name: lionw}`": LionW,
    "`training.optimizer: {name: adamw}`": AdamW,
    "`training.schedule`": ScheduleConfig,
    "`training.evaluate`": EvaluateConfig,
    "`distributed`": DistributedConfig,
    "`tracking`": TrackingConfig,
    **{f"`adapter.method: {name}`": method for name, method in METHODS.items()},
}


def test_the_page_is_the_generated_one() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_recipe_reference.py"))
    assert script["reference"]() == PAGE, "make docs writes it again"


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_is_explained(title: str) -> None:
    """By the fields themselves, not by the schema that the page is made from."""
    section = re.split(rf"^#+ {re.escape(title)}$", PAGE, flags=re.MULTILINE)[1].split("\n#")[0]
    general = re.split(r"^## `adapter`$", PAGE, flags=re.MULTILINE)[1].split("\n#")[0]
    for key in SECTIONS[title].model_fields:
        if key != "method" and not (key == "name" and "optimizer" in title):
            row = re.search(rf"^\| `{key}` \| (.+?) \| (.+?) \| (.+) \|$", section + "\n" + general, re.MULTILINE)
            assert row is not None and all(cell.strip() for cell in row.groups()), key
