"""Runs of classifiers against a loop of one's own, with PEFT's LoRA and with RaSA written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, pipeline

from rasa_train.adapters.inject import attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.state import saved_tensors
from rasa_train.models.classifier import head_parameters
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import load_model
from rasa_train.models.task import Head
from tests.conftest import Cli
from tests.tiny_models import tiny_model, tiny_tokenizer

HEAD = Head(("no", "yes"))
STEPS, BATCH, SEED = 10, 4, 11
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 3, "alpha": 6},
    "rasa": {"method": "rasa", "r": 3, "k": 1, "alpha": 8},
}


def texts() -> list[tuple[list[int], int]]:
    """Return words and the index of a label for each text of a run."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 14, (STEPS * BATCH,), generator=generator).tolist()
    words = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in lengths]
    return [(each, sum(each) % 2) for each in words]


def save_base(directory: Path, kind: str) -> Path:
    tiny_model(kind, labels=2).base_model.save_pretrained(directory / "base")
    tiny_tokenizer(directory / "base")
    rows = [{"text": " ".join(f"w{word}" for word in words), "label": HEAD.labels[label]} for words, label in texts()]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory / "base"


def recipe(directory: Path, adapter: dict[str, object], **training: object) -> dict[str, Any]:
    return {
        "model": {"name": str(directory / "base"), "dtype": "float32"},
        "task": {"name": "classification", "labels": list(HEAD.labels)},
        "adapter": adapter,
        "data": {"dataset": str(directory / "rows.jsonl"), "max_length": 64},
        "training": {
            **{"epochs": 1, "batch_size": BATCH, "micro_batch_size": 3, "batching": "sequential"},
            **{"max_grad_norm": None, "schedule": {"name": "constant", "warmup_steps": 0}},
            **{"optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.01}},
            **training,
        },
        "seed": SEED,
        "output_dir": str(directory / "run"),
    }


def start(base: Path, adapter: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return the base with its new head, and the values that the adapter and the head start with."""
    model, other = (load_model(ModelConfig(name=str(base), dtype="float32"), HEAD, SEED) for _ in range(2))
    torch.manual_seed(SEED)
    attach(other, METHODS[adapter["method"]].model_validate(adapter))
    return model, {name: tensor.detach().clone() for name, tensor in saved_tensors(other).items()}


def by_peft(model: PreTrainedModel, values: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model with PEFT's LoRA, and its trained tensors by our names."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    paths = sorted({name.rpartition(".")[0] for name in values if name.endswith(".A")})
    head = {name.partition(".")[0] for name in head_parameters(model)}
    modules = sorted(head - {model.base_model_prefix})
    config = LoraConfig("SEQ_CLS", r=3, lora_alpha=6, target_modules=paths, modules_to_save=modules)
    wrapped = get_peft_model(model, config)
    trained = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            for side, held in (("A", module.lora_A), ("B", module.lora_B)):
                trained[f"{path.removeprefix('base_model.model.')}.{side}"] = held["default"].weight
    for name, parameter in wrapped.named_parameters():
        if ".modules_to_save.default" in name:
            trained[name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")] = parameter
    return wrapped, trained


def by_hand(model: PreTrainedModel, values: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model with y = W x + b + [B_i B_S] diag(d_i) [A_i ; A_S] x in every linear of a layer."""
    trained: dict[str, Tensor] = {name: nn.Parameter(tensor.clone()) for name, tensor in values.items()}
    model.requires_grad_(False)
    for path in sorted({name.rpartition(".")[0] for name in values if name.endswith(".d")}):
        kind = path.partition(".layer.")[2].partition(".")[2].replace(".", "__")

        def update(
            module: nn.Module, inputs: tuple[Tensor], output: Tensor, path: str = path, kind: str = kind
        ) -> Tensor:
            A = torch.cat([trained[f"{path}.A"], trained[f"pools.{kind}.A_S"]])
            B = torch.cat([trained[f"{path}.B"], trained[f"pools.{kind}.B_S"]], 1)
            return output + inputs[0] @ A.T @ torch.diag(trained[f"{path}.d"]) @ B.T

        model.get_submodule(path).register_forward_hook(update)  # type: ignore[arg-type]
    for name, parameter in head_parameters(model).items():
        trained[name] = parameter.requires_grad_()
    return model, trained


def loop(model: nn.Module, trained: dict[str, Tensor], pad: int) -> list[float]:
    """Train on batches of the texts in their order. Returns the losses."""
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.01)
    losses = []
    for first in range(0, STEPS * BATCH, BATCH):
        batch = texts()[first : first + BATCH]
        longest = max(len(words) for words, _ in batch) + 2
        ids = torch.tensor([[0, *words, 2] + [pad] * (longest - len(words) - 2) for words, _ in batch])
        mask = torch.tensor([[1] * (len(words) + 2) + [0] * (longest - len(words) - 2) for words, _ in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits, torch.tensor([label for _, label in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


ORACLES: dict[str, Callable[..., tuple[nn.Module, dict[str, Tensor]]]] = {"lora": by_peft, "rasa": by_hand}


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("lora", "roberta"),
        ("rasa", "deberta-v2"),
        pytest.param("rasa", "roberta", marks=pytest.mark.slow),
        pytest.param("lora", "deberta-v2", marks=pytest.mark.slow),
    ],
)
def test_run_equals_a_loop_of_ones_own(method: str, kind: str, tmp_path: Path, cli: Cli) -> None:
    base, adapter = save_base(tmp_path, kind), ADAPTERS[method]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path, adapter)))
    cli("train", "recipe.yaml", check=True)
    found = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    model, values = start(base, adapter)
    head = set(head_parameters(model))
    reference, trained = ORACLES[method](model, values)
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(values[name])
    assert trained.keys() == values.keys()
    expected = loop(reference.eval(), trained, int(model.config.pad_token_id))
    assert found == pytest.approx(expected, abs=1e-5) and len(set(expected)) == STEPS
    saved = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert all(torch.allclose(saved[name], tensor, atol=2e-5) for name, tensor in trained.items())
    assert any(not torch.equal(saved[name], values[name]) for name in head)

    cli("merge", "run", "--output", "merged", "--verify", check=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, reference(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
        logits = merged(input_ids=ids).logits[0]
    (answer,) = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")("w5 w6 w7")
    assert answer["label"] == HEAD.labels[int(logits.argmax())]
    assert answer["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


@pytest.mark.parametrize("shape", ["another", pytest.param("same", marks=pytest.mark.slow)])
def test_start_from_an_adapter_of_another_task(shape: str, tmp_path: Path, cli: Cli) -> None:
    """RTE starts from the adapter of MNLI: the layers' values are kept, and the head where it has the same shape."""
    save_base(tmp_path, "roberta")
    first = recipe(tmp_path, ADAPTERS["rasa"])
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first))
    cli("train", "first.yaml", check=True)
    before = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    second = recipe(
        tmp_path,
        {**ADAPTERS["rasa"], "init_from": str(tmp_path / "run" / "adapter")},
        optimizer={"name": "adamw", "lr": 1e-12},
    )
    second["output_dir"] = str(tmp_path / "second")
    second["task"]["labels"] = ["no", "yes"] if shape == "same" else ["no", "yes", "maybe"]
    second["training"]["max_steps"] = 1
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second))
    done = cli("train", "second.yaml", check=True)
    after = load_file(tmp_path / "second" / "adapter" / "adapter.safetensors")
    new = {name for name in after if after[name].shape != before[name].shape}
    assert new == (set() if shape == "same" else {"classifier.out_proj.weight", "classifier.out_proj.bias"})
    assert ("has another head" in done.stdout + done.stderr) == bool(new)
    assert all(torch.allclose(after[name], before[name], atol=1e-9) for name in after.keys() - new)
