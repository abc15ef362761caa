"""From a ``DataConfig`` to tokenised examples, which are made once and found again by their content."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import UserError, some
from ..models.task import Head, TaskConfig
from . import served_counts
from .built_in import GLUE
from .cache import TokenDataset
from .config import DataConfig, ValidationConfig
from .sources import HELD_OUT, HubSource, Source, find_source, overlap, splits_of
from .texts import single_class
from .tokenise import Maker, Stats, fingerprint

_MOST_NAMES = 20  # of columns, in a message
_SEED = 42  # the seed of the reference's data scaling runs
CAUSAL = TaskConfig()


@dataclass(frozen=True)
class PreparedData:
    """Examples to train on, held-out examples (if asked for), and the counts of the examples to train on."""

    train: TokenDataset
    validation: TokenDataset | None
    stats: Stats
    key: str
    """sha256 of everything the training examples depend on, their order included."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about the data, one line each."""
    head: Head | None = None
    """The labels of a classification; None for a language model."""

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return max(part.largest_id for part in (self.train, self.validation) if part is not None)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example of all."""
        return max(int(part.lengths.max()) for part in (self.train, self.validation) if part is not None)


def prepare(
    config: DataConfig,
    tokenizer: Any,
    *,
    tokenizer_fingerprint: str | None = None,
    progress: Callable[[int], None] | None = None,
    pool_threshold: int = 20_000,
    task: TaskConfig = CAUSAL,
) -> PreparedData:
    """Tokenise a dataset, or find it tokenised in the cache.

    Several processes may call this at once with the same config; it is cheaper to let one do it first.

    Args:
        config: what to prepare.
        tokenizer: fast Hugging Face tokenizer; None is enough for rows of ``input_ids``.
        tokenizer_fingerprint: identity of the tokenizer's content, if it is known; else it is computed.
        progress: called with the number of rows done so far, now and then.
        pool_threshold: rows encoded before a process pool is started; the result does not depend on it.
        task: what the rows are for. Labels that neither the task nor the set names are those of the training rows.
    Raises:
        UserError: the dataset is missing or malformed, or leaves no example.
    """
    head = known_head(config.dataset, task)
    make = Maker(config, tokenizer, tokenizer_fingerprint or fingerprint(tokenizer), progress, pool_threshold, head)
    source, columns = find_source(config.dataset, subset=config.subset, split=config.split, revision=config.revision)
    held_out = config.validation
    apart = _held_out_source(config, held_out, source) if held_out and held_out.dataset else None
    whole, counts, key = make(source, columns, config.dataset)
    if head is not None:
        head = replace(head, labels=tuple(counts.labels or ()))
    indices = np.random.default_rng(_SEED).permutation(len(whole))
    validation = None
    if apart is not None and held_out is not None:
        validation, _, _ = replace(make, head=head)(*apart, str(held_out.dataset))
    elif held_out is not None and held_out.size is not None:
        size = held_out.size if isinstance(held_out.size, int) else max(1, int(held_out.size * len(whole)))
        if size >= len(whole):
            raise UserError(
                f"data.validation.size: {held_out.size} leaves nothing to train on: {config.dataset} has "
                f"{len(whole)} examples",
                key="data.validation.size",
            )
        indices, last = np.split(indices, [len(whole) - size])
        validation = whole.select(np.sort(last))
    indices = indices[: max(1, int(config.fraction * len(indices)))]
    train = whole if len(indices) == len(whole) else whole.select(np.sort(indices))
    _check_classes(head, train, config.dataset)
    stats = replace(
        counts,
        examples=len(train),
        tokens=int(train.lengths.sum()),
        supervised_tokens=int(train.supervised.sum(dtype=np.int64)),
        longest=int(train.lengths.max()),
    )
    view = hashlib.sha256(f"{key} {held_out.size if held_out else None} {config.fraction}".encode()).hexdigest()
    notes = _notes(counts)
    if held_out and held_out.dataset and not held_out.split and (chosen := _held_out_split(held_out)):
        notes.append(f"data.validation is the {chosen} split of {held_out.dataset}, not the train split")
    return PreparedData(train, validation, stats, view, notes, head)


def _check_classes(head: Head | None, train: TokenDataset, dataset: str) -> None:
    if head is not None and head.problem == "single_label" and len(present := np.unique(train.answers)) == 1:
        raise single_class(f"the {len(train)} training rows of {dataset}", head.labels[int(present[0])])


def prepare_texts(config: DataConfig, tokenizer: Any, head: Head) -> TokenDataset:
    """Tokenise texts to classify whose labels are known, or find them tokenised in the cache. Texts that are too long
    are cut, so that the examples are the rows of ``config.dataset``, in their order.

    Raises:
        UserError: the dataset is missing or malformed.
    """
    config = config.model_copy(update={"over_length": "truncate"})
    source, columns = find_source(config.dataset, subset=config.subset, split=config.split, revision=config.revision)
    dataset, _, _ = Maker(config, tokenizer, fingerprint(tokenizer), None, 20_000, head)(
        source, columns, config.dataset
    )
    return dataset


def known_head(dataset: str, task: TaskConfig) -> Head | None:
    """Return the head as far as the task and the name of the set determine it: without labels if those of the rows are
    to be taken. Return None for a language model.

    Raises:
        UserError: the task is not that of the set.
    """
    if task.name != "classification":
        return None
    built_in = GLUE[dataset].head if dataset in GLUE else None
    if built_in and task.problem not in (None, built_in.problem):
        raise UserError(
            f"task.problem: {dataset} is {built_in.problem}, got {task.problem}; leave it out", key="task.problem"
        )
    if built_in and task.labels and len(task.labels) != len(built_in.labels):
        raise UserError(
            f"task.labels: {dataset} has {len(built_in.labels)} labels, {', '.join(built_in.labels) or 'but numbers'}; "
            f"got {task.labels}; leave them out",
            key="task.labels",
        )
    if built_in and not task.labels:
        return built_in
    return Head(tuple(task.labels or ()), task.problem or "single_label")


def _held_out_source(
    config: DataConfig, held_out: ValidationConfig, training: Source
) -> tuple[Source, dict[str, str] | None]:
    """Return the source of ``data.validation.dataset``, which has no rows of the training set as a whole."""
    assert held_out.dataset
    same = held_out.dataset == config.dataset  # another split of the same hub set
    split = held_out.split or _held_out_split(held_out)
    if split is None and same and isinstance(training, HubSource):
        raise UserError(
            f"data.validation.dataset: {held_out.dataset} is data.dataset, so data.validation.split must say which of "
            "its splits is held out; or hold out a share of the rows: data.validation: {size: 0.05}",
            key="data.validation",
        )
    subset, revision = (config.subset, config.revision) if same else (None, None)
    found = find_source(held_out.dataset, subset=subset, split=split or "train", revision=revision)
    if overlap(training, found[0]):
        raise UserError(
            f"data.validation: {held_out.dataset} (split {split or 'train'}) has the rows that are trained on "
            f"({config.dataset}, split {config.split}), so its loss would say nothing. Name other rows, or hold out a "
            "share of them: data.validation: {size: 0.05}",
            key="data.validation",
        )
    return found


def _held_out_split(held_out: ValidationConfig) -> str | None:
    """Return the split that a directory or a set of GLUE has for validation, or else for tests, if there is one."""
    if held_out.dataset in GLUE:
        return GLUE[held_out.dataset].splits[0]
    splits = splits_of(str(held_out.dataset)) or ()
    return next((split for split in HELD_OUT if split in splits), None)


def _notes(stats: Stats) -> list[str]:
    notes = []
    if stats.unused_columns:
        notes.append(f"columns of the data that are not used: {some(stats.unused_columns, _MOST_NAMES)}")
    if stats.date:
        notes.append(f"the chat template prints today's date: {stats.date} stands for it in all rows")
    return notes + served_counts.notes(stats.served, stats.turn_ends, stats.refused)
