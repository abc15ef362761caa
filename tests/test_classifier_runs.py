"""A classifier from its recipe to its scores, in every form of task."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedTokenizerFast

from tests.conftest import Cli

WORDS = ["the", "cat", "sat", "on", "a", "mat", "good", "bad", "very", "not"]
RECIPE = """\
task: classification
model: {{name: {model}, dtype: float32}}
adapter: {{method: lora, r: 4, alpha: 8}}
data: {{dataset: train.jsonl, num_workers: 1, validation: {{dataset: dev.jsonl}}}}
training:
  epochs: 10
  batch_size: 8
  micro_batch_size: 3
  optimizer: {{name: adamw, lr: 1e-2}}
  evaluate: {{suite: classification}}
output_dir: run
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of one layer, with a tokenizer in BERT's form."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", model_max_length=32).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(path)
    return path


def write(path: str, seed: int, count: int, label: Any) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 9))) for _ in range(count)]
    Path(path).write_text("".join(json.dumps({"text": text, "label": label(text.split())}) + "\n" for text in texts))


@pytest.fixture
def files(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, seed, count in (("train.jsonl", 0, 64), ("dev.jsonl", 1, 24)):
        write(name, seed, count, lambda words: "positive" if "good" in words else "negative")
    Path("recipe.yaml").write_text(RECIPE.format(model=bert))
    return tmp_path


def test_a_run_and_its_scores(cli: Cli, files: Path, bert: Path) -> None:
    facts = json.loads(cli("train", "check", "recipe.yaml", "--json", check=True).stdout)
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    counts = {name: sum(row["label"] == name for row in rows) for name in ("negative", "positive")}
    assert facts["labels"] == counts and facts["majority"] == max(counts.values()) / 64
    assert (facts["texts"], facts["pairs"], facts["supervised_tokens"]) == (64, 0, 64)
    summary = json.loads(cli("train", "recipe.yaml", "--json", check=True).stdout)
    assert summary["steps"] == 80 and summary["supervised_tokens"] == 10 * 64
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    measured = [row["eval_classification"] for row in metrics if "eval_classification" in row]
    assert len(measured) == 10 and summary["evaluation"]["metric"] == "accuracy"
    found = json.loads(cli("eval", "run", "--data", "dev.jsonl", "--json", check=True).stdout)
    (result,) = found["results"]
    assert found["accuracy"] == result["metrics"]["accuracy"] == measured[-1]
    assert found["accuracy"] > found["majority"] and {"f1", "matthews_correlation"} < found.keys()
    assert [row["correct"] for row in result["rows"]].count(True) == found["accuracy"] * 24
    losses = reference_losses(bert, Path("dev.jsonl"))
    assert summary["validation_loss"] == pytest.approx(losses, rel=1e-5)
    # The same rows as GLUE's: numbers for labels, in GLUE's own columns.
    glue = [json.loads(line) for line in Path("dev.jsonl").read_text().splitlines()]
    text = "".join(
        json.dumps({"sentence": row["text"], "label": int(row["label"] == "positive"), "idx": i}) + "\n"
        for i, row in enumerate(glue)
    )
    Path("sst2.jsonl").write_text(text)
    sst2 = json.loads(cli("eval", "run", "--suite", "glue/sst2", "--data", "sst2.jsonl", "--json", check=True).stdout)
    assert {key: sst2[key] for key in result["metrics"]} == result["metrics"]
    assert Path("run/evaluation/glue_sst2/adapter.json").is_file()
    for arguments, message in (
        (("--suite", "glue/sst2", "--data", "dev.jsonl"), "dev.jsonl:1: there is no column 'sentence'"),
        (("--suite", "glue/mnli", "--data", "dev.jsonl"), "needs 3 labels, entailment, neutral, contradiction, and"),
        (("--suite", "math"), "--suite math does not fit a classifier"),
    ):
        refused = cli("eval", "run", *arguments)
        assert refused.returncode == 2 and message in refused.stderr


def reference_losses(bert: Path, file: Path) -> float:
    """The mean loss of a file by transformers, one text at a time, with the tensors of the finished run's adapter."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
    tensors = load_file("run/adapter/adapter.safetensors")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith(".A"):
                weight = model.get_parameter(f"{name.removesuffix('.A')}.weight")
                weight += 2 * tensors[f"{name.removesuffix('A')}B"] @ tensor
            elif not name.endswith(".B"):
                model.get_parameter(name).copy_(tensor)
    tokenizer, total = AutoTokenizer.from_pretrained(bert), 0.0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        label = torch.tensor([int(row["label"] == "positive")])
        total += model(**tokenizer(row["text"], return_tensors="pt"), labels=label).loss.item()
    return total / len(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "label", "metric"),
    [
        ("multi_label", lambda words: [w for w in ("good", "bad") if w in words], "accuracy"),
        ("regression", lambda words: words.count("good") - 0.5 * words.count("bad"), "pearson"),
    ],
)
def test_other_problems_are_learnt(problem: str, label: Any, metric: str, cli: Cli, files: Path) -> None:
    for name, seed, count in (("train.jsonl", 0, 64), ("dev.jsonl", 1, 24)):
        write(name, seed, count, label)
    task = f"task={{name: classification, problem: {problem}}}"
    summary = json.loads(cli("train", "recipe.yaml", task, "--json", check=True).stdout)
    assert summary["evaluation"]["metric"] == metric
    found = json.loads(cli("eval", "run", "--data", "dev.jsonl", "--json", check=True).stdout)
    assert found[metric] == pytest.approx(summary["evaluation"]["last"]["value"], abs=1e-6)
    assert found[metric] > found.get("majority", 0.3)


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["training.batching=packed"], "training.batching", "needs a row for each; leave it out"),
        (["training.padding_free=true"], "training.padding_free", "needs a row for each"),
        (["data.template=chat"], "data.template", "is for responses; with task: classification leave it out"),
        (["data.supervise=all"], "data.supervise", "is for responses"),
        (["data.columns={query: a, response: b}"], "data.columns", "needs texts and labels: {text: <column>"),
        (["data.dataset=demo"], "data.dataset", "demo holds queries and responses"),
        (["training.evaluate.suite=math"], "training.evaluate", "use one of classification, glue/sst2"),
        (["data.validation=null"], "training.evaluate", "needs rows that are held out"),
        (
            ["task=causal_lm", "training.evaluate=null", "data.dataset=glue/sst2"],
            "data.dataset",
            "need `task",
        ),
        (["task=causal_lm", "training.evaluate=null", "data.columns={text: a, label: b}"], "data.columns", "hold"),
        (["task=causal_lm"], "training.evaluate", "is for classifiers; set task: classification, or use one of math"),
        (["task={name: classification, labels: [a]}"], "task", "nothing to learn with a single label"),
        (["task={name: classification, labels: [a, a]}"], "task", "names 'a' twice"),
        (["task={name: causal_lm, labels: [a, b]}"], "task", "add `name: classification`"),
    ],
)
def test_keys_without_a_meaning_are_refused(
    overrides: list[str], key: str, message: str, cli: Cli, files: Path
) -> None:
    done = cli("train", "recipe.yaml", *overrides)
    assert done.returncode == 2 and message in done.stderr
    assert key in done.stderr and ("at recipe.yaml:" in done.stderr or "at command line" in done.stderr)


def test_wrong_rows_end_the_run_before_it_starts(cli: Cli, files: Path) -> None:
    for row, message in (
        ({"text": "cat", "label": -1}, "train.jsonl:65: the label is -1"),
        ({"text": " ", "label": "positive"}, "train.jsonl:65: column 'text' is an empty text"),
        ({"query": "cat", "response": "mat"}, "train.jsonl:65: there is no column 'label'"),
    ):
        lines = Path("train.jsonl").read_text().splitlines()[:64]
        Path("train.jsonl").write_text("\n".join([*lines, json.dumps(row)]) + "\n")
        done = cli("train", "recipe.yaml")
        assert done.returncode == 2 and message in done.stderr
