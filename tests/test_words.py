"""New words: trained against PEFT's and against a loop with the whole table, resumed, merged, exported, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rasa_train import load_adapter
from rasa_train import merge as merge_in_place
from rasa_train.adapters.inject import adapt, attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import write_adapter, write_tokenizer
from rasa_train.adapters.state import saved_tensors
from rasa_train.data.cache import TokenDataset
from rasa_train.data.prepare import prepare
from rasa_train.errors import UserError
from rasa_train.evaluate.load import merge_in_memory
from rasa_train.kernels.linear_cross_entropy import linear_cross_entropy
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import merge
from rasa_train.merging.peft_format import export_peft
from rasa_train.merging.source import open_source
from rasa_train.merging.switch import switch
from rasa_train.merging.verify import verify
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import load_model, load_tokenizer
from rasa_train.models.words import own_parameters, words_of
from rasa_train.objectives.next_token import NextToken, from_logits
from rasa_train.recipe.load import load_recipe
from tests.conftest import Cli
from tests.tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

WORDS: list[Any] = ["<tool>", {"token": "w3,w4", "special": True}]
STEPS, BATCH, SEED = 8, 4, 5
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 3, "alpha": 6},
    "rasa": {"method": "rasa", "r": 3, "k": 1, "alpha": 8},
}


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def save_base(directory: Path, kind: str = "llama", *, tied: bool, rows: int = VOCABULARY) -> PreTrainedModel:
    """Write a base with a tokenizer of ``VOCABULARY`` words, which has ``rows`` rows, and texts with new words."""
    model = tiny_model(kind)
    model.config.tie_word_embeddings = tied
    model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().flip(0).clone())
    model.tie_weights()
    model.save_pretrained(directory / "base")
    tiny_tokenizer(directory / "base")
    backend = json.loads((directory / "base" / "tokenizer.json").read_text())
    backend["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "[ ,]"}, "behavior": "Removed", "invert": False}
    (directory / "base" / "tokenizer.json").write_text(json.dumps(backend))  # w3,w4 has two pieces
    generator = torch.Generator().manual_seed(3)
    with (directory / "rows.jsonl").open("w") as file:
        for _ in range(STEPS * BATCH):
            words = [f"w{i}" for i in torch.randint(3, VOCABULARY, (9,), generator=generator).tolist()]
            words[2], words[5], words[7] = "<tool>", "w3,w4", "<tool>"
            file.write(json.dumps({"query": " ".join(words[:4]) + " ", "response": " ".join(words[4:])}) + "\n")
    return model


def recipe(directory: Path, adapter: dict[str, Any], run: str = "run", **model: Any) -> dict[str, Any]:
    """Write and return a recipe for the base in ``directory``."""
    made = {
        "model": {"name": str(directory / "base"), "dtype": "float32", "add_tokens": WORDS, **model},
        "adapter": adapter,
        "data": {"dataset": str(directory / "rows.jsonl"), "template": "plain", "max_length": 64},
        "training": {
            **{"epochs": 1, "batch_size": BATCH, "micro_batch_size": 3, "batching": "sequential"},
            **{"max_grad_norm": None, "schedule": {"name": "constant", "warmup_steps": 0}, "checkpoint_every": 3},
            "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.01},
        },
        "seed": SEED,
        "output_dir": str(directory / run),
    }
    (directory / f"{run}.yaml").write_text(yaml.safe_dump(made))
    return made


def read_data(directory: Path) -> TokenDataset:
    loaded = load_recipe(directory / "run.yaml").recipe
    return prepare(loaded.data, load_tokenizer(loaded.model)).train


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def probe() -> Tensor:
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    ids[0, 4], ids[1, 2], ids[2, 7], ids[2, 8] = VOCABULARY, VOCABULARY + 1, VOCABULARY + 1, VOCABULARY
    return ids


def resized(directory: Path, rows: int) -> PreTrainedModel:
    """Return the base as a user of transformers gives it more rows, each at the mean of the rows of its pieces."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory / "base")
    model.resize_token_embeddings(rows, mean_resizing=False)
    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            for i, word in enumerate(("<tool>", "w3,w4")):
                pieces = tokenizer.encode(word, add_special_tokens=False)
                weight[VOCABULARY + i] = weight[pieces].mean(0)
    return model


def start(directory: Path, adapter: dict[str, Any]) -> dict[str, Tensor]:
    """Return the values that a run starts with, by the names in the adapter's file."""
    model = load_model(ModelConfig(name=str(directory / "base"), dtype="float32", add_tokens=WORDS))
    torch.manual_seed(SEED)
    attach(model, METHODS[adapter["method"]].model_validate(adapter))
    return {name: tensor.detach().clone() for name, tensor in saved_tensors(model).items()}


