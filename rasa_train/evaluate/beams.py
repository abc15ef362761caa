"""Beam search, by transformers' ``generate``; n-grams are not repeated within the response alone.

lm-evaluation-harness generates greedy and sampled responses, but its stop strings look at the first beams only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor


class NoRepeatInResponse(LogitsProcessor):  # type: ignore[misc]
    """Forbid a second occurrence of an n-gram in the response; the prompt may be repeated.

    Args:
        size: tokens of an n-gram.
        start: tokens of the prompt, padding included.
    """

    def __init__(self, size: int, start: int) -> None:
        self.inner, self.start = NoRepeatNGramLogitsProcessor(size), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores, shape (texts, vocabulary), with -inf where a token would complete a known n-gram."""
        forbidden: torch.Tensor = self.inner(input_ids[:, self.start :], scores)
        return forbidden


def search(
    model: Any, prompts: torch.Tensor, mask: torch.Tensor, decoding: Mapping[str, Any], ends: Sequence[int]
) -> torch.Tensor:
    """Return the best response to each prompt, its end included, padded at the right with ``ends[0]``.

    Args:
        model: a causal language model of transformers.
        prompts, mask: token ids padded on the left, and 1 where they are not padding; shape (prompts, length).
        decoding: ``num_beams``, ``length_penalty`` (the sum of the log-probabilities is divided by the number of tokens
            to this power), ``early_stopping``, ``no_repeat_ngram_size`` (0: any may be repeated) and ``max_gen_toks``.
        ends: ids of the tokens that end a response.
    """
    size, length = int(decoding.get("no_repeat_ngram_size", 0)), prompts.shape[1]
    processors = LogitsProcessorList([NoRepeatInResponse(size, length)] if size else [])
    with torch.no_grad():
        output: torch.Tensor = model.generate(
            input_ids=prompts,
            attention_mask=mask,
            do_sample=False,
            num_beams=int(decoding["num_beams"]),
            length_penalty=float(decoding["length_penalty"]),
            early_stopping=decoding["early_stopping"],
            max_new_tokens=int(decoding["max_gen_toks"]),
            logits_processor=processors,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        )
    return output[:, length:]


def respond(lm: Any, prompts: Sequence[str], decoding: Mapping[str, Any]) -> list[str]:
    """Return the best response to each prompt as text, up to the end token or one of the texts in ``until``.

    Args:
        lm: lm-eval's model ``hf``.
        prompts: texts that contain their own bos.
        decoding: as for ``search``, with ``until``. A text in it that is one token ends a response as eos does.
    """
    tokenizer = lm.tokenizer
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    longest = max(map(len, encoded))
    eos = tokenizer.eos_token_id
    ids = torch.tensor([[eos] * (longest - len(one)) + one for one in encoded], device=lm.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in encoded], device=lm.device)
    single = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in decoding["until"])
    ends = [eos, *(tokens[0] for tokens in single if len(tokens) == 1)]
    texts = tokenizer.batch_decode(search(lm.model, ids, mask, decoding, ends), skip_special_tokens=True)
    for stop in decoding["until"]:
        texts = [text.partition(stop)[0] for text in texts]
    return list(texts)
