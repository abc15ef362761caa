"""From a ``DataConfig`` to tokenised examples, which are made once and found again by their content."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import UserError, some
from ..models.task import Head, TaskConfig
from . import contamination, duplicates
from .built_in import GLUE
from .cache import TokenDataset
from .config import DataConfig, DatasetConfig, ValidationConfig
from .duplicates import distinct
from .hub_source import HubSource
from .shares import divided, draws_of, joined, notes_on, refuse_two_readings
from .sources import HELD_OUT, Source, find_source, overlap, splits_of
from .texts import single_class
from .tokenise import Maker, Stats, fingerprint

_MOST_NAMES = 20  # of columns, in a message
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
    datasets: tuple[str, ...] = ("data",)
    """Names of the sets that are trained on together, to which the ``origins`` of the examples refer."""
    held_out: tuple[str, ...] = ("data",)
    """The same for the held-out examples."""

    @property
    def examples_by_dataset(self) -> dict[str, int]:
        """Number of examples of each set in an epoch."""
        return dict(zip(self.datasets, self.train.per_epoch(np.ones(len(self.train), np.int64)), strict=True))

    @property
    def tokens_by_dataset(self) -> dict[str, int]:
        """Number of tokens of each set in an epoch; the mean over epochs if these show different examples."""
        return dict(zip(self.datasets, self.train.per_epoch(self.train.lengths), strict=True))

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
    head = known_head(config, task)
    make = Maker(config, tokenizer, tokenizer_fingerprint or fingerprint(tokenizer), progress, pool_threshold, head)
    found = [_source(config, place) for place in range(len(config.sets))]
    sources, held_out = [source for source, _ in found], config.validation
    apart = _held_out_source(config, held_out, sources) if held_out and held_out.dataset else None
    wholes, counts, keys = zip(*(_made(make, place, *one) for place, one in enumerate(found)), strict=True)
    if head is not None:
        head = replace(head, labels=tuple(counts[0].labels or ()))
    refuse_two_readings(config, sources, keys)
    outside, outside_key = _made_apart(replace(make, head=head), apart)
    kept, *equal = distinct(wholes, outside, config.names, drop=config.deduplicate)
    parts = divided(config, kept, keys)
    views = [trained for trained, _ in parts]
    validation = joined([held for _, held in parts]) if outside is None else outside
    sizes = [len(view) for view in views]
    draws = draws_of(config, sizes)
    train = joined(views, draws)
    _check_classes(config, head, train)
    stats = replace(
        _sum(counts),
        examples=len(train),
        tokens=sum(train.per_epoch(train.lengths)),
        supervised_tokens=sum(train.per_epoch(train.supervised)),
        longest=int(train.lengths.max()),
        duplicates=equal[0],
        held_out_examples=equal[1],
    )
    chosen_by = [keys[0] if len(keys) == 1 else f"{keys} {draws}", held_out.size if held_out else None, config.fraction]
    chosen_by += [f"deduplicated, and against {outside_key}"] if config.deduplicate else []
    view = hashlib.sha256(" ".join(map(str, chosen_by)).encode()).hexdigest()
    notes = _notes(config, counts) + notes_on(config.names, sizes, draws) + _left_out(config, stats)
    if held_out and held_out.dataset and not held_out.split and (chosen := _held_out_split(held_out)):
        notes.append(f"data.validation is the {chosen} split of {held_out.dataset}, not the train split")
    names = (str(held_out.dataset),) if held_out and held_out.dataset else config.names
    held = validation if len(validation) else None
    return PreparedData(train, held, stats, view, notes, head, config.names, names)


def _source(config: DataConfig, place: int) -> tuple[Source, dict[str, str] | None]:
    """Return the source of one of the sets, and its columns as far as they are known."""
    one = config.sets[place]
    with _named(config.key(place, "dataset")):
        source, columns = find_source(one.dataset, subset=one.subset, split=one.split, revision=one.revision)
    return source, one.columns or columns


def _made(make: Maker, place: int, source: Source, columns: dict[str, str] | None) -> tuple[TokenDataset, Stats, str]:
    with _named(make.config.key(place, "dataset")):
        return make(source, columns, make.config.sets[place].dataset)


def _made_apart(
    make: Maker, found: tuple[Source, dict[str, str] | None] | None
) -> tuple[TokenDataset | None, str | None]:
    """Return the held-out examples that are a set of their own, and the identity of their content."""
    if found is None:
        return None, None
    assert make.config.validation
    with _named("data.validation.dataset"):
        made, _, key = make.of_all_rows()(*found, str(make.config.validation.dataset))
    return made, key


@contextmanager
def _named(dataset: str) -> Iterator[None]:
    """Let errors about ``data.dataset`` and the keys beside it name ``dataset``, the key of the set that is read, and
    the keys beside that."""
    try:
        yield
    except UserError as error:
        section, _, name = (error.key or "").rpartition(".")
        new = f"{dataset.rpartition('.')[0]}.{name}"
        known = (ValidationConfig if dataset == "data.validation.dataset" else DatasetConfig).model_fields
        if section != "data" or name not in known or new == error.key:
            raise
        raise type(error)(str(error).replace(f"data.{name}", new), key=new) from error


def _sum(counts: Sequence[Stats]) -> Stats:
    """Return the counts of all sets together. Those of the examples that are trained on are not known yet."""
    return replace(
        counts[0],
        rows=sum(one.rows for one in counts),
        dropped_over_length=sum(one.dropped_over_length for one in counts),
        dropped_unsupervised=sum(one.dropped_unsupervised for one in counts),
        truncated=sum(one.truncated for one in counts),
        contaminated={name: sum(one.contaminated[name] for one in counts) for name in counts[0].contaminated},
        contaminated_rows=sum(one.contaminated_rows for one in counts),
        contaminated_places=[place for one in counts for place in one.contaminated_places][: contamination.MOST_TOLD],
        unused_columns=sorted({name for one in counts for name in one.unused_columns}),
        date=next((one.date for one in counts if one.date), None),
        pairs=all(one.pairs for one in counts),
    )


def _check_classes(config: DataConfig, head: Head | None, train: TokenDataset) -> None:
    if head is not None and head.problem == "single_label" and len(present := np.unique(train.answers)) == 1:
        rows = f"the {len(train)} training rows of {' and '.join(config.names)}"
        error = single_class(rows, head.labels[int(present[0])])
        key = "data.dataset" if config.mix is None else "data.mix"
        raise UserError(str(error).replace("data.dataset", key), key=key)


def prepare_texts(config: DataConfig, tokenizer: Any, head: Head) -> TokenDataset:
    """Tokenise texts to classify whose labels are known, or find them tokenised in the cache. Texts that are too long
    are cut, so that the examples are the rows of ``config.sets``, in their order.

    Raises:
        UserError: the dataset is missing or malformed.
    """
    config = config.model_copy(update={"over_length": "truncate"})
    make = Maker(config, tokenizer, fingerprint(tokenizer), None, 20_000, head)
    return joined([_made(make, place, *_source(config, place))[0] for place in range(len(config.sets))])


def known_head(config: DataConfig, task: TaskConfig) -> Head | None:
    """Return the head as far as the task and the names of the sets determine it: without labels if those of the rows
    are to be taken. Return None for a language model.

    Raises:
        UserError: the task is not that of the sets, or several sets have rows with labels that are not named.
    """
    if task.name != "classification":
        return None
    known = {one.dataset: GLUE[one.dataset].head for one in config.sets if one.dataset in GLUE}
    dataset, built_in = next(iter(known.items()), ("", None))
    for other, head in known.items():
        if head != built_in:
            raise UserError(
                f"data.mix: {dataset} and {other} have other labels, and a classifier has the same for all texts; "
                "train one classifier for each",
                key="data.mix",
            )
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
    found = Head(tuple(task.labels or ()), task.problem or "single_label")
    if len(config.sets) > 1 and not found.labels and found.problem != "regression":
        raise UserError(
            "task.labels: the labels of several sets must be named, so that they are the same in all: task: {name: "
            "classification, labels: [<label>, <label>]}, in the order of the model's outputs",
            key="task",
        )
    return found


def _held_out_source(
    config: DataConfig, held_out: ValidationConfig, trained: Sequence[Source]
) -> tuple[Source, dict[str, str] | None]:
    """Return the source of ``data.validation.dataset``, which has no rows of a training set as a whole, and its
    columns. Those that the recipe names for the set of this name, or for all sets, are also those of the held-out
    rows."""
    assert held_out.dataset
    places = [place for place, one in enumerate(config.sets) if one.dataset == held_out.dataset]
    same = config.sets[places[0]] if places else None  # another split of the same hub set
    split = held_out.split or _held_out_split(held_out)
    if split is None and same and isinstance(trained[places[0]], HubSource):
        raise UserError(
            f"data.validation.dataset: {held_out.dataset} is {config.key(places[0], 'dataset')}, so "
            "data.validation.split must say which of its splits is held out; or hold out a share of the rows: "
            "data.validation: {size: 0.05}",
            key="data.validation",
        )
    subset, revision = (same.subset, same.revision) if same else (None, None)
    with _named("data.validation.dataset"):
        source, columns = find_source(held_out.dataset, subset=subset, split=split or "train", revision=revision)
    for one, training in zip(config.sets, trained, strict=True):
        if overlap(training, source):
            raise UserError(
                f"data.validation: {held_out.dataset} (split {split or 'train'}) has the rows that are trained on "
                f"({one.dataset}, split {one.split}), so its loss would say nothing. Name other rows, or hold out a "
                "share of them: data.validation: {size: 0.05}",
                key="data.validation",
            )
    first = same or config.sets[0]
    shared = all(one.columns == first.columns for one in config.sets)
    return source, (first.columns if same or shared else None) or columns


def _held_out_split(held_out: ValidationConfig) -> str | None:
    """Return the split that a directory or a set of GLUE has for validation, or else for tests, if there is one."""
    if held_out.dataset in GLUE:
        return GLUE[held_out.dataset].splits[0]
    splits = splits_of(str(held_out.dataset)) or ()
    return next((split for split in HELD_OUT if split in splits), None)


def _notes(config: DataConfig, counts: Sequence[Stats]) -> list[str]:
    notes = []
    for name, one in zip(config.names, counts, strict=True):
        if one.unused_columns:
            whose = "the data" if len(counts) == 1 else name
            notes.append(f"columns of {whose} that are not used: {some(one.unused_columns, _MOST_NAMES)}")
    if date := next((one.date for one in counts if one.date), None):
        notes.append(f"the chat template prints today's date: {date} stands for it in all rows")
    return notes


def _left_out(config: DataConfig, stats: Stats) -> list[str]:
    notes = duplicates.notes(stats.duplicates, stats.held_out_examples, dropped=config.deduplicate)
    if config.decontaminate:
        found = (stats.contaminated, stats.contaminated_rows, stats.contaminated_places)
        notes = contamination.notes(*found, config.decontaminate) + notes
    return notes
