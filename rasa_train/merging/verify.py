"""Verify a merge: compare the adapted model and the merged model on the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters.experts import is_fused
from ..adapters.inject import adapt, place
from ..adapters.saved import load_tensors, read_adapter
from ..data.encode import prompt_text
from ..errors import UserError
from ..models.config import ModelConfig
from ..models.load import load_model, load_tokenizer
from ..models.task import Head
from ..models.vocabulary import with_words
from ..models.words import put
from .options import Base
from .source import Adapters, Source, find_adapter, find_tokenizer, open_source

QUERIES = [
    "Natalia sold 48 clips in April and half as many in May. How many did she sell in all?",
    "Write a function that returns the n-th Fibonacci number.",
    "Name three primary colours and say what comes of mixing each two of them.",
    "Translate into French: the train to the coast leaves at nine.",
]
NEW = 32
"""Number of new words that are read, one after the other."""
EXACT = 1e-2
"""Largest error of an unrounded merge's logits, as a share of the adapter's effect on them; fp32 errors are far
smaller."""


@dataclass(frozen=True)
class VerifyReport:
    """Differences between the base with the adapter attached and the merged checkpoint, both computed in fp32, so that
    only the rounding of the merged weights remains."""

    prompts: int
    tokens: int
    template: str
    """Template of the prompts; ``tokens`` when the base has no tokenizer and the prompts are random tokens."""
    logits: float
    """Largest difference of a logit between the adapted and the merged model."""
    adapter_logits: float
    """Largest difference of a logit between the base and the adapted model: the size of the adapter's effect."""
    kl: float
    """Mean over tokens of KL(adapted || merged), nats."""
    loss: float
    """Mean next-token loss of the adapted model on the prompts; for a classifier, mean -log p of the label that the
    adapted model finds likeliest."""
    loss_difference: float
    """Loss of the merged model minus loss of the adapted model."""
    experts: bool = False
    """Whether the model is a mixture of experts, in which rounding can send a token to other experts: the largest
    difference of a logit then says little, and the mean KL and the loss say what rounding costs."""


def verify(
    adapter: Adapters,
    merged: str | Path,
    *,
    base: str | Base | None = None,
    template: str = "alpaca",
    exact: bool = False,
) -> VerifyReport:
    """Run both models on a few prompts, one after the other, on the CPU.

    Args:
        adapter, base: see ``merge``.
        merged: the directory that a merge has written.
        template: template of the prompts; give the recipe's.
        exact: whether the merge has rounded nothing, so that the models must not differ.
    Raises:
        UserError: the models differ although nothing was rounded.
    """
    source = open_source(adapter, base, weights=True)
    batches, template = _prompts(source, template)
    without = _logits(lambda: base_model(source), batches)
    on = _logits(lambda: _adapted(source, adapter), batches)
    off = _logits(lambda: _load(Path(merged), source.head), batches)
    differences = [float((a - b).abs().max()) for a, b in zip(on, off, strict=True)]
    effect = max(float((a - b).abs().max()) for a, b in zip(on, without, strict=True))
    tokens = sum(len(logits) for logits in on)
    kl = sum(float(_kl(a, b)) for a, b in zip(on, off, strict=True)) / tokens
    losses = [_loss(logits, _targets(source, on, batches)) for logits in (on, off)]
    experts = any(is_fused(module) for module in source.model.modules())
    report = VerifyReport(
        len(batches), tokens, template, max(differences), effect, kl, losses[0], losses[1] - losses[0], experts
    )
    if exact and report.logits > EXACT * max(effect, EXACT):
        raise UserError(
            f"{merged} does not equal the adapted model: logits differ by up to {report.logits:.3g}, the adapter "
            f"changes them by {effect:.3g}, and nothing was rounded. Please report this, and do not use the output"
        )
    return report


def _prompts(source: Source, template: str) -> tuple[list[Tensor], str]:
    vocabulary = int(source.model.config.get_text_config().vocab_size)
    own = find_tokenizer(source)
    tokenizer = load_tokenizer(
        ModelConfig(name=str(source.directory), tokenizer=str(own[0].parent.absolute()) if own else None)
    )
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, vocabulary, (1, 32), generator=generator) for _ in QUERIES], "tokens"
    tokenizer = with_words(tokenizer, source.words, str(source.origins[0]))
    template = "text" if source.head else template
    if template == "chat":
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
            for q in QUERIES
        ]
    else:
        texts = QUERIES if source.head else [prompt_text(template, query) for query in QUERIES]
    batches = [tokenizer(str(text), return_tensors="pt")["input_ids"] for text in texts]
    if source.words and source.words.tokens:
        batches.append(torch.arange(source.words.first, source.words.rows)[None, :NEW])
    return batches, template


def _load(directory: Path, head: Head | None) -> PreTrainedModel:
    return load_model(ModelConfig(name=str(directory), dtype="float32"), head)


def base_model(source: Source) -> PreTrainedModel:
    """Return the base, fp32, in which the rows of new words are zeros."""
    model = _load(source.directory, source.head)
    put(model, source.words)
    return model


def _adapted(source: Source, adapter: Adapters) -> nn.Module:
    """Return the base with the adapter attached: as in training, or by hand for a sum, which no recipe trains."""
    model: nn.Module = base_model(source)
    given = [(adapter, 1.0)] if isinstance(adapter, str | Path) else list(adapter)
    if len(given) == 1 and given[0][1] == 1:
        saved = read_adapter(find_adapter(Path(given[0][0])))
        model, _ = adapt(model, saved.method)
        load_tensors(model, saved.tensors, origin=str(saved.directory))
        return model
    for site in source.sites:
        place(model, site, source.adapters[site.path])
    return model


@torch.no_grad()
def _logits(make: Callable[[], nn.Module], batches: list[Tensor]) -> list[Tensor]:
    """Return the logits of each prompt, (tokens, vocabulary) or, of a classifier, (1, labels). The model is freed
    afterwards."""
    model = make().eval()
    return [model(input_ids=batch).logits.flatten(0, -2).float() for batch in batches]


def _kl(on: Tensor, off: Tensor) -> Tensor:
    log_on, log_off = on.double().log_softmax(-1), off.double().log_softmax(-1)
    return F.kl_div(log_off, log_on, reduction="sum", log_target=True)


def _targets(source: Source, on: list[Tensor], batches: list[Tensor]) -> list[Tensor]:
    return [batch[0, 1:] for batch in batches] if source.head is None else [logits.argmax(-1) for logits in on]


def _loss(logits: list[Tensor], targets: list[Tensor]) -> float:
    losses = [F.cross_entropy(a[: len(b)], b, reduction="sum") for a, b in zip(logits, targets, strict=True)]
    return float(sum(losses)) / sum(map(len, targets))
