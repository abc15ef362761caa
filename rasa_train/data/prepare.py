"""From a ``DataConfig`` to tokenised examples, which are made once and found again by their content."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import process
from ..errors import UserError, some
from ..io.bounded import weight
from ..models.task import Head, TaskConfig
from .built_in import GLUE
from .cache import FORMAT, CacheWriter, TokenDataset, default_directory, read_stats
from .chat import DATE
from .columns import Columns, Row, find_columns
from .config import DataConfig, ValidationConfig
from .encode import Encoded, Encoder, plain_backend
from .encode_pool import CHUNK, Chunk, encode_all
from .encode_texts import TextEncoder, longest
from .sources import HELD_OUT, HubSource, Source, find_source, overlap, splits_of
from .texts import TextColumns, find_text_columns, found_labels, single_class

_CHUNK_BYTES = 8 << 20  # about the bytes of the texts of a chunk
_MOST_NAMES = 20  # of columns, in a message
_SEED = 42  # the seed of the reference's data scaling runs
CAUSAL = TaskConfig()


@dataclass(frozen=True)
class Stats:
    """Counts of a prepared training set.

    ``rows``, ``dropped_over_length``, ``dropped_unsupervised`` and ``truncated`` count rows of the whole
    source. The rest describe the examples trained on, after ``validation`` and ``fraction``: their number, their
    tokens, their tokens that carry loss, and the length of the longest in tokens.
    """

    rows: int
    dropped_over_length: int
    dropped_unsupervised: int
    truncated: int
    examples: int
    tokens: int
    supervised_tokens: int
    longest: int
    unused_columns: list[str] = field(default_factory=list)
    """Columns that rows have and that are not used, sorted."""
    date: str | None = None
    """The date that the chat template prints, if it prints one."""
    labels: list[str] | None = None
    """Names of the labels of a classification set."""
    pairs: bool = False
    """Whether its texts are pairs."""


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
    make = _Maker(config, tokenizer, tokenizer_fingerprint or _fingerprint(tokenizer), progress, pool_threshold, head)
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
    dataset, _, _ = _Maker(config, tokenizer, _fingerprint(tokenizer), None, 20_000, head)(
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
    return notes


@dataclass(frozen=True)
class _Maker:
    """Maker of the tokenised set of one source, which it looks for in the cache first."""

    config: DataConfig
    tokenizer: Any
    tokenizer_fingerprint: str
    progress: Callable[[int], None] | None
    pool_threshold: int
    head: Head | None
    """The head of a classification; without labels, if those of the rows are to be taken."""

    def __call__(self, source: Source, columns: dict[str, str] | None, dataset: str) -> tuple[TokenDataset, Stats, str]:
        columns = self.config.columns or columns
        key = self._key(source, columns)
        root = Path(self.config.cache_dir).expanduser() if self.config.cache_dir else default_directory()
        directory = root / "tokens" / key[:32]
        if (known := read_stats(directory, key)) is not None:
            return TokenDataset(directory), Stats(**known), key
        try:
            with CacheWriter(directory, texts=self.head is not None) as writer:
                stats = self._write(source, dataset, columns, writer)
                writer.commit(key, asdict(stats))
        except OSError as error:  # no permission, or the disk is full
            raise UserError(
                f"cannot write tokenised data to {root}: {error}; set data.cache_dir, or $RASA_TRAIN_CACHE, "
                "to a writable directory with enough room",
                key="data.cache_dir",
            ) from error
        return TokenDataset(directory), stats, key

    def _key(self, source: Source, columns: dict[str, str] | None) -> str:
        """Return the sha256 of everything that the tokens depend on."""
        config = self.config
        parts = {
            # The text of other templates has not changed since format 1, so runs begun with it can be resumed.
            "format": FORMAT if config.template == "chat" else 1,
            "source": source.fingerprint(),
            "columns": columns,
            "tokenizer": self.tokenizer_fingerprint,
            "template": config.template,
            "supervise": config.supervise,
            "max_length": config.max_length,
            "over_length": config.over_length,
        }
        if self.head is not None:
            parts |= {"format": FORMAT, "head": asdict(self.head), "max_length": longest(config, self.tokenizer)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _write(self, source: Source, dataset: str, columns: dict[str, str] | None, writer: CacheWriter) -> Stats:
        rows = source.rows()
        first = next(rows, None)
        if first is None:
            raise UserError(f"data.dataset: {dataset} has no rows", key="data.dataset")
        if self.head is not None:
            return self._write_texts(source, dataset, find_text_columns(first[1], first[0], columns), writer)
        kind = find_columns(first[1], first[0], columns).kind
        encoder = Encoder(self.config, self.tokenizer, kind)
        chat = encoder.chat
        found = find_columns(first[1], first[0], columns, chat.names if chat else ())
        chunks = _chunks(itertools.chain([first], rows), found)
        workers = 1 if found.kind == "tokens" else _worker_count(self.config)
        stats = self._encoded(encoder, chunks, workers, writer, dataset)
        if found.absent:
            raise UserError(
                f"data.columns: no row of {dataset} has a column {sorted(found.absent)[0]!r}; name the right columns",
                key="data.columns",
            )
        date = f"{DATE:%d %b %Y}" if chat and chat.prints_the_date else None
        return replace(stats, unused_columns=sorted(found.unused), date=date)

    def _write_texts(self, source: Source, dataset: str, names: Mapping[str, str], writer: CacheWriter) -> Stats:
        assert self.head
        found, labels = TextColumns(names, self.head, may_be_empty=dataset in GLUE), self.head.labels
        if self.head.problem != "regression" and not labels:
            values = ((where, found.value(row, where)) for where, row in source.rows())
            labels = found_labels(values, several=self.head.problem == "multi_label", dataset=dataset)
            found = replace(found, head=replace(self.head, labels=labels))
        pairs = "text_pair" in names
        encoder = TextEncoder(self.config, self.tokenizer, pairs=pairs)
        chunks = _chunks(source.rows(), found)
        stats = self._encoded(encoder, chunks, _worker_count(self.config), writer, dataset)
        return replace(stats, unused_columns=sorted(found.unused), labels=list(labels), pairs=pairs)

    def _encoded(
        self, encoder: Encoder | TextEncoder, chunks: Iterator[Chunk], workers: int, writer: CacheWriter, dataset: str
    ) -> Stats:
        stats = Stats(0, 0, 0, 0, 0, 0, 0, 0)
        for size, encoded in encode_all(encoder, chunks, workers, self.pool_threshold):
            writer.add(encoded.examples)
            stats = _added(stats, size, encoded)
            if self.progress is not None:
                self.progress(stats.rows)
        if stats.examples == 0:
            config = self.config
            raise UserError(
                f"data.dataset: no example is left of the {stats.rows} rows of {dataset}: "
                f"{stats.dropped_over_length} dropped as longer than max_length={config.max_length} tokens "
                f"(over_length: {config.over_length}), {stats.dropped_unsupervised} because no token carries "
                f"loss (supervise: {config.supervise}; {stats.truncated} were cut at max_length). Raise "
                "data.max_length or choose another supervise",
                key="data.dataset",
            )
        return stats


def _added(stats: Stats, rows: int, encoded: Encoded) -> Stats:
    lengths = [len(example.input_ids) for example in encoded.examples]
    return Stats(
        rows=stats.rows + rows,
        dropped_over_length=stats.dropped_over_length + encoded.dropped_over_length,
        dropped_unsupervised=stats.dropped_unsupervised + encoded.dropped_unsupervised,
        truncated=stats.truncated + encoded.truncated,
        examples=stats.examples + len(lengths),
        tokens=stats.tokens + sum(lengths),
        supervised_tokens=0,  # counted on the views
        longest=max([stats.longest, *lengths]),
    )


def _chunks(rows: Iterable[tuple[str, Row]], columns: Columns | TextColumns) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for where, row in rows:
        try:
            chunk.append((where, columns.extract(row, where), columns.variables(row, where)))
        except RecursionError:
            raise UserError(
                f"{where}: lists in lists, too deep to be read; correct or remove this row", key="data.dataset"
            ) from None
        size += weight(chunk[-1])
        if len(chunk) == CHUNK or size > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _worker_count(config: DataConfig) -> int:
    if config.num_workers != "auto":
        return config.num_workers
    return min(process.cores(), 16)


def _fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of what defines a tokenizer: its Rust half's whole state, special tokens and chat template."""
    if tokenizer is None:
        return "none"
    parts = [repr(sorted(tokenizer.special_tokens_map.items())), repr(tokenizer.chat_template)]
    if tokenizer.is_fast:  # any other tokenizer is refused, unless the rows are tokens already
        parts.append(plain_backend(tokenizer).to_str())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
