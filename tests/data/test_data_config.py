import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from rasa_train.data.config import DataConfig, ValidationConfig
from rasa_train.errors import UserError


def test_every_field_is_described_and_the_defaults_are_the_papers() -> None:
    for model in (DataConfig, ValidationConfig):
        assert all(field.description for field in model.model_fields.values())
    config = DataConfig(dataset="metamathqa")
    assert (config.template, config.max_length, config.over_length, config.fraction) == (
        "alpaca",
        4096,
        "truncate",
        1.0,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"dataset": ""},
        {"max_length": 0},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"num_workers": 0},
        {"template": "vicuna"},
        {"unknown": 1},
        {"validation": {"size": 0}},
        {"validation": {"size": 1.0}},
        {"validation": {"size": True}},
    ],
)
def test_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"dataset": "x"} | wrong)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"supervise": "paper", "template": "plain"}, "data.supervise"),
        ({"columns": {"query": "q"}}, "data.columns"),
        ({"columns": {"prompt": "q", "response": "r"}}, "data.columns"),
        ({"columns": {"messages": "m", "history": "h"}}, "data.columns"),
        ({"columns": {"messages": "m", "conversations": "m"}}, "data.columns"),
        ({"columns": {"system": "s"}}, "data.columns"),
        ({"validation": {}}, "data.validation"),
        ({"validation": {"dataset": "x", "size": 3}}, "data.validation"),
    ],
)
def test_combinations_without_meaning_name_their_key(wrong: dict[str, object], key: str) -> None:
    with pytest.raises(UserError) as caught:
        DataConfig.model_validate({"dataset": "x"} | wrong)
    assert caught.value.key == key


def test_configuration_and_preparation_load_neither_torch_nor_transformers() -> None:
    code = "import sys, rasa_train.data.prepare; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "set()\n"
