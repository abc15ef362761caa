"""The shape of a recipe. Every section belongs to the component it configures; unknown keys are errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.fields import FieldInfo

from ..adapters.contract import Method
from ..adapters.registry import METHODS
from ..data.built_in import BUILT_IN, CLASSIFIED, GLUE
from ..data.config import DataConfig
from ..distributed.config import DistributedConfig
from ..errors import UserError
from ..io.home import expanded
from ..models.config import ModelConfig
from ..models.task import TaskConfig
from ..optim.optimizers import LionW, OptimizerConfig
from ..optim.schedule import ScheduleConfig
from .measures import check_measures


def _adapter_config() -> Any:
    """Return the type of the section ``adapter:``: any of the methods, told apart by their name."""
    return Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007


if TYPE_CHECKING:
    AdapterConfig = Method
else:
    AdapterConfig = _adapter_config()
Suite = Literal[
    "math",
    "gsm8k",
    "code",
    "e2e",
    "samsum",
    "wikisql",
    "forgetting",
    "classification",
    "glue/sst2",
    "glue/cola",
    "glue/mrpc",
    "glue/qqp",
    "glue/stsb",
    "glue/rte",
    "glue/qnli",
    "glue/mnli",
]
Every = Literal["epoch"] | PositiveInt


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EvaluateConfig(_Section):
    """Section ``training.evaluate:``. Task accuracy is measured during training and written to ``metrics.jsonl`` as
    ``eval_SUITE``; ``summary.json`` names the checkpoint with the best value. Needs the extra ``eval``."""

    suite: Suite
    """Suite to evaluate, with the same questions, answers and metrics as in ``rasa-eval``. For ``task: classification``
    either ``classification``, which is the rows of ``data.validation`` (or of ``data``), or a set of GLUE."""
    every: Every = "epoch"
    """Interval between evaluations: ``epoch``, or a number of steps. The last step is always evaluated."""
    limit: PositiveInt | None = 200
    """Number of questions (of each task, for ``forgetting``); null for all. Texts are always classified all."""
    data: str | None = None
    """Local questions, as for ``--data`` of ``rasa-eval``; null for the questions on the hub."""


class EarlyStoppingConfig(_Section):
    """Section ``training.early_stopping:``. The run ends after the measurement of ``training.keep_best`` has stopped
    improving. ``adapter/`` then holds the last step, as always, and ``--checkpoint best`` is the best."""

    patience: PositiveInt
    """Number of measurements in a row without an improvement after which the run ends."""
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Difference to the last improvement that a measurement must exceed to count as the next one. The best step is the
    one with the best value, however small the difference."""


