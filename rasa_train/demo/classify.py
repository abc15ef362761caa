"""``rasa-train demo_classify``: methods compared on a small encoder and a set of reviews, both of which are made here.

The reviews are generated: dishes of a restaurant and what somebody says of them. The last word of judgement decides
the label, turned round by ``not`` and ``never``, so that single words do not tell it. The encoder is a BERT that is
pretrained on other reviews, which go on with what the guest felt, by guessing words that are left out. Seeds determine
all of it, and nothing is downloaded.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import say
from ..io.atomic import write_text

METHODS = {
    "full fine-tuning": ("full", "{method: full}", 2e-3),
    "BitFit": ("bitfit", "{method: bitfit}", 1e-2),
    "LoRA": ("lora", "{method: lora, r: 4, alpha: 8}", 5e-3),
    "RaSA": ("rasa", "{method: rasa, r: 4, k: 1, alpha: 8}", 5e-3),
}
"""The name of each method, the directory of its run, its section ``adapter:`` and its learning rate."""
TRAIN, HELD_OUT, PRETRAIN = 1200, 400, 4000
STEPS, BATCH = 500, 64
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
WITHOUT_NOISE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
RECIPE = """\
# One run of `rasa-train demo_classify`; `rasa-train run {path}` repeats it.
task: classification
model: {{name: {base}, dtype: float32}}
adapter: {adapter}
data:
  dataset: {train}
  validation: {{dataset: {dev}}}
  num_workers: 1
training:
  epochs: 4
  batch_size: 32
  optimizer: {{name: adamw, lr: {lr}}}
  schedule: {{name: linear, warmup_ratio: 0.1}}
  evaluate: {{suite: classification}}
output_dir: {run}
"""

_DISHES = ["soup", "bread", "fish", "rice", "salad", "cake", "tea", "coffee", "pasta", "pie"]
_GOOD = ["good", "great", "fresh", "tasty", "lovely", "perfect"]
_BAD = ["bad", "stale", "cold", "bland", "awful", "sour"]
_FELT = {"positive": ["happy", "glad", "pleased"], "negative": ["sad", "angry", "upset"]}
_TIMES = ["today", "yesterday", "again", "as always", "this time", ""]


def reviews(seed: int, count: int, others: Sequence[Mapping[str, str]] = ()) -> list[dict[str, str]]:
    """Return generated reviews with their labels, ``positive`` or ``negative``; none whose text is among ``others``."""
    rng, known, found = random.Random(seed), {row["text"] for row in others}, list[dict[str, str]]()
    while len(found) < count:
        row = _review(rng)
        if row["text"] not in known:
            found.append(row)
    return found


def _review(rng: random.Random) -> dict[str, str]:
    parts, positive = [], True
    for _ in range(rng.choice((1, 2, 2))):
        good, turned = rng.random() < 0.55, rng.random() < 0.25
        word = rng.choice(_GOOD if good else _BAD)
        parts.append(f"the {rng.choice(_DISHES)} was {rng.choice(('not', 'never')) + ' ' if turned else ''}{word}")
        positive = good != turned
    text = f"{' but '.join(parts)} {rng.choice(_TIMES)}".strip()
    return {"text": text, "label": "positive" if positive else "negative"}


def make_encoder(directory: Path) -> None:
    """Pretrain the encoder and save it with its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    rng = random.Random(1)
    texts = [f"{row['text']} so i was {rng.choice(_FELT[row['label']])}" for row in reviews(1, PRETRAIN)]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="[MASK]", model_max_length=32, model_input_names=names, **special
    )
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForMaskedLM(
            BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **SIZES, **WITHOUT_NOISE)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        felt = torch.tensor([vocabulary[word] for words in _FELT.values() for word in words])
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / STEPS)
            chosen = torch.randint(len(ids), (BATCH,))
            left_out = (torch.rand(BATCH, ids.shape[1]) < 0.2) & (ids[chosen] > 4)
            left_out |= torch.isin(ids[chosen], felt) & (torch.rand(BATCH, 1) < 0.7)
            labels = ids[chosen].masked_fill(~left_out, -100)
            inputs = ids[chosen].masked_fill(left_out, vocabulary["[MASK]"])
            loss = model(input_ids=inputs, attention_mask=mask[chosen], labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.bert.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def compare(output: Path, show: Callable[[str], None] = say) -> dict[str, Any]:
    """Make what is missing in ``output``, train each method, and return the results.

    A run that is there already is not made again.
    """
    from ..launch.launch import launch
    from ..launch.supervisor import Workers
    from ..recipe.load import load_recipe

    output.mkdir(parents=True, exist_ok=True)
    if not (output / "encoder" / "tokenizer.json").is_file():
        show(f"making the encoder: {STEPS} steps of guessing words that are left out")
        make_encoder(output / "encoder")
    train = reviews(2, TRAIN)
    dev = reviews(3, HELD_OUT, train)
    for name, rows in (("train", train), ("dev", dev)):
        write_text(output / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    positive = sum(row["label"] == "positive" for row in dev) / HELD_OUT
    results: dict[str, Any] = {"majority": max(positive, 1 - positive), "texts": HELD_OUT, "methods": {}}
    for name, (directory, adapter, lr) in METHODS.items():
        path, started = output / f"{directory}.yaml", time.perf_counter()
        files = {"base": "encoder", "train": "train.jsonl", "dev": "dev.jsonl", "run": directory}
        places = {key: json.dumps(str(output / file)) for key, file in files.items()}  # quoted, as YAML reads it too
        write_text(path, RECIPE.format(path=path, adapter=adapter, lr=lr, **places))
        show(f"{name}: rasa-train run {path}")
        summary = launch(load_recipe(path).recipe, Workers(1)).summary
        assert summary is not None
        scores: Any = summary["evaluation"]
        results["methods"][name] = {
            "trainable_parameters": summary["trainable_parameters"],
            "accuracy": scores["last"]["value"],
            "loss": summary["loss"],
            "seconds": round(time.perf_counter() - started, 1),
        }
    return results


def table(results: dict[str, Any]) -> str:
    """Format the results for a person."""
    lines = [f"{'':<18}{'trained':>10}{'loss':>8}{'accuracy':>10}{'seconds':>9}"]
    lines.append(f"{'majority label':<18}{'':>10}{'':>8}{results['majority']:>10.1%}")
    for name, row in results["methods"].items():
        loss = "" if row["loss"] is None else f"{row['loss']:.3f}"
        lines.append(
            f"{name:<18}{row['trainable_parameters']:>10,}{loss:>8}{row['accuracy']:>10.1%}{row['seconds']:>9.0f}"
        )
    return "\n".join([f"{results['texts']} held-out reviews; `trained` counts the head, too", *lines])
