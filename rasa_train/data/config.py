"""The section ``data:`` of a recipe: what to train on."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StrictFloat, StrictInt, field_validator, model_validator

from ..errors import UserError
from .columns import ALIASES

Template = Literal["alpaca", "chat", "plain", "separated"]
Supervise = Literal["response", "paper", "all"]


_COLUMNS = (
    ({"query", "response"}, {"input", "system", "history", "reasoning", "tools"}),
    ({"messages"}, {"system", "tools", "chosen", "rejected"}),
    ({"chosen"}, {"query", "input", "system", "history", "rejected", "tools"}),
    ({"text", "label"}, {"text_pair"}),
)
"""What ``data.columns`` must name, and may name beside it."""


class ValidationConfig(BaseModel):
    """Held-out examples: a dataset of their own, or a share of the training rows. Exactly one of the two must be given.

    Raises:
        UserError: neither or both of ``dataset`` and ``size`` are given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dataset: str | None = None
    """Dataset of the held-out examples: a built-in name, a hub id, or a local file or directory, as for
    data.dataset."""
    split: str | None = None
    """Split of ``dataset``; only hub sets and directories have several. The default is a directory's validation split,
    or else its test split; for a hub set other than data.dataset it is ``train``."""
    size: Annotated[StrictInt, Field(ge=1)] | Annotated[StrictFloat, Field(gt=0, lt=1)] | None = None
    """Held-out examples taken from the training examples instead, by a shuffle with seed 42: an integer is a number of
    examples, a number below 1 is a share of them."""

    @model_validator(mode="after")
    def _exactly_one_form(self) -> Self:
        if (self.dataset is None) == (self.size is None):
            raise UserError(
                "data.validation needs exactly one of `dataset` (a set of its own) and `size` (examples "
                f"taken from the training rows), got dataset={self.dataset!r}, size={self.size!r}",
                key="data.validation",
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _split_needs_a_dataset(cls, values: Any) -> Any:
        """Leave ``split`` out beside ``size``, where older versions wrote its default into the recipe of a run."""
        if isinstance(values, dict) and values.get("dataset") is None:
            return {name: value for name, value in values.items() if name != "split"}
        return values


class DecontaminateConfig(BaseModel):
    """Evaluation sets whose questions are looked for in the training rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sets: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """Names out of math, gsm8k, humaneval, mbpp and demo, or files or directories of questions (rows as for
    data.dataset)."""
    action: Literal["remove", "report"] = "remove"
    """What happens to a row that has such a question. remove: it is left out; report: it is only counted and told."""
    share: float = Field(0.8, gt=0, le=1)
    """Part of a question's words that a row must have, in runs of 13 words or more, to be found. Near 0, a single run
    of 13 words is enough."""


class DatasetConfig(BaseModel):
    """One of the sets of ``data.mix``, which are trained on together."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dataset: str = Field(min_length=1)
    """Name, file or directory of the set, as for data.dataset."""
    weight: float | None = Field(None, gt=0, strict=True, allow_inf_nan=False)
    """Share of the set in the examples of an epoch, in proportion to the weights of the others: 3 and 1 are three
    quarters and one quarter. By default, if no set has a weight, each has its own size. An epoch has as many examples
    as all sets together."""
    subset: str | None = None
    """Name of the configuration, for a hub set that has several."""
    split: str = "train"
    """Split of a hub set or directory."""
    revision: str | None = None
    """Branch, tag or commit of a hub set."""
    columns: dict[str, str] | None = None
    """Columns of this set, as for data.columns."""


class DataConfig(BaseModel):
    """Which rows to train on, how they become tokens, and which tokens carry loss.

    Raises:
        UserError: a combination of keys has no meaning (``supervise: paper`` without the alpaca
            template, columns that name neither a query and response nor messages).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dataset: str | None = Field(None, min_length=1)
    """Dataset to train on: a built-in name (metamathqa, magicoder, demo; glue/sst2 and the other sets of GLUE), a hub
    id, a local .jsonl/.json/.parquet file (.gz too, except parquet), a directory of such files, or a directory written
    by datasets.save_to_disk. Exactly one of dataset and mix must be given."""
    subset: str | None = None
    """Name of the configuration, for a hub set that has several."""
    split: str = "train"
    """Split of a hub set or directory; a single local file is one split, whatever this name is. The default is the
    hub's name for the first split."""
    revision: str | None = None
    """Branch, tag or commit of a hub set. The default is the hub's main branch."""
    columns: dict[str, str] | None = None
    """Columns of the file that hold each part of an example: {query: ..., response: ...}, perhaps with {input: ...},
    which follows the query, or {messages: ...}; perhaps with {tools: ...} for template: chat. A query may also have
    {history: ...} (earlier turns) and {reasoning: ...}, both kinds {system: ...}; {chosen: ...}, perhaps with
    {query: ...} or {messages: ...} before it, is an answer that is preferred. For task: classification {text: ...,
    label: ...}, perhaps with {text_pair: ...}. By default those of the built-in set, or else recognised from the first
    row."""
    template: Template = "alpaca"
    """Text around a row. alpaca: the paper's text; chat: the tokenizer's own chat template; plain: the query and then
    the response, with nothing else; separated: the query, the tokenizer's bos token (its eos token where it has none),
    a space and the response, as LoRA's experiments with GPT-2 on E2E have it."""
    supervise: Supervise = "response"
    """Tokens that carry loss. response: the tokens of the response and the end token; paper: all tokens but those of
    the question, as in the reference implementation; all: every token."""
    max_length: PositiveInt = 4096
    """Length of the longest example, in tokens. The paper's scripts use the default."""
    over_length: Literal["truncate", "drop"] = "truncate"
    """What happens to an example longer than max_length. truncate: it is cut on the right, as in the paper's scripts,
    and loses its end token; drop: it is left out."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training examples that is used: the first ones of a shuffle with seed 42 (the paper's data scaling
    uses 0.25 and 0.5). The default uses all, as in the paper's main tables."""
    validation: ValidationConfig | None = None
    """Held-out examples. By default there are none, as in the paper."""
    num_workers: PositiveInt | Literal["auto"] = "auto"
    """Number of processes that tokenise a large set. auto: one for each usable core, but at most 16."""
    cache_dir: str | None = None
    """Directory of the tokenised sets. The default is $RASA_TRAIN_CACHE, else $XDG_CACHE_HOME/rasa_train, else
    ~/.cache/rasa_train."""
    mix: list[DatasetConfig] | None = None
    """Several sets to train on together, instead of dataset: [{dataset: a.jsonl, weight: 3}, {dataset: b.jsonl, weight:
    1}]. Each has its own subset, split, revision and columns."""
    max_examples: PositiveInt | None = None
    """Number of examples after which no more rows are read: those of the first rows of the set, of each set of a
    mix. The default takes all rows."""
    decontaminate: DecontaminateConfig | None = None
    """Evaluation sets whose questions are looked for in all texts of the training rows, which are left out if they have
    one: a list such as [math, gsm8k, humaneval, my_test.jsonl], or a section with `sets`. Case, punctuation and line
    breaks do not matter. Nothing is looked for by default."""
    deduplicate: bool = False
    """Whether of training examples with equal tokens and labels only the first is kept, and none that is also a
    held-out example."""
    rewritten_history: Literal["split", "refuse"] = "split"
    """What happens to a conversation in which the chat template writes earlier turns in another way than the last one,
    such as without their thoughts, so that a server sees tokens that no single text has. split: it becomes one example
    for each run of turns that a single text serves; refuse: it is left out, and counted."""

    @property
    def sets(self) -> list[DatasetConfig]:
        """The sets to train on: those of ``mix``, or the only one."""
        if self.mix is not None:
            return self.mix
        assert self.dataset
        return [
            DatasetConfig(
                dataset=self.dataset,
                subset=self.subset,
                split=self.split,
                revision=self.revision,
                columns=self.columns,
            )
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sets for reports, each another one: a name that several sets share is followed by what tells
        them apart."""
        named = []
        for one in self.sets:
            alike = [other for other in self.sets if other.dataset == one.dataset]
            parts = [(str(getattr(one, key)), key) for key in ("subset", "split", "revision")]
            apart = [part for part, key in parts if len({getattr(other, key) for other in alike}) > 1]
            named.append(f"{one.dataset} ({', '.join(apart)})" if apart else one.dataset)
        found: list[str] = []
        for place, name in enumerate(named):
            shared = named.count(name) > 1 or name in found
            found.append(f"{name} #{place + 1}" if shared else name)
        return tuple(found)

    def key(self, place: int, name: str) -> str:
        """Return the recipe's key ``name`` of one of ``sets``, such as ``data.mix[1].dataset``."""
        return f"data.{name}" if self.mix is None else f"data.mix[{place}].{name}"

    @model_validator(mode="after")
    def _check_mix(self) -> Self:
        if self.mix is None:
            if self.dataset is None:
                raise UserError(
                    "data.dataset is required but missing; or name several sets to train on together in data.mix",
                    key="data.dataset",
                )
            return self
        for name in ("dataset", "subset", "split", "revision", "columns"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                where = "leave one of them out" if name == "dataset" else f"write {name} into the sets of data.mix"
                raise UserError(
                    f"data.{name}: {value} and data.mix cannot be given together: {where}",
                    key=f"data.{name}",
                )
        if not self.mix:
            raise UserError(
                "data.mix is an empty list: name at least one set, as in [{dataset: a.jsonl}]", key="data.mix"
            )
        weighted = [place for place, one in enumerate(self.mix) if one.weight is not None]
        if 0 < len(weighted) < len(self.mix):
            lacks = next(place for place in range(len(self.mix)) if place not in weighted)
            raise UserError(
                f"data.mix[{lacks}] has no weight, and data.mix[{weighted[0]}] has weight: "
                f"{self.mix[weighted[0]].weight:g}; give each set a weight, or none of them (then each has its own "
                "size)",
                key=f"data.mix[{lacks}]",
            )
        return self

    @field_validator("decontaminate", mode="before")
    @classmethod
    def _list_of_sets(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        return {"sets": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.supervise == "paper" and self.template != "alpaca":
            raise UserError(
                "data.supervise: paper is defined on the alpaca template's headers, got data.template: "
                f"{self.template}; use supervise: response, or template: alpaca",
                key="data.supervise",
            )
        for place, columns in enumerate([one.columns for one in self.mix] if self.mix else [self.columns]):
            if columns is not None:
                _check_columns(columns, self.key(place, "columns"), self.template)
        return self


def _check_columns(columns: dict[str, str], key: str, template: Template) -> None:
    named = {ALIASES.get(name, name) for name in columns}
    if len(named) < len(columns) or not any(needed <= named <= needed | more for needed, more in _COLUMNS):
        raise UserError(
            f"{key} must name `query` and `response` (perhaps `input`, `system`, `history`, `reasoning`), or "
            "`messages` (perhaps `system`), or `chosen` (perhaps `query` or `messages`), or `text` and `label` "
            f"(perhaps `text_pair`), got {sorted(columns)}; write it as {{query: <column of the file>, "
            "response: <column of the file>}",
            key=key,
        )
    if "tools" in named and template != "chat":
        raise UserError(f"{key}: `tools` are for data.template: chat, got template: {template}", key=key)