class TrainingConfig(_Section):
    """Section ``training:``. A step is an optimizer step everywhere."""

    epochs: PositiveInt = 3
    """Number of passes over the data. The paper uses 8; the default is ours."""
    max_steps: PositiveInt | None = None
    """Length of the run in steps instead of epochs. The learning rate schedule ends there as well."""
    batch_size: PositiveInt = 32
    """Number of sequences per step, over all workers and micro-batches. The paper uses 192; the default is ours."""
    micro_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Number of sequences that one worker computes at a time. It changes speed and memory, not the result. ``auto``: as
    many as memory allows, tried on the longest sequences before the first step."""
    micro_batch_tokens: PositiveInt | None = None
    """Number of tokens that one worker computes at a time, instead of a number of sequences; only without padding."""
    optimizer: OptimizerConfig = LionW()
    """Optimizer and its learning rate: ``name: lionw`` (the paper's) or ``name: adamw``."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Schedule of the learning rate over the steps."""
    max_grad_norm: PositiveFloat | None = 1.0
    """L2 norm to which larger gradients are scaled down (the paper: 1.0); null never clips."""
    max_skipped: PositiveInt = 10
    """Number of skipped steps in a row that ends the run. A step is skipped, and changes nothing, if its loss or
    gradient is not finite. The last skipped batch is then kept in ``skipped/`` for inspection."""
    batching: Literal["length-grouped", "shuffled", "sequential", "packed"] = "length-grouped"
    """Which sequences form a batch. ``length-grouped``: sequences of similar length (the paper); ``shuffled``: any;
    ``sequential``: those that follow one another in the file; ``packed``: any, computed without padding."""
    padding_free: bool = False
    """Compute the sequences of a micro-batch as one row without padding, in whatever order ``batching`` gives. The
    result is the same. A model whose attention cannot be confined to each sequence is refused."""
    loss_average: Literal["tokens", "micro_batch"] = "tokens"
    """Average of the loss over a step. ``tokens``: the mean over the supervised tokens of the whole batch;
    ``micro_batch``: the mean of the means of the micro-batches, as in the reference implementation."""
    activation_checkpointing: bool | Literal["auto", "light"] | PositiveInt = False
    """Recompute layers in the backward pass, for much less memory and about a third more work. ``true``: all layers; a
    number: that many layers, from the first; ``auto``: as many as memory requires, tried before the first step;
    ``light``: in all layers only what is cheap, but no matrix product and no attention, for about half the memory and
    a few percent more work."""
    activation_offload: bool = False
    """Keep the activations that the backward pass needs in host memory. This frees memory on the GPU at the price of
    copies, which cost less than recomputing if the bus is fast. Together with ``activation_checkpointing``, only the
    activations that checkpointing keeps are moved."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each decoder layer with torch.compile, for faster steps and less memory; this takes a minute or more at
    the start. A compiled layer must give the loss and the gradients of the layer itself, or is not used. ``auto``: for
    runs of at least 300 steps on a GPU with ``distributed.strategy: ddp`` and a base in 16 or 32 bits, unless
    ``kernels`` is ``liger``."""
    kernels: Literal["auto", "liger", "none"] = "auto"
    """Fused kernels for norms, rotary embedding and SwiGLU. ``liger``: those of liger-kernel, on a GPU, for Llama,
    Mistral, Qwen2 and Qwen3; ``auto``: these where they are installed and can be used; ``none``: transformers' own
    operations."""
    checkpoint_every: Every = "epoch"
    """Interval between checkpoints: ``epoch``, or a number of steps. The last step is always saved."""
    keep_last: PositiveInt | None = None
    """Number of checkpoints to keep; null keeps all (the paper scores the checkpoint of each epoch)."""
    validate_every: Every = "epoch"
    """Interval between measurements of the loss on ``data.validation``, if there is one: ``epoch``, or a number of
    steps."""
    evaluate: EvaluateConfig | None = None
    """Measurement of task accuracy during training; null measures none."""
    log_every: PositiveInt = 10
    """Number of steps between two lines of progress if the output is not a terminal."""
    keep_best: str | None = None
    """Measurement by which the best step is chosen, as ``metrics.jsonl`` names it: ``validation_loss``, or
    ``eval_SUITE`` for ``training.evaluate``. The checkpoint of that step is kept whatever ``keep_last`` says, and
    ``--checkpoint best`` of ``rasa-merge`` and ``rasa-eval`` takes it. ``adapter/`` holds the last step all the
    same."""
    early_stopping: EarlyStoppingConfig | None = None
    """When to end the run before its last step, by ``keep_best``; null never does. The learning rate schedule is that
    of the whole run."""

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
    """Section ``tracking:``. Tracking is off by default; nothing is ever sent anywhere unless it is asked for here."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Trackers that record the run. Each must be installed (the extra ``tracking`` installs tensorboard)."""
    project: str = "rasa_train"
    """Name of the project (or experiment) under which the trackers file the run."""


class Recipe(_Section):
    """Everything about one run."""

    model: ModelConfig
    task: TaskConfig = TaskConfig()
    adapter: AdapterConfig
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    distributed: DistributedConfig = DistributedConfig()
    tracking: TrackingConfig = TrackingConfig()
    output_dir: str
    """Run directory. Running the same recipe again resumes the run that is there."""
    seed: NonNegativeInt = 42
    """Seed for adapter initialisation, data order and dropout."""

    @model_validator(mode="before")
    @classmethod
    def _home(cls, values: Any) -> Any:
        """Expand ``~`` here for all paths of a recipe; ``columns`` holds names of columns."""
        return _expanded(values, "")

    @model_validator(mode="after")
    def _check_task(self) -> Recipe:
        if self.task.name == "classification":
            _check_classification(self)
        else:
            _check_causal(self)
        check_measures(self)
        return self


def _check_classification(recipe: Recipe) -> None:
    """Raise ``UserError`` if a key has no meaning for a classification."""
    data, training, name = recipe.data, recipe.training, "task: classification"
    for place, one in enumerate(data.sets):
        if (one.columns is not None and "text" not in one.columns) or one.dataset in ("demo", *BUILT_IN):
            key = data.key(place, "columns" if one.columns is not None else "dataset")
            raise UserError(
                f"{key}: {one.columns or one.dataset} holds queries and responses, and {name} needs texts and labels: "
                "{text: <column>, label: <column>}, perhaps with text_pair; or leave out task",
                key=key,
            )
    for key in ("template", "supervise"):
        if (value := getattr(data, key)) != DataConfig.model_fields[key].default:
            raise UserError(f"data.{key}: {value} is for responses; with {name} leave it out", key=f"data.{key}")
    if training.flat:
        key = "padding_free" if training.padding_free else "batching"
        raise UserError(
            f"training.{key}: {getattr(training, key)} puts texts into one row, and {name} needs a row for each; leave "
            "it out, or use batching: length-grouped",
            key=f"training.{key}",
        )
    if (evaluate := training.evaluate) and evaluate.suite not in CLASSIFIED:
        raise UserError(
            f"training.evaluate.suite: {evaluate.suite} asks for text, which a classifier does not write; use one of "
            f"{', '.join(CLASSIFIED)}",
            key="training.evaluate.suite",
        )
    if evaluate and evaluate.suite == "classification" and not evaluate.data and data.validation is None:
        raise UserError(
            "training.evaluate.suite: classification needs rows that are held out: add data.validation (for example "
            "{size: 0.05}), or name a file in training.evaluate.data",
            key="training.evaluate.suite",
        )


def _check_causal(recipe: Recipe) -> None:
    """Raise ``UserError`` if a key has a meaning only for a classification."""
    data, evaluate = recipe.data, recipe.training.evaluate
    for place, one in enumerate(data.sets):
        if "text" in (one.columns or {}) or one.dataset in GLUE:
            key = data.key(place, "dataset" if one.dataset in GLUE else "columns")
            raise UserError(
                f"{key}: {one.dataset if one.dataset in GLUE else one.columns} holds texts and labels, which need "
                "`task: classification`; the task is causal_lm",
                key=key,
            )
    if evaluate and evaluate.suite in CLASSIFIED:
        raise UserError(
            f"training.evaluate.suite: {evaluate.suite} is for classifiers; set task: classification, or use one of "
            f"{', '.join(suite for suite in get_args(Suite) if suite not in CLASSIFIED)}",
            key="training.evaluate.suite",
        )


def _expanded(value: Any, key: str) -> Any:
    if isinstance(value, dict) and key not in ("data.columns", "data.mix.columns"):
        return {name: _expanded(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner, key) for inner in value]
    try:
        return expanded(value) if isinstance(value, str) else value
    except UserError as error:
        raise UserError(f"{key}: {error}", key=key) from None


def _know_new_methods() -> None:
    Recipe.model_fields["adapter"] = FieldInfo.from_annotation(_adapter_config())
    Recipe.model_rebuild(force=True)


METHODS.watchers.append(_know_new_methods)

__all__ = ["METHODS", "Method", "Recipe", "TrainingConfig"]
