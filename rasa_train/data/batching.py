"""Which examples form a step, who computes them, and the padded tensors."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch

from rasa_train.data.encode import IGNORE, Example

Batching = Literal["length-grouped", "shuffled", "sequential"]


class HasTargets(Protocol):
    """Anything that knows the targets of each of its examples, as ``TokenDataset`` does."""

    @property
    def supervised(self) -> np.ndarray: ...


def plan_epoch(lengths: np.ndarray, *, batching: Batching, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of one epoch: arrays of example indices that hold each example once.

    The last batch may be smaller.

    ``length-grouped`` (the paper's, Appendix C; Hugging Face's length-grouped sampler): a random order is cut
    into groups of 50 batches (fewer where there would not be four groups), each sorted from long to short, so
    that a batch holds similar lengths. The longest example comes first of all, so a lack of memory shows at
    the first step.

    Args:
        lengths: tokens of each example; shape (examples,).
        batching: ``length-grouped``; ``shuffled``: a random order; ``sequential``: the order of the file.
        batch_size: examples of a step, over all workers.
        seed, epoch: the plan depends on these and nothing else.
    """
    count = len(lengths)
    random = np.random.default_rng([seed, epoch]).permutation(count)
    order = np.arange(count) if batching == "sequential" else random
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
    """Divides a global batch: for every worker, its micro-batches. The union is the batch.

    The micro-batches do not depend on the number of workers, only who computes them does. They are cut from the
    batch sorted by length, so padding is small, and are dealt out in rounds, the longest of a round to whoever has
    least so far, so that workers compute similar lengths at the same time and nobody waits long. All workers get
    the same number of them (empty ones where nothing is left), since each may be a collective operation. Within a
    micro-batch the order of the batch is kept.

    Args:
        indices: the batch; shape (n,).
        lengths: tokens of every example of the dataset (indexed by ``indices``).
        micro_batch_size: the most examples a worker computes at once.
    Returns:
        ``result[worker][round]``, an array of at most ``micro_batch_size`` indices.
    """
    by_length = np.argsort(-lengths[indices], kind="stable")  # places in the batch
    pieces = np.array_split(by_length, -(-len(indices) // micro_batch_size)) if len(indices) else []
    micro_batches = [indices[np.sort(places)] for places in pieces]
    nothing = indices[:0]
    micro_batches += [nothing] * (-len(micro_batches) % num_workers)
    result: list[list[np.ndarray]] = [[] for _ in range(num_workers)]
    work = np.zeros(num_workers)  # padded tokens
    for at in range(0, len(micro_batches), num_workers):
        for worker, part in zip(np.argsort(work, kind="stable"), micro_batches[at : at + num_workers], strict=True):
            result[worker].append(part)
            work[worker] += lengths[part].max(initial=0) * len(part)
    return result


def collate(
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    pad_to_multiple_of: int = 8,
    side: Literal["left", "right"] = "right",
) -> dict[str, torch.Tensor] | None:
    """Pads examples to one length; None for no examples.

    The label of an example's first token becomes -100: nothing comes before it to predict it from, but with
    padding on the left a model would be asked to predict it from padding.

    Args:
        pad_token_id: fills ``input_ids``; labels are filled with -100.
        pad_to_multiple_of: of tokens (the paper's scripts: 8).
        side: where the padding goes.
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


def supervised_tokens(dataset: HasTargets, indices: np.ndarray) -> int:
    """Tokens that carry loss in these examples: what a global batch's loss is divided by."""
    return int(dataset.supervised[indices].sum(dtype=np.int64))


def _longest_first(indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return indices[np.argsort(-lengths[indices], kind="stable")]
