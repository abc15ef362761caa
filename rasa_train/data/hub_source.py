"""Sets of the Hugging Face hub: streamed while they are tokenised, or downloaded as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..io.atomic import write_json
from ..io.json_file import read_object
from .built_in import BUILT_IN, GLUE
from .columns import Row
from .row_files import columnar_rows

_STREAM = 2 << 30  # bytes of address space for the threads that read ahead
_BROKEN = "the stream of a hub set"  # key of an error that only the network may be the cause of


class SourceMissing(UserError):
    """The data set is not here: no such file, or the hub cannot be reached. Anything else about it is wrong input."""


@dataclass(frozen=True)
class HubSource:
    """A dataset of the Hugging Face hub, found in the local cache of ``datasets``, streamed, or downloaded there.

    Args:
        name, subset, split, revision: as in ``DataConfig``.
        commits: directory in which the commits of streamed sets are remembered, so that a set that was tokenised is
            recognised without a network. With it, a set that is not in the local cache is streamed; without, it is
            downloaded as a whole. A part of a split (``train[:10%]``) is never streamed.
    """

    name: str
    subset: str | None
    split: str
    revision: str | None
    commits: Path | None = None

    @property
    def whole(self) -> tuple[str | None, ...]:
        """Name of the split without the part of it that is taken."""
        return self.name, self.subset, self.split.partition("[")[0], self.revision

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
                f"data.dataset: {self.name!r} is no local file, no built-in name ({', '.join((*BUILT_IN, *GLUE))}) and "
                f"no set of the hub that you may read ({first_line(error)}). Check the spelling; for a "
                "private or gated set, log in with `hf auth login`",
                key="data.dataset",
            ) from error
        except ConnectionError as error:
            named = ", ".join(repr(part) for part in (self.name, self.subset) if part)
            raise SourceMissing(
                f"data.dataset: {self.name!r} is no local file or built-in name, and the Hugging Face hub "
                "cannot be reached (or HF_HUB_OFFLINE is set) and the set is not in its local cache. Load it "
                f'once with a network (python -c "import datasets; datasets.load_dataset({named})"), '
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

    @cached_property
    def _present(self) -> str | None:
        """The commit that the hub has now; None if the set is not streamed, or if the hub does not answer."""
        import datasets

        if self.commits is None or "[" in self.split or "+" in self.split or datasets.config.HF_HUB_OFFLINE:
            return None
        return _commit(self.name, self.revision)

    @cached_property
    def _builder(self) -> Any:
        """What streams the set as it is at the present commit; None if that cannot be."""
        import datasets

        if self._present is None:
            return None
        try:
            builder = datasets.load_dataset_builder(self.name, self.subset, revision=self._present)
            builder.as_streaming_dataset(self.split)
        except Exception:  # the ordinary way says what is wrong, or can do what streaming cannot
            return None
        return builder

    @cached_property
    def _remembered(self) -> str | None:
        """The commit at which the set was streamed last."""
        if self.commits is None:
            return None
        try:
            return str(read_object(self._memory)["commit"])
        except (OSError, UserError, KeyError):
            return None

    @property
    def _memory(self) -> Path:
        assert self.commits
        parts = "|".join(map(str, (self.name, self.subset, self.split, self.revision)))
        return self.commits / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.json"

    @cached_property
    def commit(self) -> str | None:
        """The commit whose rows are streamed, or were streamed when the hub was last asked; None for a set that was
        never streamed, because it is in the local cache or cannot be streamed."""
        if self._present is None:
            return self._remembered
        streamed = self._builder is not None and not _is_cached(self._builder)
        return self._present if streamed or self._remembered == self._present else None

    def remember(self) -> None:
        """Remember the commit of a set that was streamed."""
        if self.commits is not None and self.commit is not None and self.commit != self._remembered:
            self.commits.mkdir(parents=True, exist_ok=True)
            write_json(self._memory, {"dataset": self.name, "split": self.split, "commit": self.commit})

    def rows(self) -> Iterator[tuple[str, Row]]:
        name = f"{self.name} [{self.split}]"
        if self.commit is None or self._builder is None or _is_cached(self._builder):
            dataset = self._dataset  # loaded here, once, and not in the child process
            if self.commit is not None and self.commit not in str(dataset.cache_files):
                raise SourceMissing(
                    f"data.dataset: {self.name} was tokenised as it is at commit {self.commit}, whose rows are not on "
                    "this machine, and the Hugging Face hub cannot be reached (or HF_HUB_OFFLINE is set)",
                    key="data.dataset",
                )
            return columnar_rows(lambda most: arrow_rows(dataset, most), name, None)
        return self._streamed(self._builder.as_streaming_dataset(self.split), name)

    def _streamed(self, dataset: Any, name: str) -> Iterator[tuple[str, Row]]:
        def rows(most: int) -> Iterator[Row]:
            try:
                yield from arrow_rows(dataset, most)
            except MemoryError:
                raise
            except Exception as error:  # of the HTTP library, or pyarrow's
                raise UserError(first_line(error) or type(error).__name__, key=_BROKEN) from error

        try:
            yield from columnar_rows(rows, name, None, mapped=_STREAM)
        except UserError as error:
            if error.key != _BROKEN:
                raise
            raise SourceMissing(
                f"data.dataset: {self.name} could not be read to its end: {error}. The same command goes on from there",
                key="data.dataset",
            ) from error

    def fingerprint(self) -> str:
        parts = ("hub", self.name, self.subset, self.split, self.revision)
        content = self._dataset._fingerprint if self.commit is None else f"commit {self.commit}"
        return "|".join(map(str, (*parts, content)))


def _is_cached(builder: Any) -> bool:
    """Whether the set is in the local cache of ``datasets``, as a whole."""
    return Path(builder.cache_dir, "dataset_info.json").exists()


def arrow_rows(dataset: Any, at_a_time: int) -> Iterator[Row]:
    """Yield the rows of a set of the library ``datasets``, streamed or not."""
    for table in dataset.with_format("arrow").iter(at_a_time):
        yield from table.to_pylist()


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a revision on the hub; None if the hub does not tell it within 10 seconds."""
    import huggingface_hub

    try:
        commit: str | None = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except Exception:  # a refusal, or the HTTP library's own network errors, which share no narrower base
        return None
    return commit


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
