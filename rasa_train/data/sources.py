"""Where rows come from: built-in sets, hub ids, local files and directories.

A source streams its rows, so memory does not grow with the size of the set, and has a fingerprint of its
content, so that what was tokenised once is found again. Errors name the file and line.
"""

import difflib
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError, some
from ..io.json_file import field, read_object
from .built_in import BUILT_IN, GLUE, HUB, REVISIONS
from .columns import Row
from .hub_source import HubSource, SourceMissing, arrow_rows
from .row_files import columnar_rows, file_rows

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation", "holdout"),
}
_SPLIT_OF = {f"{name}{end}": split for split, names in _SPLITS.items() for name in names for end in ("", "set", "data")}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
HELD_OUT = ("validation", "test")
"""Splits that are held out, in the order in which one is taken where none is named."""


class Source(Protocol):
    """A dataset's rows and the fingerprint of their content."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yields (place, row) in the set's order; place is "FILE:LINE" or "FILE row N", counted from 1."""

    def fingerprint(self) -> str:
        """Hexadecimal digest (or hub identity) that changes whenever the rows may have."""


def find_source(
    dataset: str, *, subset: str | None = None, split: str = "train", revision: str | None = None
) -> tuple[Source, dict[str, str] | None]:
    """The source of a dataset's name, and the columns that are known from the name alone.

    Args:
        dataset: a key of ``BUILT_IN``, an existing file or directory, or a hub id.
        subset, split, revision: as in ``DataConfig``; a single file has neither.
    Raises:
        UserError: nothing is there, or the file's kind is unknown.
    """
    if dataset == "demo":
        return DemoSource(), {"query": "query", "response": "response"}
    if dataset in BUILT_IN:
        (name, columns), revision = BUILT_IN[dataset], revision or REVISIONS.get(dataset)
        return HubSource(name, subset, split, revision), columns
    if dataset in GLUE:
        if subset:
            raise UserError(f"data.subset: {dataset} names the subset already; remove it", key="data.subset")
        return HubSource(HUB, dataset.partition("/")[2], split, revision), GLUE[dataset].columns
    path = Path(dataset).expanduser()
    if path.exists() and (subset or revision):
        raise UserError(
            f"data.{'subset' if subset else 'revision'} is for sets of the hub, and {dataset} is local; remove it",
            key=f"data.{'subset' if subset else 'revision'}",
        )
    if path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        return (SavedSource(path, split) if saved else FileSource(_files_of_split(path, split))), None
    if path.exists():
        _check_suffix(path)
        if not path.is_file():
            raise UserError(f"data.dataset: {path} is not a file: write the rows to one first", key="data.dataset")
        return FileSource((path,)), None
    if _looks_local(dataset):
        raise SourceMissing(_missing(path), key="data.dataset")
    return HubSource(dataset, subset, split, revision), None


def _check_suffix(path: Path) -> None:
    if not path.name.lower().endswith(SUFFIXES):
        raise UserError(
            f"{path}: unknown kind of file; data.dataset takes {', '.join(SUFFIXES)}, a directory of them, "
            "or a directory written by datasets.save_to_disk",
            key="data.dataset",
        )


def _looks_local(dataset: str) -> bool:
    return dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or dataset.lower().endswith(SUFFIXES)


