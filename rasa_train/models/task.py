"""The section ``task:`` of a recipe, and the classification head that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError

Problem = Literal["single_label", "multi_label", "regression"]


class TaskConfig(BaseModel):
    """Section ``task:`` of a recipe; ``task: classification`` is short for ``task: {name: classification}``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Literal["causal_lm", "classification"] = "causal_lm"
    """What the model learns. ``causal_lm``: to continue a text; ``classification``: to give a text, or a pair of
    texts, one of several labels, several of them, or a number."""
    labels: list[str] | None = Field(None, min_length=1)
    """Names of the labels, in the order of the model's outputs. The default is those of the built-in set, or else
    all labels of the training rows, sorted."""
    problem: Problem | None = None
    """``single_label``: each text has one label; ``multi_label``: any number of labels; ``regression``: a number
    instead of a label. The default is that of the built-in set, or else ``single_label``."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        labels = self.labels or []
        if self.name == "causal_lm" and (labels or self.problem):
            raise UserError(
                "task.labels and task.problem are for task.name: classification, got causal_lm; add `name: "
                "classification`, or leave them out",
                key="task",
            )
        if labels and self.problem == "regression":
            raise UserError(
                f"task.labels: a regression gives a number and has no labels, got {labels}; leave them out, or set "
                "task.problem: single_label",
                key="task.labels",
            )
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise UserError(f"task.labels names {twice[0]!r} twice, got {labels}; name each once", key="task.labels")
        if len(labels) == 1 and self.problem != "multi_label":
            raise UserError(
                f"task.labels: there is nothing to learn with a single label, got {labels}; name at least two",
                key="task.labels",
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        return {"name": values} if isinstance(values, str) else values


@dataclass(frozen=True)
class Head:
    """The outputs of a sequence classifier."""

    labels: tuple[str, ...]
    """Names of the labels, in the order of the outputs; empty for a regression."""
    problem: Problem = "single_label"

    @property
    def task(self) -> dict[str, Any]:
        """The ``task`` in the config of an adapter that has this head."""
        return {"name": "classification", "labels": list(self.labels), "problem": self.problem}

    @classmethod
    def of_task(cls, task: object, origin: str) -> Head | None:
        """Return the head that the ``task`` of an adapter's config describes, or None if it is not a classifier's.
        Raises ``UserError``, which begins with ``origin``, for anything else."""
        if task is None:
            return None
        try:
            read = TaskConfig.model_validate(
                {**task, "labels": task.get("labels") or None} if isinstance(task, dict) else task
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{origin}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return cls(tuple(read.labels or ()), read.problem or "single_label") if read.name == "classification" else None

    @property
    def outputs(self) -> int:
        """Number of logits of a text."""
        return max(1, len(self.labels))
