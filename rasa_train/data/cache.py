"""Tokenised sets on disk: flat files, memory-mapped. A set is valid or does not exist.

A set is a directory of ``tokens`` and ``labels`` (int32, one example after the other), ``offsets`` (int64, the
start of each example, and the end of the last), ``supervised`` (int32, number of targets of each example) and
``meta.json``. A set of texts to classify has, instead of ``labels`` and ``supervised``, ``answers`` (float64, the same
number of values for each text) and ``types`` (int8, the token types). It is written beside its final place and renamed,
so a reader sees all of it or nothing, and several processes may write the same set. While it is written,
``progress.json`` says how far it is, every few seconds.
"""

import contextlib
import fcntl
import glob
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..errors import UserError, shown
from ..io.atomic import DRAFT, draft_name, lock, remove_drafts, write_json
from ..io.json_file import read_object
from ..process import version_of
from .encode import Example, targets
from .hub_source import SourceMissing

FORMAT = 2
"""Version of the files and of the text they were made from: raise it when either changes."""

_FILES = {"tokens": np.int32, "labels": np.int32, "offsets": np.int64, "supervised": np.int32}
_TEXTS = {"tokens": np.int32, "types": np.int8, "offsets": np.int64, "answers": np.float64}
_TYPES = {**_FILES, **_TEXTS}
_BLOCK = 1 << 22  # bytes, or tokens
_PROGRESS = "progress.json"
SAVE_EVERY = 5.0
"""Seconds between two savings of a set that is being written."""
_KEPT = 7 * 24 * 3600  # seconds for which an interrupted set is kept
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

    def raw(self) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield all that each example in the files of the set consists of, whichever examples this view has. The files
        are read, and not mapped, so that they do not take memory."""
        names = ("tokens", "types", "answers") if self._of_texts else ("tokens", "labels")
        values = len(self._answers[0]) if self._of_texts and len(self._answers) else 0
        offsets, first = np.array(self._offsets), 0
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(self.directory / name, "rb")) for name in names]
            while first < len(offsets) - 1:
                last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _BLOCK, "right")) - 1)
                size = int(offsets[last] - offsets[first])
                read = [
                    np.fromfile(file, _TYPES[name], (last - first) * values if name == "answers" else size)
                    for name, file in zip(names, files, strict=True)
                ]
                for at in range(first, last):
                    where = slice(offsets[at] - offsets[first], offsets[at + 1] - offsets[first])
                    answer = slice((at - first) * values, (at - first + 1) * values)
                    yield tuple(
                        part[answer if name == "answers" else where] for name, part in zip(names, read, strict=True)
                    )
                first = last

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example; int64, shape (len,)."""
        return self.of_view(np.diff(self._offsets))

    @cached_property
    def supervised(self) -> np.ndarray:
        """Number of tokens of each example that carry loss, after the shift (never the first), or 1 for each text to
        classify; int32, shape (len,)."""
        return np.ones(len(self), np.int32) if self._of_texts else self.of_view(self._supervised)

    @cached_property
    def answers(self) -> np.ndarray:
        """Answers of the texts to classify; float64, shape (len, values)."""
        return self.of_view(self._answers)

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

    def of_view(self, values: np.ndarray) -> np.ndarray:
        """Return those of the values of all examples of the files that belong to this view, in its order."""
        return np.array(values if self._indices is None else values[self._indices])


