"""Tokenised sets on disk: flat files, memory-mapped. A set is valid or does not exist.

A set is a directory of ``tokens`` and ``labels`` (int32, one example after the other), ``offsets`` (int64, the
start of each example, and the end of the last), ``supervised`` (int32, number of targets of each example) and
``meta.json``. A set of texts to classify has, instead of ``labels`` and ``supervised``, ``answers`` (float64, the same
number of values for each text) and ``types`` (int8, the token types). It is written beside its final place and renamed,
so a reader sees all of it or nothing, and several processes may write the same set.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..errors import shown
from ..io.atomic import DRAFT, draft_name, lock, remove_drafts
from .encode import Example, targets

FORMAT = 2
"""Version of the files and of the text they were made from: raise it when either changes."""

_FILES = {"tokens": np.int32, "labels": np.int32, "offsets": np.int64, "supervised": np.int32}
_TEXTS = {"tokens": np.int32, "types": np.int8, "offsets": np.int64, "answers": np.float64}
_BLOCK = 1 << 22  # bytes
_log = logging.getLogger(__name__)


class TokenDataset:
    """Tokenised examples, read from memory-mapped files as they are asked for.

    Args:
        directory: a complete set, as ``CacheWriter`` leaves it.
        indices: the examples of this view, in its order; None for all.
    """

    def __init__(self, directory: Path, indices: np.ndarray | None = None) -> None:
        self.directory = directory
        self._indices = indices
        self._tokens = _mapped(directory, "tokens")
        self._offsets = _mapped(directory, "offsets")
        self._of_texts = (directory / "answers").exists()
        if self._of_texts:
            self._types, self._answers = _mapped(directory, "types"), _mapped(directory, "answers")
            self._answers = self._answers.reshape(len(self._offsets) - 1, -1)
        else:
            self._labels, self._supervised = _mapped(directory, "labels"), _mapped(directory, "supervised")

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> Example:
        """Return example ``index`` of this view, as copies that do not refer to the file.

        Raises:
            IndexError: ``index`` is not in [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        at = index if self._indices is None else self._indices[index]
        where = slice(self._offsets[at], self._offsets[at + 1])
        if self._of_texts:
            return Example(np.array(self._tokens[where]), np.array(self._answers[at]), np.array(self._types[where]))
        return Example(np.array(self._tokens[where]), np.array(self._labels[where]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example; int64, shape (len,)."""
        return self._of_view(np.diff(self._offsets))

    @cached_property
    def supervised(self) -> np.ndarray:
        """Number of tokens of each example that carry loss, after the shift (never the first), or 1 for each text to
        classify; int32, shape (len,)."""
        return np.ones(len(self), np.int32) if self._of_texts else self._of_view(self._supervised)

    @cached_property
    def answers(self) -> np.ndarray:
        """Answers of the texts to classify; float64, shape (len, values)."""
        return self._of_view(self._answers)

    @cached_property
    def origins(self) -> np.ndarray:
        """Place of the set that each example is from, among the sets that were put together; int64, shape (len,)."""
        return np.zeros(len(self), np.int64)

    @cached_property
    def largest_id(self) -> int:
        """The largest token id in the files of the set, whichever examples this view has."""
        return int(self._tokens.max(initial=0))

    def select(self, indices: Sequence[int] | np.ndarray) -> "TokenDataset":
        """Return a view of some examples, in the order given; nothing is copied."""
        chosen = np.asarray(indices, np.int64)
        return TokenDataset(self.directory, chosen if self._indices is None else self._indices[chosen])

    def epoch(self, seed: int, epoch: int) -> np.ndarray | None:
        """Return the examples that an epoch (from 0) shows, as many as there are, in an order of no meaning: int64,
        shape (len,). None if it shows each once."""
        return None

    def per_epoch(self, values: np.ndarray) -> list[int]:
        """Return the sum of ``values``, one for each example, over the examples of an epoch, for each of the sets that
        were put together; the mean over epochs if these show different examples."""
        return [int(values.sum(dtype=np.int64))]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset, (self.directory, self._indices)  # a memory map is pickled as a copy of the file

    def _of_view(self, values: np.ndarray) -> np.ndarray:
        return np.array(values if self._indices is None else values[self._indices])


class CacheWriter:
    """Writer of one set, a chunk of examples at a time. Used as a context, it leaves nothing behind on an error. What a
    killed process has left is removed by the next writer: a set under way is locked.

    Args:
        directory: where the set will be after ``commit``.
        texts: whether the examples are texts to classify.
    Raises:
        OSError: the directory cannot be written to, or the disk is full.
    """

    def __init__(self, directory: Path, *, texts: bool = False) -> None:
        self.directory, self._files = directory, _TEXTS if texts else _FILES
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._draft = directory.with_name(f".{directory.name}-{draft_name()}")
        with self._others_waiting():
            remove_drafts(directory.parent, f".*-{DRAFT}*")
            self._draft.mkdir()
            self._lock = lock(self._draft)
        self._open = {name: (self._draft / name).open("wb") for name in self._files}
        self._checksums = dict.fromkeys(self._files, 0)
        self._end = 0
        self._put("offsets", [0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.close()
        shutil.rmtree(self._draft, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def add(self, examples: Sequence[Example]) -> None:
        """Append examples."""
        if not examples:
            return
        self._put("tokens", np.concatenate([example.input_ids for example in examples]))
        labels = np.concatenate([example.labels for example in examples])
        if "answers" in self._files:
            self._put("answers", labels)
            self._put("types", np.concatenate([example.token_types for example in examples]))  # type: ignore[arg-type]
        else:
            self._put("labels", labels)
            self._put("supervised", [targets(example.labels) for example in examples])
        ends = self._end + np.cumsum([len(example.input_ids) for example in examples])
        self._put("offsets", ends)
        self._end = int(ends[-1])

    def commit(self, key: str, stats: dict[str, Any]) -> None:
        """Put the set in its place. If another process was faster, its set is kept, because the two are the same."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        meta = {
            "format": FORMAT,
            "key": key,
            "stats": stats,
            "files": {
                name: {"bytes": (self._draft / name).stat().st_size, "crc32": self._checksums[name]}
                for name in self._files
            },
        }
        with open(self._draft / "meta.json", "wb") as meta_file:
            meta_file.write(json.dumps(meta, indent=1).encode())
            meta_file.flush()
            os.fsync(meta_file.fileno())
        with self._others_waiting():
            if read_stats(self.directory, key) is not None:
                return
            damaged = self._draft.with_name(f"{self._draft.name}-damaged")
            if self.directory.exists():
                os.rename(self.directory, damaged)
            os.rename(self._draft, self.directory)
        shutil.rmtree(damaged, ignore_errors=True)

    @contextlib.contextmanager
    def _others_waiting(self) -> Iterator[None]:
        with open(self.directory.with_name(".lock"), "wb") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _put(self, name: str, values: Any) -> None:
        data = np.ascontiguousarray(values, self._files[name]).tobytes()
        self._checksums[name] = zlib.crc32(data, self._checksums[name])
        self._open[name].write(data)


def read_stats(directory: Path, key: str) -> dict[str, Any] | None:
    """Return the counts of a set that is complete and undamaged, else None.

    Every byte is read (about a second for the 395K examples of MetaMathQA); otherwise a set that lost a page in a
    crash would be trained on.
    """
    if not directory.exists():
        return None
    try:
        meta = json.loads((directory / "meta.json").read_bytes())
        if (meta["format"], meta["key"]) != (FORMAT, key):
            raise ValueError("made by another version")
        for name in _TEXTS if "answers" in meta["files"] else _FILES:
            file = directory / name
            if meta["files"][name] != {"bytes": file.stat().st_size, "crc32": _crc32(file)}:
                raise ValueError(f"{name} is damaged")
        return dict(meta["stats"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("tokenised data in %s cannot be used (%s) and is made again", directory, shown(str(error)))
        return None


def default_directory() -> Path:
    """Return $RASA_TRAIN_CACHE, else $XDG_CACHE_HOME/rasa_train, else ~/.cache/rasa_train."""
    if own := os.environ.get("RASA_TRAIN_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "rasa_train"


def _mapped(directory: Path, name: str) -> np.ndarray:
    return np.memmap(directory / name, dtype={**_FILES, **_TEXTS}[name], mode="r")


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
