"""Batches: which examples form a step, which worker computes them, and their tensors (padded rows, or one row without
padding)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from .encode import IGNORE, Example

Batching = Literal["length-grouped", "shuffled", "sequential", "packed"]


@dataclass(frozen=True)
class Limit:
    """The most that one worker computes at once: a number of examples, or of ``tokens`` in one row without padding."""

    examples: int | None = None
    tokens: int | None = None
    multiple_of: int = 1
    """With ``tokens``, the number of micro-batches is a multiple of this; see ``pack_batch``."""

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens" if self.tokens else f"{self.examples} sequence{'s'[: self.examples != 1]}"

    def split(self, indices: np.ndarray, lengths: np.ndarray, num_workers: int) -> list[list[np.ndarray]]:
        """Divide a global batch by ``split_batch``, or by ``pack_batch`` if the limit is in tokens."""
        if self.tokens:
            return pack_batch(
                indices, lengths, max_tokens=self.tokens, num_workers=num_workers, multiple_of=self.multiple_of
            )
        assert self.examples
        return split_batch(indices, lengths, micro_batch_size=self.examples, num_workers=num_workers)


def plan_epoch(
    lengths: np.ndarray,
    *,
    batching: Batching,
    batch_size: int,
    seed: int,
    epoch: int,
    shown: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Return the global batches of one epoch: arrays of example indices that together are ``shown``.

    The last batch may be smaller.

    ``length-grouped`` (the paper's, Appendix C; Hugging Face's length-grouped sampler): a random order is cut
    into groups of 50 batches (fewer if there would not be four groups), each sorted from long to short, so
    that a batch holds similar lengths. The longest example comes first of all, so that a lack of memory shows at
    the first step.

    Args:
        lengths: tokens of each example; shape (examples,).
        batching: ``length-grouped``; ``shuffled`` and ``packed``: a random order; ``sequential``: the order of the
            file.
        batch_size: examples of a step, over all workers.
        seed, epoch: these two alone determine the random order.
        shown: indices of the examples of this epoch, of which some may be absent or repeated; None for each once.
    """
    shown = np.arange(len(lengths)) if shown is None else shown
    count = len(shown)
    random = np.random.default_rng([seed, epoch]).permutation(count)
    order = shown if batching == "sequential" else shown[random]
    if batching == "length-grouped" and count:
        group = max(1, min(50, count // (4 * batch_size))) * batch_size
        groups = [_longest_first(order[at : at + group], lengths) for at in range(0, count, group)]
        longest = max(range(len(groups)), key=lambda i: lengths[groups[i][0]])
        groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
        order = np.concatenate(groups)
    return [order[at : at + batch_size] for at in range(0, count, batch_size)]


def split_batch(
    indices: np.ndarray, lengths: np.ndarray, *, micro_batch_size: int, num_workers: int
) -> list[list[np.ndarray]]:
    """Divide a global batch into the micro-batches of every worker. The union of all micro-batches is the batch.

    The micro-batches do not depend on the number of workers; only which worker computes each of them does. They are
    cut from the batch sorted by length, so that padding is small. They are dealt out in rounds, the longest of a round
    to the worker that has least so far, so that workers compute similar lengths at the same time and none waits long.
    All workers get the same number of micro-batches (empty ones if nothing is left), since each may be a collective
    operation. Within a micro-batch the order of the batch is kept.

    Args:
        indices: the batch; shape (n,).
        lengths: tokens of every example of the dataset (indexed by ``indices``).
        micro_batch_size: most examples that a worker computes at once.
    Returns:
        ``result[worker][round]``, an array of at most ``micro_batch_size`` indices.
    """
    by_length = np.argsort(-lengths[indices], kind="stable")  # places in the batch
    pieces = np.array_split(by_length, -(-len(indices) // micro_batch_size)) if len(indices) else []
    micro_batches = [indices[np.sort(places)] for places in pieces]
    return _deal(micro_batches, [int(lengths[part].max()) * len(part) for part in micro_batches], num_workers)


def pack_batch(
    indices: np.ndarray, lengths: np.ndarray, *, max_tokens: int, num_workers: int, multiple_of: int = 1
) -> list[list[np.ndarray]]:
    """Divide a global batch as ``split_batch`` does, for rows without padding: into as few micro-batches of at most
    ``max_tokens`` tokens as possible, with nearly the same number of tokens each (a longer example is a micro-batch of
    its own).

    Args:
        max_tokens: most tokens that a worker computes at once.
        multiple_of: the number of micro-batches is a multiple of this, if the batch has enough examples. If this is
            the number of workers, no worker is idle, but the contents of the micro-batches depend on that number.
    Returns:
        ``result[worker][round]``, an array of indices.
    """
    limit = max(max_tokens, int(lengths[indices].max(initial=0)))
    by_length = np.argsort(-lengths[indices], kind="stable")  # places in the batch
    count = -(-int(lengths[indices].sum()) // limit)
    while True:
        count = min(-(-count // multiple_of) * multiple_of, len(indices))
        tokens, places = np.zeros(count, np.int64), [list[int]() for _ in range(count)]
        for place in by_length:  # the longest remaining example goes to the micro-batch with least
            lightest = int(tokens.argmin())
            places[lightest].append(int(place))
            tokens[lightest] += lengths[indices[place]]
        if tokens.max(initial=0) <= limit:
            most_first = np.argsort(-tokens, kind="stable")
            micro_batches = [indices[sorted(places[i])] for i in most_first]
            return _deal(micro_batches, tokens[most_first].tolist(), num_workers)
        count += 1


def _deal(micro_batches: list[np.ndarray], costs: list[int], num_workers: int) -> list[list[np.ndarray]]:
    """Deal out in rounds, the first of a round to the worker that has had least; empty ones fill the last round."""
    missing = -len(micro_batches) % num_workers
    filled = [*zip(micro_batches, costs, strict=True), *[(np.zeros(0, np.int64), 0)] * missing]
    result: list[list[np.ndarray]] = [[] for _ in range(num_workers)]
    work = np.zeros(num_workers)
    for at in range(0, len(filled), num_workers):
        for worker, (part, cost) in zip(np.argsort(work, kind="stable"), filled[at : at + num_workers], strict=True):
            result[worker].append(part)
            work[worker] += cost
    return result


def collate(
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    pad_to_multiple_of: int = 8,
    side: Literal["left", "right"] = "right",
) -> dict[str, torch.Tensor] | None:
    """Pad examples to one length. Returns None for no examples.

    The label of an example's first token becomes -100: nothing comes before it to predict it from, but with
    padding on the left a model would be asked to predict it from padding.

    Args:
        pad_token_id: fills ``input_ids``; labels are filled with -100.
        pad_to_multiple_of: the length in tokens is a multiple of this (the paper's scripts: 8).
        side: side of the padding.
    Returns:
        ``input_ids``, ``attention_mask`` (1 on tokens, 0 on padding) and ``labels``; int64, shape
        (examples, length).
    """
    if not examples:
        return None
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), -(-longest // pad_to_multiple_of) * pad_to_multiple_of)
    input_ids = np.full(shape, pad_token_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    for row, example in enumerate(examples):
        start = 0 if side == "right" else shape[1] - len(example.input_ids)
        end = start + len(example.input_ids)
        input_ids[row, start:end] = example.input_ids
        attention_mask[row, start:end] = 1
        labels[row, start + 1 : end] = example.labels[1:]
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def flatten(examples: Sequence[Example], *, pad_to_multiple_of: int = 8) -> dict[str, torch.Tensor | int] | None:
    """Put examples one after the other in one row. Returns None for no examples. The tokens that fill the row up form a
    sequence of their own.

    The label of an example's first token becomes -100.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids`` (which start again with each example), int64, shape (1, tokens);
        the start of each sequence, and the end of the last (``cu_seq_lens_q`` and ``cu_seq_lens_k``, int32); and the
        length of the longest (``max_length_q`` and ``max_length_k``).
    """
    if not examples:
        return None
    lengths = [len(example.input_ids) for example in examples]
    if rest := -sum(lengths) % pad_to_multiple_of:
        lengths.append(rest)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    input_ids = np.zeros(starts[-1], np.int64)
    labels = np.full(starts[-1], IGNORE, np.int64)
    for start, example in zip(starts, examples, strict=False):
        end = start + len(example.input_ids)
        input_ids[start:end] = example.input_ids
        labels[start + 1 : end] = example.labels[1:]
    position_ids = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    rows = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    at = torch.from_numpy(starts.astype(np.int32))
    return {
        **{name: torch.from_numpy(row).unsqueeze(0) for name, row in rows.items()},
        "cu_seq_lens_q": at,
        "cu_seq_lens_k": at,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def with_targets(batch: Mapping[str, torch.Tensor | int]) -> dict[str, torch.Tensor | int]:
    """Return ``batch`` with ``positions`` and ``targets`` instead of ``labels``: the positions, in the flattened batch,
    of the tokens whose successor is supervised, and these successors; int64, shape (supervised tokens,)."""
    labels = batch["labels"]
    assert isinstance(labels, torch.Tensor)
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    positions = (following != IGNORE).nonzero().squeeze(1)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return {**inputs, "positions": positions, "targets": following[positions]}


def _longest_first(indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return indices[np.argsort(-lengths[indices], kind="stable")]