class CacheWriter:
    """Writer of one set, a chunk of examples at a time. Used as a context, it leaves nothing behind on an error.

    What a killed process has left of the same set is gone on with, from the last ``save``, if it is undamaged: the
    bytes are those of one that was never interrupted. What is left of other sets is removed by the next writer after
    some days, or at once if nothing of it was saved: a set under way is locked.

    Args:
        directory: where the set will be after ``commit``.
        key: sha256 of everything that the set depends on.
        texts: whether the examples are texts to classify.
    Raises:
        OSError: the directory cannot be written to, or the disk is full.
    """

    def __init__(self, directory: Path, key: str, *, texts: bool = False) -> None:
        self.directory, self.key, self._files = directory, key, _TEXTS if texts else _FILES
        self.state: dict[str, Any] | None = None
        """What the last ``save`` of an interrupted writer was given; None if the set is begun."""
        self._checksums = dict.fromkeys(self._files, 0)
        self._end = 0
        self._saved = time.monotonic()
        directory.parent.mkdir(parents=True, exist_ok=True)
        with self._others_waiting():
            found = self._left_over()
            if found is None:
                self._draft = directory.with_name(f".{directory.name}-{draft_name()}")
                self._draft.mkdir()
                self._lock = lock(self._draft)
            else:
                self._draft, self._lock = found
            _remove_old_drafts(directory.parent)
        self._open = {name: (self._draft / name).open("ab") for name in self._files}
        if self.state is None:
            self._put("offsets", [0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            with contextlib.suppress(OSError):  # of a full disk
                file.close()
        passing = isinstance(error, SourceMissing) or not isinstance(error, Exception | None)
        if not (passing and (self._draft / _PROGRESS).exists()):
            shutil.rmtree(self._draft, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def save(self, state: dict[str, Any]) -> None:
        """Save how far the set is, so that another process can go on from here. ``state`` can be written as JSON."""
        for file in self._open.values():
            file.flush()
        files = {name: {"bytes": file.tell(), "crc32": self._checksums[name]} for name, file in self._open.items()}
        write_json(
            self._draft / _PROGRESS,
            {"version": _version(), "key": self.key, "files": files, "end": self._end, "state": state},
        )
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last ``save`` is some seconds ago."""
        return time.monotonic() - self._saved >= SAVE_EVERY

    def _left_over(self) -> tuple[Path, int] | None:
        """Return the directory that a killed writer of this set has left, ready to be gone on with, and its lock."""
        for draft in sorted(self.directory.parent.glob(f".{glob.escape(self.directory.name)}-{DRAFT}")):
            held = None if draft.is_symlink() else lock(draft)
            if held is None:  # another process is at work on it
                continue
            try:
                progress = read_object(draft / _PROGRESS)
                if (progress["version"], progress["key"]) != (_version(), self.key):
                    raise ValueError("of another version")
                for name in self._files:
                    known, file = progress["files"][name], draft / name
                    if file.is_symlink() or _crc32(file, known["bytes"]) != known["crc32"]:
                        raise ValueError(f"{name} is damaged")
                    os.truncate(file, known["bytes"])
                self._checksums = {name: progress["files"][name]["crc32"] for name in self._files}
                self._end, self.state = int(progress["end"]), dict(progress["state"])
                return draft, held
            except (OSError, UserError, ValueError, KeyError, TypeError):
                shutil.rmtree(draft, ignore_errors=True)
                os.close(held)
        return None

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

    def commit(self, stats: dict[str, Any]) -> None:
        """Put the set in its place. If another process was faster, its set is kept, because the two are the same."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        meta = {
            "format": FORMAT,
            "key": self.key,
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
        (self._draft / _PROGRESS).unlink(missing_ok=True)
        with self._others_waiting():
            if read_stats(self.directory, self.key) is not None:
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
    return np.memmap(directory / name, dtype=_TYPES[name], mode="r")


def _crc32(path: Path, size: int | None = None) -> int:
    """Return the checksum of a file, or of its first ``size`` bytes. Raises ``ValueError`` if there are fewer."""
    checksum, left = 0, path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while block := file.read(min(_BLOCK, left)):
            checksum, left = zlib.crc32(block, checksum), left - len(block)
    if left:
        raise ValueError(f"{path.name} is too short")
    return checksum


def _version() -> str:
    """Return what an interrupted set must have been written by, to be gone on with."""
    return f"{version_of('rasa_train')} {FORMAT}"


def _remove_old_drafts(directory: Path) -> None:
    """Remove what killed writers have left in a directory: after ``_KEPT``, or at once where nothing was saved or
    another process has made the set."""
    for path in directory.glob(f".*-{DRAFT}*"):
        with contextlib.suppress(OSError):
            made = (directory / path.name[1:].partition("-")[0]).exists()
            if not made and time.time() - (path / _PROGRESS).stat().st_mtime < _KEPT:
                continue
        remove_drafts(directory, glob.escape(path.name))