def by_peft(directory: Path, values: dict[str, Tensor], tied: bool) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return PEFT's LoRA with its trainable tokens, and its parameters by our names."""
    indices = {path: [VOCABULARY, VOCABULARY + 1] for path in ("embed_tokens", "lm_head")[: 1 if tied else 2]}
    paths = sorted({name.rpartition(".")[0] for name in values if name.endswith(".A")})
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=paths, trainable_token_indices=indices
    )
    wrapped = peft.get_peft_model(resized(directory, VOCABULARY + 2), config)
    trained = {}
    for name, parameter in wrapped.named_parameters():
        short = name.removeprefix("base_model.model.").replace(".default.weight", "").replace("lora_", "")
        short = short.replace("token_adapter.trainable_tokens_delta.default", "new_rows")
        if parameter.requires_grad:
            trained[short] = parameter
    return wrapped, trained


def by_mask(directory: Path, values: dict[str, Tensor], tied: bool) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model with the whole embedding and head as parameters, of whose gradients only those of new rows are
    kept, and with RaSA written out. Parameters are held by our names; new rows are the end of a whole weight."""
    model = resized(directory, VOCABULARY + 2).requires_grad_(False)
    trained = {name: nn.Parameter(t.clone()) for name, t in values.items() if not name.endswith("new_rows")}
    for path in sorted({name.rpartition(".")[0] for name in trained if name.endswith(".d")}):
        pool = "pools." + path.split(".", 3)[3].replace(".", "__")

        def update(module: nn.Module, inputs: Any, output: Tensor, path: str = path, pool: str = pool) -> Tensor:
            A = torch.cat([trained[f"{path}.A"], trained[f"{pool}.A_S"]])
            B = torch.cat([trained[f"{path}.B"], trained[f"{pool}.B_S"]], 1)
            return output + inputs[0] @ A.T @ torch.diag(trained[f"{path}.d"]) @ B.T

        model.get_submodule(path).register_forward_hook(update)
    for name in ("model.embed_tokens", "lm_head")[: 1 if tied else 2]:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.requires_grad_(True)
        weight.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:VOCABULARY]), grad[VOCABULARY:]]))
        trained[f"{name}.weight"] = weight
    return model, trained


def loop(model: nn.Module, trained: dict[str, nn.Parameter], data: TokenDataset) -> list[float]:
    """Train in an ordinary loop. Weight decay would move the old rows of a whole weight, which is put right."""
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.01)
    kept = {
        n: p.detach()[:VOCABULARY].clone() for n, p in trained.items() if n.endswith(("tokens.weight", "head.weight"))
    }
    found = []
    for at in range(0, len(data), BATCH):
        total, count = torch.zeros(()), 0
        for example in (data[i] for i in range(at, at + BATCH)):
            ids, labels = (torch.as_tensor(x).long() for x in (example.input_ids, example.labels))
            logits = model(input_ids=ids[None]).logits[0]
            total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
            count += int((labels[1:] != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for name, rows in kept.items():
                trained[name][:VOCABULARY] = rows
        found.append(float(total.detach() / count))
    return found


@pytest.mark.parametrize(("method", "tied"), [("rasa", True), ("lora", False), slow("lora", True), slow("rasa", False)])
def test_a_run_with_new_words(method: str, tied: bool, tmp_path: Path, cli: Cli) -> None:
    base = save_base(tmp_path, tied=tied)
    recipe(tmp_path, ADAPTERS[method])
    run = tmp_path / "run"
    done = cli("train", "run.yaml", check=True)
    assert f"and {(1 if tied else 2) * 2 * 32} in rows of the embedding and the head" in done.stderr + done.stdout
    data = read_data(tmp_path)
    ids = [list(data[i].input_ids) for i in range(len(data))]
    assert all(row.count(VOCABULARY) == 2 and row.count(VOCABULARY + 1) == 1 for row in ids)

    # an independent loop: PEFT's trainable tokens, or the whole table with a mask on its gradient
    values = start(tmp_path, ADAPTERS[method])
    model, trained = (by_peft if method == "lora" else by_mask)(tmp_path, values, tied)
    with torch.no_grad():
        for name, tensor in values.items():
            if name in trained:
                trained[name].copy_(tensor)
    expected = loop(model, trained, data)
    assert losses(run) == pytest.approx(expected, abs=1e-5) and expected[-1] < expected[0]
    tensors = load_file(run / "adapter" / "adapter.safetensors")
    for name, tensor in tensors.items():
        other = trained.get(name)
        if other is None:
            other = trained[name.replace("new_rows", "weight")][VOCABULARY:]  # type: ignore[assignment]
        torch.testing.assert_close(tensor, other.detach(), rtol=1e-3, atol=1e-4)
    assert ("lm_head.new_rows" in tensors) == (not tied)

    # cut off after the checkpoint of step 3, and taken up again: the same bits
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for path in (again / "adapter", again / "summary.json", *sorted((again / "checkpoints").iterdir())[1:]):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    recipe(tmp_path, ADAPTERS[method], run="again")
    cli("train", "again.yaml", check=True)
    found = load_file(again / "adapter" / "adapter.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    assert losses(again) == losses(run)

    # merged, exported, loaded: the same logits, and old rows to the bit
    cli("merge", "run", "--output", "merged", "--verify", check=True)
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run / "adapter")
    with torch.no_grad():
        logits = adapted(input_ids=probe()).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(input_ids=probe()).logits, logits, rtol=1e-4, atol=1e-4)
        export_lora(run, tmp_path / "lora")
        exports = ["lora"]
        if method == "lora":
            export_peft(run, tmp_path / "peft")
            exports.append("peft")
        for name in exports:
            wrapped = peft.PeftModel.from_pretrained(resized(tmp_path, VOCABULARY + 2), str(tmp_path / name))
            torch.testing.assert_close(wrapped(input_ids=probe()).logits, logits, rtol=1e-4, atol=1e-4)
            assert len(AutoTokenizer.from_pretrained(tmp_path / name)) == VOCABULARY + 2
    with pytest.raises(UserError, match=r"the base has 61 rows.*resize_token_embeddings\(63\)"):
        merge(tmp_path / "lora", tmp_path / "again-merged")  # PEFT's format does not say that the base grows
    assert merged.config.vocab_size == VOCABULARY + 2 == logits.shape[-1]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(merged, name)().weight[:VOCABULARY], getattr(base, name)().weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.encode("w5 <tool> w3,w4", add_special_tokens=False) == [5, VOCABULARY, VOCABULARY + 1]
    assert tokenizer.decode([5, VOCABULARY, VOCABULARY + 1], skip_special_tokens=True).split() == ["w5", "<tool>"]


@pytest.mark.parametrize(
    ("train", "tied"),
    [("all", True), ("new", False), slow("none", False), slow("all", False), slow("new", True), slow("none", True)],
)
def test_rows_that_the_tokenizer_does_not_use_are_taken(train: str, tied: bool, tmp_path: Path) -> None:
    rows = VOCABULARY + 9
    base = save_base(tmp_path, tied=tied, rows=rows)
    name = str(tmp_path / "base")
    config = ModelConfig(name=name, dtype="float32", add_tokens=WORDS, train_embeddings=train)  # type: ignore[arg-type]
    model = load_model(config)
    assert model.config.vocab_size == rows
    adapt(model, METHODS["lora"].model_validate({**ADAPTERS["lora"], "compute": "float32"}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        logits = model(input_ids=probe()).logits
    directory = tmp_path / "adapter"
    directory.mkdir()
    method = METHODS["lora"].model_validate(ADAPTERS["lora"])
    write_adapter(directory, method, saved_tensors(model), base_model=name, base_revision=None, words=words_of(model))
    write_tokenizer(directory, config)
    merge(directory, tmp_path / "merged")
    assert verify(directory, tmp_path / "merged", exact=True).logits < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    export_peft(directory, tmp_path / "peft")
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), str(tmp_path / "peft"))
    folded = load_model(ModelConfig(name=name, dtype="float32"))
    merge_in_memory(folded, open_source(directory, None, weights=True))
    loaded = merge_in_place(load_adapter(AutoModelForCausalLM.from_pretrained(name), directory))
    with torch.no_grad():
        for other in (merged, wrapped, folded, loaded):
            torch.testing.assert_close(other(input_ids=probe()).logits, logits, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(name)
    (directory / "checksums.json").unlink()
    settings = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**settings, "r": 2}))
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(plain, directory)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in plain.state_dict().items())
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    table = merged.get_input_embeddings().weight
    assert len(table) == rows and not own_parameters(loaded)
    same = (table == base.get_input_embeddings().weight).all(1)
    expected = torch.tensor([train != "all" and not VOCABULARY <= i < VOCABULARY + 2 for i in range(rows)])
    assert torch.equal(same, expected)
    with pytest.raises(UserError, match="adds words to the vocabulary"):
        switch(AutoModelForCausalLM.from_pretrained(name), directory)


def test_the_loss_has_the_logits_of_new_words() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(11, 6), torch.randn(20, 6), torch.randn(20)
    targets = torch.tensor([0, 17, 15, 3, 16, 15, 19, 2, 16, 17, 9])
    given = [hidden, bias, torch.randn(3, 6)]
    for old in (False, True):  # whether the frozen weight has a gradient, too
        tensors = [t.clone().requires_grad_() for t in given] + ([weight.clone().requires_grad_()] if old else [])
        h, b, new, w = (*tensors, weight)[:4]
        loss = linear_cross_entropy(h, w, b, targets, rows=(15, new), chunk=4)
        found = torch.autograd.grad(2 * loss, tensors)
        table = torch.cat([w[:15], new, w[18:]])
        wanted = F.cross_entropy(F.linear(h, table, b), targets, reduction="sum")
        torch.testing.assert_close(loss, wanted)
        for mine, other in zip(found, torch.autograd.grad(2 * wanted, tensors), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", ["gemma2", slow("phi"), slow("gpt2"), slow("qwen2"), slow("cohere")])
def test_other_families_in_bf16(kind: str, tmp_path: Path) -> None:
    """The loss inside the model equals the one from its logits, and the merged model gives these logits."""
    tiny_model(kind).save_pretrained(tmp_path / "base")
    tiny_tokenizer(tmp_path / "base")
    for train in ("new", "all"):
        model = load_model(
            ModelConfig(name=str(tmp_path / "base"), add_tokens=["<tool>", "w3,w4"], train_embeddings=train)
        )  # type: ignore[arg-type]
        adapt(model, METHODS["lora"].model_validate(ADAPTERS["lora"]))
        trained = own_parameters(model)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in trained.values()) and trained
        batch = {"input_ids": probe(), "positions": torch.tensor([3, 4, 12, 13, 25, 28, 29])}
        batch["targets"] = probe().flatten()[batch["positions"] + 1]
        expected = from_logits(model, batch)
        grads = torch.autograd.grad(expected, list(trained.values()))
        loss = NextToken().install(model)(model, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
        for mine, other in zip(torch.autograd.grad(loss, list(trained.values())), grads, strict=True):
            assert mine.any() and float((mine - other).norm() / other.norm()) < 0.02


BAD = {
    "exists": ({"add_tokens": ["w7"]}, "'w7' is a token of this tokenizer already (id 7)"),
    "special exists": ({"add_tokens": ["</s>"]}, "'</s>' is a token of this tokenizer already (id 2)"),
    "empty": ({"add_tokens": ["a", ""]}, "the 2. word is an empty text"),
    "twice": ({"add_tokens": ["a", {"token": "a", "special": True}]}, "names 'a' twice"),
    "nothing new": ({"add_tokens": [], "train_embeddings": "new"}, "there are none"),
    "no text": ({"add_tokens": [{"special": True}]}, "add_tokens"),
    "a number": ({"add_tokens": [7]}, "add_tokens"),
    "unknown": ({"train_embeddings": "some"}, "train_embeddings"),
}


def test_wrong_words_are_refused_with_the_line(tmp_path: Path, cli: Cli) -> None:
    save_base(tmp_path, tied=True)
    for name, (model, said) in BAD.items():
        recipe(tmp_path, ADAPTERS["lora"], run="bad", **model)
        done = cli("train", "bad.yaml")
        lines = (tmp_path / "bad.yaml").read_text().splitlines()
        key = "train_embeddings" if name in ("nothing new", "unknown") else "add_tokens"
        line = next(i for i, text in enumerate(lines, 1) if f"{key}:" in text)
        assert done.returncode == 2 and said in " ".join(done.stderr.split()), (name, done.stderr)
        assert "bad.yaml:" in done.stderr and any(f":{n}" in done.stderr for n in range(line, line + 4)), (
            name,
            done.stderr,
        )
    recipe(tmp_path, {"method": "peft", "config": {"peft_type": "LORA"}}, run="bad")
    done = cli("train", "bad.yaml")
    assert done.returncode == 2 and "leaves the embeddings to PEFT" in " ".join(done.stderr.split())
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    recipe(tmp_path, ADAPTERS["lora"], run="other")
    done = cli("train", "other.yaml")
    assert done.returncode == 2 and "has no tokenizer that words could be added to" in " ".join(done.stderr.split())