def _missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"data.dataset: no file {path}: the directory {parent} does not exist"
    names = sorted(entry.name for entry in parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"data.dataset: no file {path.name} in {parent.absolute()}{hint}"


def splits_of(dataset: str) -> tuple[str, ...] | None:
    """Return the splits of a local directory, under our names if they are usual ones; empty if nothing in it is named
    for a split. Return None for everything else: a file has no splits, and those of a hub set are not known here."""
    path = Path(dataset).expanduser()
    if dataset in ("demo", *BUILT_IN, *GLUE) or not path.is_dir():
        return None
    if (listed := path / "dataset_dict.json").exists():
        try:
            return tuple(map(str, field(read_object(listed), "splits", list, listed)))
        except (OSError, UserError):
            return ()
    if (path / "state.json").exists():
        return ()
    return tuple(dict.fromkeys(split for file in _data_files(path) if (split := _split_of(file, path))))


def _files_of_split(directory: Path, split: str) -> tuple[Path, ...]:
    """Return the files of one split, sorted: those that are named for it, or all of them when no name speaks of one."""
    files = _data_files(directory)
    named = {path: _split_of(path, directory) for path in files}
    if exact := tuple(path for path in files if named[path] and split in _words(path.name)):
        return exact  # dev.jsonl for split: dev, although there is a validation.jsonl too
    if chosen := tuple(path for path in files if named[path] == _SPLIT_OF.get(split, split)):
        return chosen
    if split == "train" and not any(named.values()):
        return tuple(files)
    names = ", ".join(str(path.relative_to(directory)) for path in files)
    raise UserError(
        f"{directory}: no file of split {split!r} among {names}; the files of a split, or their folder, are named for "
        f"it, as in {split}.jsonl, rivers_{split}.jsonl or {split}/0.parquet",
        key="data.split",
    )


def _data_files(directory: Path) -> list[Path]:
    """Return the data files of a directory, sorted: those in it and in its folders that are named for a split, or else
    those of its only folder, which the hub's sets call ``data``."""
    entries = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    files = [path for path in entries if path.name.lower().endswith(SUFFIXES) and path.name not in _ABOUT]
    found = [path for path in files if path.is_file()]
    folders = {path: list(_nested(path)) for path in entries if path.is_dir()}
    found += [file for path, inside in folders.items() if _named_split(path.name) for file in inside]
    full = [path for path, inside in folders.items() if inside]
    if not found and len(full) > 1 and directory / "data" not in full:
        raise UserError(
            f"{directory}: there are data files in several folders, {', '.join(path.name for path in full)}; name one "
            "of them in data.dataset",
            key="data.dataset",
        )
    if not found and full:
        found = _data_files(directory / "data" if directory / "data" in full else full[0])
    if not found:
        raise UserError(
            f"{directory}: no data files in this directory; data.dataset takes {', '.join(SUFFIXES)}",
            key="data.dataset",
        )
    return found


def _nested(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.is_file() and path.name.lower().endswith(SUFFIXES) and path.name not in _ABOUT and not hidden:
            yield path


def _words(name: str) -> list[str]:
    """Return the words of a file's name: ``riversTest-00000-of-00002`` -> rivers, test, of."""
    return [word.lower() for word in _WORDS.findall(name)]


def _named_split(name: str) -> str | None:
    found = sorted({_SPLIT_OF[word] for word in _words(name) if word in _SPLIT_OF})
    if len(found) > 1:
        raise UserError(
            f"the name of {name} speaks of several splits, {' and '.join(found)}; rename it, or name the files one by "
            "one in data.dataset",
            key="data.dataset",
        )
    return found[0] if found else None


def _split_of(file: Path, directory: Path) -> str | None:
    """Return the split that a file is named for, or that the nearest folder around it is."""
    parts = file.relative_to(directory).parts
    return next(filter(None, map(_named_split, reversed(parts))), None)


@dataclass(frozen=True)
class DemoSource:
    """The word problems that the package makes itself (``rasa_train.demo``)."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        from .demo_problems import training_problems

        for number, problem in enumerate(training_problems(), 1):
            yield f"demo row {number}", dict(problem)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(list(self.rows())).encode()).hexdigest()


@dataclass(frozen=True)
class FileSource:
    """Local .jsonl, .json (a list of rows, or one object a line) and .parquet files, one after another."""

    paths: tuple[Path, ...]

    @cached_property
    def digests(self) -> list[bytes]:
        return [_digest(path) for path in self.paths]

    def rows(self) -> Iterator[tuple[str, Row]]:
        for path in self.paths:
            try:
                yield from file_rows(path)
            except (
                OSError,
                EOFError,
                zlib.error,
            ) as error:  # the last two: a gzip file that was cut or damaged
                raise UserError(f"{path}: cannot be read: {error}", key="data.dataset") from error

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(self.digests)).hexdigest()


@dataclass(frozen=True)
class SavedSource:
    """A directory written by ``datasets.save_to_disk`` (a set, or several splits)."""

    path: Path
    split: str

    @cached_property
    def _directory(self) -> Path:
        if not (self.path / "dataset_dict.json").exists():
            return self.path
        splits = [str(name) for name in field(_object(self.path / "dataset_dict.json"), "splits", list, self.path)]
        if self.split not in splits:
            raise UserError(f"{self.path}: no split {self.split!r}, there is {some(splits, 20)}", key="data.split")
        return self.path / self.split

    @cached_property
    def _files(self) -> list[Path]:
        state = self._directory / "state.json"
        names = [entry.get("filename") for entry in field(_object(state), "_data_files", list, state)]
        if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise UserError(f"{state}: {wrong[0]!r} is not the name of a file beside it", key="data.dataset")
        return [self._directory / name for name in names]

    def rows(self) -> Iterator[tuple[str, Row]]:
        import datasets

        def rows(most: int) -> Iterator[Row]:
            try:
                yield from arrow_rows(datasets.load_from_disk(str(self._directory)), most)
            except MemoryError:
                raise
            except Exception as error:  # pyarrow's, OSError, KeyError: the files are whatever somebody wrote
                raise UserError(
                    f"{self.path}: cannot be read as a directory of datasets.save_to_disk: {error}", key="data.dataset"
                ) from error

        size = sum(_size(file) for file in self._files)
        return columnar_rows(rows, str(self.path), size, mapped=size)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(_digest(file) for file in self._files)).hexdigest()


def _digest(path: Path) -> bytes:
    """Return the sha256 of a file, which is read as a stream."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}", key="data.dataset") from error


def overlap(one: Source, other: Source) -> bool:
    """Whether two sources have rows in common as a whole: the same rows, a file of the same content, or a part of the
    same split of a hub set."""
    if isinstance(one, FileSource) and isinstance(other, FileSource):
        return not set(one.digests).isdisjoint(other.digests)
    if isinstance(one, HubSource) and isinstance(other, HubSource):
        parts = "[" in one.split and "[" in other.split and one.split != other.split
        return one.whole == other.whole and not parts
    if isinstance(one, HubSource) or isinstance(other, HubSource):
        return False
    return one.fingerprint() == other.fingerprint()


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (UserError, FileNotFoundError) as error:
        raise UserError(f"a directory of datasets.save_to_disk: {error}", key="data.dataset") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}", key="data.dataset") from error
