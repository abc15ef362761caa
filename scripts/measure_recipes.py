"""Write configs/measured.json, the parameters and the memory of each shipped recipe, for ``rasa-train list``.

    python scripts/measure_recipes.py

The figures are those of ``rasa-train check RECIPE``, computed from the shapes of the models without their weights.
There is one worker, or there are 8, as many as the paper's machine has GPUs, where the recipe's strategy divides the
base among workers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rasa_train.check.estimate import plan
from rasa_train.recipe.load import load_recipe
from rasa_train.recipe.shipped import configs_dir, listed

SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "meta-llama/Llama-3.1-70B": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "mistralai/Mistral-7B-v0.3": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
    },
}  # fmt: skip
"""Sizes from the models' own config.json, by hub id."""


def measure(name: str) -> dict[str, Any]:
    """Return the row of one recipe."""
    recipe = load_recipe(name).recipe
    model, workers = recipe.model.name, 1 if recipe.distributed.strategy == "ddp" else 8
    with tempfile.TemporaryDirectory() as directory:
        if model in SHAPES:
            (Path(directory) / "config.json").write_text(json.dumps(SHAPES[model]))
            shape = recipe.model.model_copy(update={"name": directory})
            recipe = recipe.model_copy(update={"model": shape})
        facts = plan(recipe, None, workers)
    ranks = recipe.adapter.model_dump(include={"r", "k"})
    return {
        "name": name,
        "method": recipe.adapter.method,
        "model": model if model in SHAPES else "demo",
        "r": ranks.get("r"),
        "k": ranks.get("k"),
        "trainable_parameters": facts.trainable_parameters,
        "strategy": facts.strategy,
        "workers": workers,
        "memory_bytes": facts.memory_bytes["total"],
    }


def main() -> None:
    rows = [json.dumps(measure(name)) for name in listed()]
    (configs_dir() / "measured.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")
    print(configs_dir() / "measured.json")


if __name__ == "__main__":
    main()
