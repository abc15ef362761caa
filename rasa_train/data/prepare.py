"""From a ``DataConfig`` to tokenised examples, which are made once and found again by their content."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import process
from ..errors import UserError, some
from ..io.bounded import weight
from ..stop import die_with
from .cache import FORMAT, CacheWriter, TokenDataset, default_directory, read_stats
from .chat import DATE
from .columns import Columns, Row, find_columns
from .config import DataConfig, ValidationConfig
from .encode import Encoded, Encoder, EncoderRow, plain_backend
from .sources import HELD_OUT, HubSource, Source, find_source, overlap, splits_of

_CHUNK, _CHUNK_BYTES = 256, 8 << 20  # rows, and about the bytes of their texts
_MOST_NAMES = 20  # of columns, in a message
_SEED = 42  # the seed of the reference's data scaling runs
Chunk = list[EncoderRow]


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

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return max(part.largest_id for part in (self.train, self.validation) if part is not None)


def prepare(
    config: DataConfig,
    tokenizer: Any,
    *,
    tokenizer_fingerprint: str | None = None,
    progress: Callable[[int], None] | None = None,
    pool_threshold: int = 20_000,
) -> PreparedData:
    """Tokenise a dataset, or find it tokenised in the cache.

    Several processes may call this at once with the same config; it is cheaper to let one do it first.

    Args:
        config: what to prepare.
        tokenizer: fast Hugging Face tokenizer; None is enough for rows of ``input_ids``.
        tokenizer_fingerprint: identity of the tokenizer's content, if it is known; else it is computed.
        progress: called with the number of rows done so far, now and then.
        pool_threshold: rows encoded before a process pool is started; the result does not depend on it.
    Raises:
        UserError: the dataset is missing or malformed, or leaves no example.
    """
    make = _Maker(config, tokenizer, tokenizer_fingerprint or _fingerprint(tokenizer), progress, pool_threshold)
    source, columns = find_source(config.dataset, subset=config.subset, split=config.split, revision=config.revision)
    held_out = config.validation
    apart = _held_out_source(config, held_out, source) if held_out and held_out.dataset else None
    whole, counts, key = make(source, columns, config.dataset)
    indices = np.random.default_rng(_SEED).permutation(len(whole))
    validation = None
    if apart is not None and held_out is not None:
        validation, _, _ = make(*apart, str(held_out.dataset))
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
    return PreparedData(train, validation, stats, view, notes)


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
    """Return the split that a directory has for validation, or else for tests; None if it has neither."""
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

    def __call__(self, source: Source, columns: dict[str, str] | None, dataset: str) -> tuple[TokenDataset, Stats, str]:
        columns = self.config.columns or columns
        key = self._key(source, columns)
        root = Path(self.config.cache_dir).expanduser() if self.config.cache_dir else default_directory()
        directory = root / "tokens" / key[:32]
        if (known := read_stats(directory, key)) is not None:
            return TokenDataset(directory), Stats(**known), key
        try:
            with CacheWriter(directory) as writer:
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
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _write(self, source: Source, dataset: str, columns: dict[str, str] | None, writer: CacheWriter) -> Stats:
        rows = source.rows()
        first = next(rows, None)
        if first is None:
            raise UserError(f"data.dataset: {dataset} has no rows", key="data.dataset")
        kind = find_columns(first[1], first[0], columns).kind
        encoder = Encoder(self.config, self.tokenizer, kind)
        chat = encoder.chat
        found = find_columns(first[1], first[0], columns, chat.names if chat else ())
        chunks = _chunks(itertools.chain([first], rows), found)
        workers = 1 if found.kind == "tokens" else _worker_count(self.config)
        stats = Stats(0, 0, 0, 0, 0, 0, 0, 0)
        for size, encoded in _encode(encoder, chunks, workers, self.pool_threshold):
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
        if found.absent:
            raise UserError(
                f"data.columns: no row of {dataset} has a column {sorted(found.absent)[0]!r}; name the right columns",
                key="data.columns",
            )
        date = f"{DATE:%d %b %Y}" if chat and chat.prints_the_date else None
        return replace(stats, unused_columns=sorted(found.unused), date=date)


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


def _chunks(rows: Iterable[tuple[str, Row]], columns: Columns) -> Iterator[Chunk]:
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
        if len(chunk) == _CHUNK or size > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _worker_count(config: DataConfig) -> int:
    if config.num_workers != "auto":
        return config.num_workers
    return min(process.cores(), 16)


def _encode(
    encoder: Encoder, chunks: Iterator[Chunk], workers: int, pool_threshold: int
) -> Iterator[tuple[int, Encoded]]:
    """Yield (rows, encoded) of each chunk, in order. This process encodes the first chunks; if there are many, a pool
    encodes the rest."""
    here = chunks if workers == 1 else itertools.islice(chunks, -(-pool_threshold // _CHUNK))
    for chunk in here:
        yield len(chunk), encoder.encode(chunk)
    following = next(chunks, None)
    if following is not None:
        yield from _encode_in_pool(encoder, itertools.chain([following], chunks), workers)


def _encode_in_pool(encoder: Encoder, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[int, Encoded]]:
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encoder,)
    )
    waiting: deque[tuple[int, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((len(chunk), pool.submit(_encode_chunk, chunk)))
            if len(waiting) > 2 * workers:  # bounds the memory: reading is faster than encoding
                size, future = waiting.popleft()
                yield size, future.result()
        for size, future in waiting:
            yield size, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises has died, perhaps for lack of memory (or a script of your own lacks `if "
            "__name__ == '__main__':`); set data.num_workers: 1",
            key="data.num_workers",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # the encoder of a worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process for each core already
    if parent := multiprocessing.parent_process():
        die_with(parent.pid or 0, signal.SIGKILL)  # it would wait for more work for ever
    _encoder = encoder


def _encode_chunk(chunk: Chunk) -> Encoded:
    return _encoder.encode(chunk)


def _fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of what defines a tokenizer: its Rust half's whole state, special tokens and chat template."""
    if tokenizer is None:
        return "none"
    parts = [repr(sorted(tokenizer.special_tokens_map.items())), repr(tokenizer.chat_template)]
    if tokenizer.is_fast:  # any other tokenizer is refused, unless the rows are tokens already
        parts.append(plain_backend(tokenizer).to_str())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
