"""Responses to a suite's questions: batched by length and token budget, resumable per question.

Greedy responses do not depend on the batch: prompts are padded on the left and masked, and how many tokens a response
may have depends on its own prompt alone. Sampled ones are drawn problem by problem from a seed of their own, so that an
interrupted evaluation ends as an uninterrupted one does.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import Stopped, UserError
from ..io.atomic import write_text
from ..stop import StopSignal
from .suites import Question, Suite

Key = tuple[int, int]
"""(index of the question, number of the sample)."""


@dataclass
class Progress:
    """How far it is, for a line or a bar. ``tokens`` are of responses made in this process."""

    total: int
    done: int = 0
    tokens: int = 0
    fresh: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done) * (time.perf_counter() - self.started) / max(self.fresh, 1)


Report = Callable[[Progress], None]


class SampleFile:
    """The responses so far, one JSON line each below a line that says what they depend on; None keeps them in memory.

    A torn last line, of a killed process, is dropped.

    Raises:
        UserError: the file holds responses of another protocol or model.
    """

    def __init__(self, path: Path | None, depends_on: dict[str, Any], *, fresh: bool = False) -> None:
        self.path, self.responses, self.continued = path, dict[Key, str](), False
        if path is None:
            return
        header = json.dumps({"depends_on": depends_on})
        if not fresh and path.is_file() and (lines := path.read_text().split("\n")[:-1]):
            _check_same(path, json.loads(lines[0])["depends_on"], json.loads(header)["depends_on"])
            self.continued = True
            for line in lines[1:]:
                row = json.loads(line)
                self.responses[row["index"], row["sample"]] = row["response"]
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [header, *(_line(key, text) for key, text in self.responses.items())]
        write_text(path, "\n".join(lines) + "\n")

    def add(self, responses: dict[Key, str]) -> None:
        self.responses |= responses
        if self.path is not None:
            with self.path.open("a") as file:
                file.write("".join(f"{_line(key, text)}\n" for key, text in responses.items()))


def generate(
    lm: Any,
    suite: Suite,
    questions: Sequence[Question],
    samples: SampleFile,
    *,
    batch_tokens: int,
    report: Report | None = None,
    stop: StopSignal | None = None,
) -> list[list[str]]:
    """The responses of each question, in order, ``suite.samples`` each.

    Args:
        lm: a model of lm-eval, whose ``generate_until`` is used.
        batch_tokens: prompt and response tokens, padding included, that are in memory at a time.
    Raises:
        Stopped: ``stop`` was asked for; what was made is in the sample file.
    """
    from lm_eval.api.instance import Instance

    tokenizer, bos = lm.tokenizer, lm.tokenizer.bos_token or ""
    prompts = {q.index: q.prompt if bos and q.prompt.startswith(bos) else bos + q.prompt for q in questions}
    lengths = {index: len(tokenizer.encode(text, add_special_tokens=False)) for index, text in prompts.items()}
    wanted = [(q.index, sample) for q in questions for sample in range(suite.samples)]
    progress = Progress(len(wanted), sum(key in samples.responses for key in wanted))
    for budget, batch in _batches(suite, lengths, wanted, lm.max_length, batch_tokens):
        if all(key in samples.responses for key in batch):
            continue
        if suite.samples == 1:  # greedy: what is there already need not be made again
            batch = [key for key in batch if key not in samples.responses]
        if stop is not None and stop.reason:
            raise Stopped(
                f"{stop.reason}: {progress.done} of {progress.total} responses are kept; run it again to go on"
            )
        arguments = suite.decoding | {"max_gen_toks": budget}
        instances = [
            Instance("generate_until", {}, (prompts[index], dict(arguments)), i) for i, (index, _) in enumerate(batch)
        ]
        torch.manual_seed(_seed(suite, batch[0]))
        lm.batch_size_per_gpu = len(batch)
        texts = lm.generate_until(instances, disable_tqdm=True) if budget > 0 else [""] * len(batch)
        made = dict(zip(batch, texts, strict=True))
        samples.add(made)
        progress.done += len(batch)
        progress.fresh += len(batch)
        progress.tokens += sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        if report:
            report(progress)
    return [[samples.responses[q.index, sample] for sample in range(suite.samples)] for q in questions]


def response_budget(suite: Suite, prompt_tokens: int, max_length: int) -> int:
    """Tokens that a response may have; at most what the suite says and the model holds, in steps of 64 so that prompts
    of similar length share a batch. 0: the prompt leaves no room."""
    total = min(int(suite.metadata.get("max_length", max_length)), max_length)
    room = min(total - prompt_tokens, int(suite.decoding["max_gen_toks"]))
    return room if room == suite.decoding["max_gen_toks"] else max(room // 64 * 64, 0)


def _batches(
    suite: Suite, lengths: dict[int, int], wanted: list[Key], max_length: int, batch_tokens: int
) -> Iterator[tuple[int, list[Key]]]:
    """(response budget, keys) of each batch: the longest prompts first, so that memory runs out at once or never."""
    if suite.samples > 1:  # the batches decide what is drawn: they depend on nothing but the suite
        size = int(suite.metadata["samples_per_call"])
        for start in range(0, len(wanted), suite.samples):
            for first in range(start, start + suite.samples, size):
                batch = wanted[first : min(first + size, start + suite.samples)]
                yield response_budget(suite, lengths[batch[0][0]], max_length), batch
        return
    groups: dict[int, list[Key]] = {}
    for key in sorted(wanted, key=lambda key: (-lengths[key[0]], key)):
        groups.setdefault(response_budget(suite, lengths[key[0]], max_length), []).append(key)
    for budget, keys in groups.items():
        while keys:
            size = max(batch_tokens // (lengths[keys[0][0]] + budget), 1)
            yield budget, keys[:size]
            keys = keys[size:]


def _seed(suite: Suite, key: Key) -> int:
    text = f"{suite.metadata.get('seed', 0)}:{key[0]}:{key[1]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _line(key: Key, text: str) -> str:
    return json.dumps({"index": key[0], "sample": key[1], "response": text})


def _check_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        lines = "\n".join(f"  {key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in changed)
        raise UserError(
            f"{path} holds responses of another protocol or model, and results of two are not mixed:\n{lines}\n"
            "Give another --output, or start over with --fresh (which deletes them)"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
