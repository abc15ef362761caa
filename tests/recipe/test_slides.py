"""The recipes of the LoRA paper's tables: they load, say what the paper reports, and train exactly what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rasa_train.adapters.inject import adapt
from rasa_train.adapters.state import trainable
from rasa_train.recipe.load import load_recipe
from rasa_train.recipe.schema import Recipe
from rasa_train.recipe.shipped import configs_dir, runnable

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
DEBERTA = {
    "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24,
    "intermediate_size": 6144, "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3, "conv_act": "gelu",
    "type_vocab_size": 0, "max_relative_positions": -1, "position_biased_input": False,
}  # fmt: skip
OPT = {
    "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50272,
    "word_embed_proj_dim": 4096, "max_position_embeddings": 2048,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "FacebookAI/roberta-base": ("roberta", ROBERTA),
    "FacebookAI/roberta-large": ("roberta", {**ROBERTA, **LARGE}),
    "microsoft/deberta-v2-xxlarge": ("deberta-v2", DEBERTA),
    "openai-community/gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "openai-community/gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "facebook/opt-6.7b": ("opt", OPT),
}
"""Sizes from the models' own config.json, by hub id."""
FILES = sorted((configs_dir() / "slides").glob("*.yaml"))
GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")


def count(recipe: Recipe) -> int:
    """The trained parameters, without the head of a classifier."""
    kind, fields = SHAPES[recipe.model.name]
    make = AutoModel if recipe.task.name == "classification" else AutoModelForCausalLM
    options = {"add_pooling_layer": False} if kind == "roberta" and make is AutoModel else {}
    with torch.device("meta"):
        model, _ = adapt(make.from_config(AutoConfig.for_model(kind, **fields), **options), recipe.adapter)
    return sum(parameter.numel() for parameter in trainable(model).values())


def comments(path: Path) -> str:
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return " ".join(lines)


def test_every_row_has_its_file() -> None:
    """14 rows of table 2, of which LoRA's have a recipe for each set; 12 of table 3; 8 of table 4, on three sets."""
    names = {path.stem for path in FILES}
    models = ("roberta_base", "roberta_large", "deberta_xxl")
    assert {f"{model}_lora_{task}" for model in models for task in GLUE} <= names
    assert len(names) == 3 * 8 + 11 + 12 + 3 * 8 - 2, "prompts are for causal language models"
    assert {f"slides/{name}" for name in names} <= set(runnable())
    index = (configs_dir() / "slides" / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+)\.yaml\)", index)) == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_settings_and_figures(path: Path) -> None:
    recipe, said = load_recipe(path).recipe, comments(path)
    assert re.match(r"Table [234] of the LoRA paper, .*The paper reports ", said) and "rained" in said
    assert recipe.output_dir == f"runs/slides/{path.stem}"
    training = recipe.training
    assert (training.optimizer.name, training.schedule.name) == ("adamw", "linear")
    if path.stem.startswith("gpt2_"):
        assert (training.batch_size, training.epochs, recipe.seed, training.max_grad_norm) == (8, 5, 110, None)
    if path.stem.startswith("gpt3_"):
        assert (training.batch_size, training.epochs, training.optimizer.weight_decay) == (128, 2, 0.1)
    if "_lora" in path.stem:
        assert recipe.adapter.method == "lora" and len(recipe.adapter.targets) == 2
    task = next((task for task in GLUE if path.stem.endswith(f"_{task}")), "mnli")
    if recipe.task.name == "classification":
        assert recipe.data.dataset == f"glue/{task}"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if not path.stem.endswith(("_mnli", "_samsum", *(f"_{task}" for task in GLUE[2:])))],
    ids=lambda path: path.stem,
)
def test_it_trains_what_it_says(path: Path) -> None:
    """One recipe of each row: those of other sets differ in nothing that is counted."""
    found = re.search(r"(?:Trained|Here, in OPT-6.7B): ([\d,]+)", comments(path))
    assert found and int(found[1].replace(",", "")) == count(load_recipe(path).recipe)
