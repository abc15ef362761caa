"""Where rows come from: built-in sets, hub ids, local files and directories.

A source streams its rows, so memory does not grow with the size of the set, and has a fingerprint of its
content, so that what was tokenised once is found again. Errors name the file and line.
"""

import difflib
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError, first_line
from .columns import Row
from .row_files import ROWS, file_rows

BUILT_IN = {
    "metamathqa": ("meta-math/MetaMathQA", {"query": "query", "response": "response"}),
    "magicoder": ("ise-uiuc/Magicoder-Evol-Instruct-110K", {"query": "instruction", "response": "response"}),
}
"""Name -> (hub id, columns). The paper's two training sets (Appendix C). ``demo`` is built in as well."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "test", "eval")


class SourceMissing(UserError):
    """The data set is not here: no such file, or the hub cannot be reached. Anything else about it is wrong input."""


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
        name, columns = BUILT_IN[dataset]
        return HubSource(name, subset, split, revision), columns
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


def _files_of_split(directory: Path, split: str) -> tuple[Path, ...]:
    """Files of one split, sorted: those named after it, or all of them when no name speaks of a split."""
    visible = (path for path in directory.iterdir() if not path.name.startswith("."))
    files = sorted(path for path in visible if path.name.lower().endswith(SUFFIXES))
    if not files:
        raise UserError(
            f"{directory}: no data files in this directory; data.dataset takes {', '.join(SUFFIXES)}",
            key="data.dataset",
        )
    named = {path: _split_of(path) for path in files}
    chosen = tuple(path for path in files if named[path] == split)
    if chosen:
        return chosen
    if split == "train" and not any(named.values()):
        return tuple(files)
    raise UserError(
        f"{directory}: no file of split {split!r} among {', '.join(path.name for path in files)}; a split's "
        f"files begin with its name, as in {split}.jsonl or {split}-00000.parquet",
        key="data.split",
    )


def _split_of(path: Path) -> str | None:
    word = path.name.lower().replace("_", "-").replace(".", "-").split("-")[0]
    return word if word in _SPLIT_NAMES else None


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
        return _digest(self.paths)


@dataclass(frozen=True)
class SavedSource:
    """A directory written by ``datasets.save_to_disk`` (a set, or several splits)."""

    path: Path
    split: str

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        try:
            loaded = datasets.load_from_disk(str(self.path))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.path}: cannot be read as a directory of datasets.save_to_disk: {error}",
                key="data.dataset",
            ) from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if self.split not in loaded:
            raise UserError(
                f"{self.path}: no split {self.split!r}, there is {', '.join(map(str, loaded))}",
                key="data.split",
            )
        return loaded[self.split]

    def rows(self) -> Iterator[tuple[str, Row]]:
        return _arrow_rows(self._dataset, str(self.path))

    def fingerprint(self) -> str:
        return _digest([Path(entry["filename"]) for entry in self._dataset.cache_files])


@dataclass(frozen=True)
class HubSource:
    """A dataset of the Hugging Face hub, downloaded (or found in the local hub cache) by ``datasets``."""

    name: str
    subset: str | None
    split: str
    revision: str | None

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        offline = datasets.config.HF_HUB_OFFLINE
        try:
            # Without a network `datasets` retries for long before it looks into its cache; ask once instead.
            datasets.config.HF_HUB_OFFLINE = offline or not _hub_answers(self.name, self.revision)
            return datasets.load_dataset(self.name, self.subset, split=self.split, revision=self.revision)
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
            raise SourceMissing(
                f"data.dataset: {self.name!r} is no local file, no built-in name ({', '.join(BUILT_IN)}) and "
                f"no set of the hub that you may read ({first_line(error)}). Check the spelling; for a "
                "private or gated set, log in with `hf auth login`",
                key="data.dataset",
            ) from error
        except ConnectionError as error:
            raise SourceMissing(
                f"data.dataset: {self.name!r} is no local file or built-in name, and the Hugging Face hub "
                "cannot be reached (or HF_HUB_OFFLINE is set) and the set is not in its local cache. Load it "
                f"once with a network (python -c \"import datasets; datasets.load_dataset('{self.name}')\"), "
                "or point data.dataset to a local file",
                key="data.dataset",
            ) from error
        except Exception as error:  # unknown subset or split, unsupported files, a broken download
            raise UserError(
                f"data.dataset: cannot load {self.name!r} (subset {self.subset}, split {self.split}, "
                f"revision {self.revision}): {error}",
                key="data.dataset",
            ) from error
        finally:
            datasets.config.HF_HUB_OFFLINE = offline

    def rows(self) -> Iterator[tuple[str, Row]]:
        return _arrow_rows(self._dataset, f"{self.name} [{self.split}]")

    def fingerprint(self) -> str:
        return "|".join(
            map(str, ("hub", self.name, self.subset, self.split, self.revision, self._dataset._fingerprint))
        )


def _hub_answers(name: str, revision: str | None) -> bool:
    """Whether the hub says anything about this set, a refusal included, within 10 seconds."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=10)
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError):
        return True
    except Exception:  # the HTTP library's own network errors share no narrower base
        return False
    return True


def _digest(paths: Any) -> str:
    """sha256 of the files' digests, each read as a stream."""
    whole = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}", key="data.dataset") from error
    return whole.hexdigest()


def _arrow_rows(dataset: Any, name: str) -> Iterator[tuple[str, Row]]:
    number = 0
    for table in dataset.with_format("arrow").iter(ROWS):
        for row in table.to_pylist():
            number += 1
            yield f"{name} row {number}", row
