"""The shape of a recipe. Every section belongs to the component it configures; unknown keys are errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.fields import FieldInfo

from ..adapters.contract import Method
from ..adapters.registry import METHODS
from ..data.config import DataConfig
from ..distributed.config import DistributedConfig
from ..errors import UserError
from ..models.config import ModelConfig
from ..optim.optimizers import LionW, OptimizerConfig
from ..optim.schedule import ScheduleConfig


def _adapter_config() -> Any:
    """Return the type of the section ``adapter:``: any of the methods, told apart by their name."""
    return Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007


if TYPE_CHECKING:
    AdapterConfig = Method
else:
    AdapterConfig = _adapter_config()
Every = Literal["epoch"] | PositiveInt


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EvaluateConfig(_Section):
    """Section ``training.evaluate:``: task accuracy while training, into ``metrics.jsonl`` as ``eval_SUITE``; the best
    checkpoint by it is named in ``summary.json``. Needs the extra ``eval``."""

    suite: Literal["math", "gsm8k", "code", "forgetting"]
    """Questions, answers and metrics as those of ``rasa-eval``."""
    every: Every = "epoch"
    """``epoch``, or a number of steps. The last step is always evaluated."""
    limit: PositiveInt | None = 200
    """Questions (of each task, for forgetting); null for all."""
    data: str | None = None
    """Local questions, as for ``--data`` of ``rasa-eval``; null for the hub's."""


class TrainingConfig(_Section):
    """Section ``training:``. Steps are optimizer steps, everywhere."""

    epochs: PositiveInt = 3
    """Passes over the data (the paper: 8; the default is ours)."""
    max_steps: PositiveInt | None = None
    """Length of the run in steps instead of epochs; the schedule ends there as well."""
    batch_size: PositiveInt = 32
    """Sequences per step, over all workers and micro-batches (the paper: 192; the default is ours)."""
    micro_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Sequences that one worker computes at a time. Changes speed and memory, not the result. ``auto``: as many as
    memory allows, tried on the longest before the first step."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens that one worker computes at a time, in the place of a number of sequences; only without padding."""
    optimizer: OptimizerConfig = LionW()
    """``name: lionw`` (the paper) or ``adamw``, with its learning rate."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the steps."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this L2 norm (the paper: 1.0); null never clips."""
    max_skipped: PositiveInt = 10
    """A step whose loss or gradient is not finite changes nothing and is counted; so many in a row end the run, and
    the batch is kept in ``skipped/`` for a look. Under zero1 to zero3 the first ends it: DeepSpeed has updated then."""
    batching: Literal["length-grouped", "shuffled", "sequential", "packed"] = "length-grouped"
    """Which sequences make a batch: similar lengths together (the paper), any, or file order. ``packed``: any, and
    computed without padding."""
    padding_free: bool = False
    """Compute the sequences of a micro-batch as one row without padding, in whatever order ``batching`` gives. The
    result is the same; models whose attention cannot be kept to each sequence are refused."""
    loss_average: Literal["tokens", "micro_batch"] = "tokens"
    """Mean over the supervised tokens of the whole batch, or the mean of micro-batch means (the reference)."""
    activation_checkpointing: bool | Literal["auto"] | PositiveInt = False
    """Recompute layers in the backward pass: much less memory, about a third more work. ``true``: all layers; a
    number: the first so many; ``auto``: as many as memory asks for, tried before the first step."""
    activation_offload: bool = False
    """Keep what the backward pass needs in host memory, for room on the GPU and at the price of copies: less work
    than recomputing, where the bus is fast. Together with ``activation_checkpointing`` only what it keeps is moved."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: a minute or more at the start, then faster steps on a GPU."""
    checkpoint_every: Every = "epoch"
    """``epoch``, or a number of steps. The last step is always saved."""
    keep_last: PositiveInt | None = None
    """How many checkpoints to keep; null keeps all (the paper scores each epoch's)."""
    validate_every: Every = "epoch"
    """``epoch``, or a number of steps: loss on ``data.validation``, where there is one."""
    evaluate: EvaluateConfig | None = None
    """Task accuracy while training; null measures none."""
    log_every: PositiveInt = 10
    """Steps between two lines of progress when the output is no terminal."""

    @property
    def flat(self) -> bool:
        """Whether a micro-batch is one row without padding."""
        return self.padding_free or self.batching == "packed"

    @model_validator(mode="after")
    def _tokens_need_no_padding(self) -> TrainingConfig:
        if self.micro_batch_tokens and not self.flat:
            raise UserError(
                f"training.micro_batch_tokens: {self.micro_batch_tokens} needs batching: packed, or padding_free: "
                f"true, got batching: {self.batching}",
                key="training.micro_batch_tokens",
            )
        if self.micro_batch_tokens and self.micro_batch_size != "auto":
            raise UserError(
                f"training.micro_batch_tokens: {self.micro_batch_tokens} replaces micro_batch_size, got "
                f"micro_batch_size: {self.micro_batch_size}; leave one of them out",
                key="training.micro_batch_tokens",
            )
        return self


class TrackingConfig(_Section):
    """Section ``tracking:``. Off by default; nothing is ever sent anywhere unless asked for here."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Each must be installed (tensorboard: the extra ``tracking``)."""
    project: str = "rasa_train"
    """Project (or experiment) name that the trackers file the run under."""


class Recipe(_Section):
    """Everything about one run."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    distributed: DistributedConfig = DistributedConfig()
    tracking: TrackingConfig = TrackingConfig()
    output_dir: str
    """The run directory. Running the same recipe again resumes what it finds there."""
    seed: NonNegativeInt = 42
    """Of the adapter's start, the order of the data and the dropout masks."""


def _know_new_methods() -> None:
    Recipe.model_fields["adapter"] = FieldInfo.from_annotation(_adapter_config())
    Recipe.model_rebuild(force=True)


METHODS.watchers.append(_know_new_methods)

__all__ = ["METHODS", "Method", "Recipe", "TrainingConfig"]
