"""The tokenised set of one source: made by a pass over its rows, or found in the cache."""

import hashlib
import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import process
from ..errors import UserError
from ..io.bounded import weight
from ..models.task import Head
from .built_in import GLUE
from .cache import FORMAT, CacheWriter, TokenDataset, default_directory, read_stats
from .chat import DATE
from .columns import Columns, Row, find_columns
from .config import DataConfig
from .contamination import MOST_TOLD, Screen, ScreenedRows
from .encode import Encoded, Encoder, plain_backend
from .encode_pool import CHUNK, Chunk, encode_all
from .encode_texts import TextEncoder, longest
from .hub_source import HubSource
from .served_counts import CHANGED
from .sources import Source
from .texts import TextColumns, find_text_columns, found_labels

_READ_LATER = {"context", "history", "system", "system_prompt"}  # columns that earlier versions did not use
_CHUNK_BYTES = 8 << 20  # about the bytes of the texts of a chunk


@dataclass(frozen=True)
class Stats:
    """Counts of a prepared training set.

    ``rows`` counts rows of the whole source; ``dropped_over_length``, ``dropped_unsupervised`` and ``truncated`` count
    the examples that they became, which are as many unless a conversation was split. The rest describe the examples
    trained on, after ``validation`` and ``fraction``: their number, their tokens, their tokens that carry loss, and the
    length of the longest in tokens.
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
    contaminated: dict[str, int] = field(default_factory=dict)
    """Rows of the source that have questions of each evaluation set of ``data.decontaminate``."""
    contaminated_rows: int = 0
    """Rows that have questions of any of them."""
    contaminated_places: list[str] = field(default_factory=list)
    """What the first of these rows share, one line each."""
    duplicates: int = 0
    """Examples that equal an earlier one, if ``data.deduplicate`` drops them."""
    held_out_examples: int = 0
    """Training examples that equal a held-out one."""
    read_anew: bool = False
    """Whether a row has parts that earlier versions read in another way, or not at all."""
    served: dict[str, int] = field(default_factory=dict)
    """Counts of conversations and turns of the whole source, by the names of ``served_counts.NAMES``."""
    turn_ends: list[str] | None = None
    """The special tokens that end a turn of the assistant in the chat template; None without one."""
    refused: str | None = None
    """Why the first conversation that was refused was refused, with its place."""


@dataclass(frozen=True)
class Maker:
    """Maker of the tokenised set of one source, which it looks for in the cache first."""

    config: DataConfig
    tokenizer: Any
    tokenizer_fingerprint: str
    progress: Callable[[int], None] | None
    pool_threshold: int
    head: Head | None
    """The head of a classification; without labels, if those of the rows are to be taken."""

    def __call__(self, source: Source, columns: dict[str, str] | None, dataset: str) -> tuple[TokenDataset, Stats, str]:
        root = Path(self.config.cache_dir).expanduser() if self.config.cache_dir else default_directory()
        if isinstance(source, HubSource):
            source = replace(source, commits=root / "hub")
        key = self._key(source, columns)
        directory = root / "tokens" / key[:32]
        if (known := read_stats(directory, key)) is not None:
            older = self.config.template == "chat" or _READ_LATER & set(known.get("unused_columns", ()))
            if "served" in known or not older:
                return TokenDataset(directory), Stats(**known), _key_of_made(key, Stats(**known))
            shutil.rmtree(directory, ignore_errors=True)  # made before prompts were compared and such columns read
        try:
            with CacheWriter(directory, key, texts=self.head is not None) as writer:
                stats = self._write(source, dataset, columns, writer)
                writer.commit(asdict(stats))
            if isinstance(source, HubSource):
                source.remember()
        except OSError as error:  # no permission, or the disk is full
            raise UserError(
                f"cannot write tokenised data to {root}: {error}; set data.cache_dir, or $RASA_TRAIN_CACHE, "
                "to a writable directory with enough room",
                key="data.cache_dir",
            ) from error
        return TokenDataset(directory), stats, _key_of_made(key, stats)

    @cached_property
    def screen(self) -> Screen | None:
        return Screen(self.config.decontaminate) if self.config.decontaminate else None

    def of_all_rows(self) -> "Maker":
        """Return the maker of a set of which no rows are left out on purpose, such as the held-out one."""
        return replace(self, config=self.config.model_copy(update={"max_examples": None, "decontaminate": None}))

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
        if config.template == "chat" and config.rewritten_history == "refuse":
            parts |= {"rewritten_history": "refuse"}
        if self.head is not None:
            parts |= {"format": FORMAT, "head": asdict(self.head), "max_length": longest(config, self.tokenizer)}
        if config.max_examples is not None:
            parts["max_examples"] = config.max_examples
        if self.screen is not None:
            parts["decontaminate"] = self.screen.identity()
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
        workers = 1 if found.kind == "tokens" else _worker_count(self.config)
        stats = self._encoded(encoder, itertools.chain([first], rows), found, workers, writer)
        self._check_any(stats, dataset)
        if found.absent:
            raise UserError(
                f"data.columns: no row of {dataset} has a column {sorted(found.absent)[0]!r}; name the right columns",
                key="data.columns",
            )
        date = f"{DATE:%d %b %Y}" if chat and chat.prints_the_date else None
        ends = chat.ends if chat else None
        anew = bool(found.anew)
        return replace(stats, unused_columns=sorted(found.unused), date=date, turn_ends=ends, read_anew=anew)

    def _write_texts(self, source: Source, dataset: str, names: Mapping[str, str], writer: CacheWriter) -> Stats:
        assert self.head
        found, labels = TextColumns(names, self.head, may_be_empty=dataset in GLUE), self.head.labels
        if self.head.problem != "regression" and not labels:
            values = ((where, found.value(row, where)) for where, row in source.rows())
            labels = found_labels(values, several=self.head.problem == "multi_label", dataset=dataset)
            found = replace(found, head=replace(self.head, labels=labels))
        pairs = "text_pair" in names
        encoder = TextEncoder(self.config, self.tokenizer, pairs=pairs)
        stats = self._encoded(encoder, source.rows(), found, _worker_count(self.config), writer)
        self._check_any(stats, dataset)
        return replace(stats, unused_columns=sorted(found.unused), labels=list(labels), pairs=pairs)

    def _encoded(
        self,
        encoder: Encoder | TextEncoder,
        rows: Iterator[tuple[str, Row]],
        columns: Columns | TextColumns,
        workers: int,
        writer: CacheWriter,
    ) -> Stats:
        """Write the examples of all rows, or go on after those that an interrupted writer has written."""
        stats, most = Stats(0, 0, 0, 0, 0, 0, 0, 0), self.config.max_examples or sys.maxsize
        if self.config.decontaminate:
            stats = replace(stats, contaminated=dict.fromkeys(self.config.decontaminate.sets, 0))
        if (state := writer.state) is not None:
            stats = Stats(**state["stats"])
            for name, noted in _noted(columns).items():
                noted.clear()
                noted.update(state["columns"][name])
        screened = self.screen.around(encoder) if self.screen else encoder
        left, before = itertools.islice(rows, stats.rows, None), -1
        while before < stats.rows and stats.examples < most:  # as many more rows as examples are lacking
            before = stats.rows
            parts = chunks(itertools.islice(left, most - stats.examples), columns)
            for size, encoded in encode_all(screened, parts, workers, self.pool_threshold):
                examples = encoded.examples[: most - stats.examples]
                writer.add(examples)
                stats = _added(stats, size, replace(encoded, examples=examples))
                if writer.due:
                    noted_so_far = {name: sorted(noted) for name, noted in _noted(columns).items()}
                    writer.save({"stats": asdict(stats), "columns": noted_so_far})
                if self.progress is not None:
                    self.progress(stats.rows)
        return stats

    def _check_any(self, stats: Stats, dataset: str) -> None:
        config = self.config
        if stats.examples == 0:
            found = f", {stats.contaminated_rows} as questions of an evaluation set" if stats.contaminated_rows else ""
            raise UserError(
                f"data.dataset: no example is left of the {stats.rows} rows of {dataset}: "
                f"{stats.dropped_over_length} dropped as longer than max_length={config.max_length} tokens "
                f"(over_length: {config.over_length}){found}, {stats.dropped_unsupervised} because no token carries "
                f"loss (supervise: {config.supervise}; {stats.truncated} were cut at max_length). Raise "
                "data.max_length or choose another supervise"
                + (f"; {stats.served['refused_rows']} refused, the first at {stats.refused}" if stats.refused else ""),
                key="data.dataset",
            )


def _noted(columns: Columns | TextColumns) -> dict[str, set[str]]:
    """Return what the columns have noted about the rows so far."""
    return {name: value for name, value in vars(columns).items() if isinstance(value, set)}


def _key_of_made(key: str, stats: Stats) -> str:
    """Return the key of a set that was made: another one where its tokens are not those that earlier versions made."""
    changed = stats.read_anew or CHANGED & stats.served.keys()
    return hashlib.sha256(f"{key} served".encode()).hexdigest() if changed else key


def _added(stats: Stats, rows: int, encoded: Encoded) -> Stats:
    lengths = [len(example.input_ids) for example in encoded.examples]
    found = encoded.found if isinstance(encoded, ScreenedRows) else ()
    return replace(
        stats,
        rows=stats.rows + rows,
        dropped_over_length=stats.dropped_over_length + encoded.dropped_over_length,
        dropped_unsupervised=stats.dropped_unsupervised + encoded.dropped_unsupervised,
        truncated=stats.truncated + encoded.truncated,
        examples=stats.examples + len(lengths),
        tokens=stats.tokens + sum(lengths),
        supervised_tokens=0,  # counted on the views
        longest=max([stats.longest, *lengths]),
        contaminated={name: n + sum(name in row.sets for row in found) for name, n in stats.contaminated.items()},
        contaminated_rows=stats.contaminated_rows + len(found),
        contaminated_places=[*stats.contaminated_places, *map(str, found)][:MOST_TOLD],
        served=dict(Counter(stats.served) + Counter(encoded.counts)),
        refused=stats.refused or encoded.refused,
    )


def chunks(rows: Iterable[tuple[str, Row]], columns: Columns | TextColumns) -> Iterator[Chunk]:
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


def fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of what defines a tokenizer: its Rust half's whole state, special tokens and chat template."""
    if tokenizer is None:
        return "none"
    parts = [repr(sorted(tokenizer.special_tokens_map.items())), repr(tokenizer.chat_template)]
    if tokenizer.is_fast:  # any other tokenizer is refused, unless the rows are tokens already
        parts.append(plain_backend(tokenizer).to_str())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
