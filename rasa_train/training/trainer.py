"""The state of a training run, and the operations on it: set up, resume, step, validate, save, finish."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import takewhile

from torch import Tensor

from .. import process
from ..adapters.inject import narrow_base
from ..adapters.saved import load_tensors, read_adapter
from ..adapters.sites import not_adapted
from ..adapters.state import effective_ranks, with_own_head
from ..data.ahead import ahead
from ..data.batching import Limit
from ..data.prepare import PreparedData, prepare
from ..distributed import collectives, preflight, rendezvous
from ..distributed.choose import make_engine
from ..errors import UserError, some
from ..io.atomic import write_json
from ..io.base_fingerprint import compare
from ..io.run_dir import RunDirectory
from ..merging.source import another_base
from ..models.load import load_tokenizer
from ..models.words import check_start
from ..optim.schedule import lr_factor, set_lr
from ..recipe.load import dump_recipe
from ..recipe.schema import Recipe
from ..stop import StopSignal
from . import checkpoint, fault_handling
from .best import Watched
from .checkpoint import Progress
from .compiling import compile_or_fuse
from .evaluation import Score, make_measure
from .micro_batches import Step, fit, plan_steps, step_of
from .proof import Proof
from .reporter import MetricsRow, Reporter, flat
from .step import train_step, validate
from .summary import Summary, summarise
from .trainable_model import TrainableModel


class Trainer:
    """One run on one worker. ``run`` calls the methods in the order in which they are defined here."""

    def __init__(self, recipe: Recipe, data: PreparedData | None = None) -> None:
        """Read the data and meet the other workers.

        Raises:
            UserError: the data cannot be used, or the workers do not agree on recipe, data and versions.
        """
        self.recipe, self.training = recipe, recipe.training
        self.directory = RunDirectory(recipe.output_dir)
        self.data = data or prepare(recipe.data, load_tokenizer(recipe.model), task=recipe.task)
        self.steps_per_epoch = math.ceil(len(self.data.train) / self.training.batch_size)
        self.total_steps = self.training.max_steps or self.training.epochs * self.steps_per_epoch
        self.accelerator = rendezvous.start(
            recipe.distributed.timeout_seconds,
            log_with=list(recipe.tracking.trackers),
            project_dir=str(self.directory.path / "trackers"),
        )
        facts = {"recipe": checkpoint.digest(dump_recipe(recipe)), "data": self.data.key}
        preflight.same_everywhere(self.accelerator, process.versions() | facts)
        self.progress = Progress()
        self._unsaved = False  # the disk had no room for the last checkpoint

    @property
    def first(self) -> bool:
        """Whether this is the first worker, which writes the files."""
        return bool(self.accelerator.is_main_process)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Report progress inside, and say what is saved if the disk or the GPU fails."""
        with fault_handling.explained(self.directory), ExitStack() as self._exits:
            self.report = Reporter(self.total_steps, self.training.log_every, self.accelerator)
            self._exits.enter_context(self.report)
            self.say = self.report.say
            yield

    def setup(self) -> None:
        """Load the model, put the adapters with their initial values into it, and divide it among the workers."""
        self.engine = make_engine(self.recipe.distributed, self.accelerator, self.training.max_grad_norm)
        self.model = TrainableModel(self.recipe, self.engine, self.data.head)
        self.found = checkpoint.agreed_newest(self.directory.checkpoints, self.say, self.accelerator)
        origin = self.found or self.recipe.adapter.init_from
        if origin and self.engine.reads:
            saved = read_adapter(origin)
            check_start(self.model.module, saved.words, str(origin))
            tensors, own = with_own_head(self.model.module, saved.tensors) if not self.found else (saved.tensors, [])
            load_tensors(self.model.module, tensors, origin=str(origin))
            if own:
                lacks = "has another head, or no rows of these words"
                self.say(f"note: adapter.init_from: {origin} {lacks}; {some(own)} start anew")
            base = self.recipe.model
            if not self.found and (problem := compare(saved.base_tensors, base.name, base.revision).problem):
                self.say(f"note: adapter.init_from: {another_base(saved, base.name, problem)}")
        if not self.engine.first_reads:
            preflight.same_everywhere(self.accelerator, preflight.fingerprints(self.model.module))
        self.base_difference = self._narrow_base()
        self.model.prepare()
        self.measure = make_measure(self.recipe, self.data, divided=self.engine.sharded, say=self.say)

    def _narrow_base(self) -> float | None:
        """Hold the frozen base in fewer bits, if the recipe says so. Returns the relative difference this makes."""
        base, dtype = self.recipe.model.quantization, self.recipe.model.dtype
        if base == "none":
            return None
        difference = narrow_base(self.model.module, base, self.accelerator.device)
        self.say(f"the base is held in {base}; its linears differ by {difference:.2%} from {dtype}")
        return difference

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one, and say what the run is going to do."""
        if self.found:
            self.progress = checkpoint.load_progress(self.found, data_key=self.data.key)
            checkpoint.load_optimizer(self.found, self.model)
            checkpoint.load_rule_state(self.found, self.model.rule_state)
        if self.first and (lost := self.directory.start_metrics(self.progress.step)):
            steps = f"{len(lost)} of the {self.progress.step} steps before this start (first: {lost[0]})"
            self.say(f"metrics.jsonl lacks {steps}: curves have gaps; the summary counts what the checkpoint knows")
        if self.first and self.progress.step and not self.progress.peak_memory_bytes:  # an older version saved it
            try:
                for row in self.directory.rows():
                    self.progress = self.progress.noted(row)
            except (KeyError, TypeError) as error:
                raise UserError(f"{self.directory.metrics} is damaged: {error!r:.100}") from None
        if self.recipe.tracking.trackers:
            self.accelerator.init_trackers(self.recipe.tracking.project)
        count, done = self.model.trained, self.progress.step
        places = f" in {len(self.model.adapters)} linears" if self.model.adapters else ""
        own = self.model.trained_embeddings
        rows = f", and {own:,} in rows of the embedding and the head" if own else ""
        self.say(f"{self.recipe.adapter.method}: {count - own:,} trainable parameters{places}{rows}")
        default = self.model.adapters and self.recipe.adapter.targets == "all-linear"
        if default and (left_out := not_adapted(self.model.module)):
            self.say(left_out)
        if why := self.recipe.adapter.unmerged:
            self.say(f"note: this adapter cannot be merged ({why}); rasa-eval evaluates it inside the base")
        if checked := preflight.preflight(self.accelerator, count):
            self.say(checked)
        examples = f"{len(self.data.train):,} examples"
        self.say(f"{examples}, {self.total_steps:,} steps of {self.training.batch_size} sequences")
        if len(shown := self.data.examples_by_dataset) > 1:
            self.say(f"an epoch has {some([f'{number:,} of {name}' for name, number in shown.items()], 20)}")
        found = f"resuming from {self.found} (step {done} of {self.total_steps})" if self.found else None
        self.report.start(done, found)

    def steps(self) -> Iterator[tuple[int, Step]]:
        """Yield the number (from 0) of each remaining step and this worker's part of it, which is made ahead, until the
        run stops early or is at its end."""
        compile_or_fuse(self.model, self.data.train, self.total_steps, self.say)
        self.limit = fit(self.model, self.data.train, self.say)
        self.room = fault_handling.Room(self.limit, self.say)
        self.watch = fault_handling.Watch(self.training.max_skipped, self.say)
        self.proof = Proof(self.model, self.data.train, self.data.stats, self.say)
        left = range(self.progress.step, self.total_steps)
        planned = plan_steps(self.model, self.data.train, self.limit, left, self.steps_per_epoch)
        work = self._exits.enter_context(closing(ahead(planned)))
        return takewhile(lambda _: not self.stopped_early, enumerate(work, self.progress.step))

    def step(self, step: int, work: Step) -> MetricsRow:
        """Make one optimizer step. Returns its row of the metrics."""
        started = time.perf_counter()
        batch, train = work.batch, self.data.train
        lr = self.training.optimizer.lr * lr_factor(self.training.schedule, step, self.total_steps)
        set_lr(self.engine.optimizer, lr)
        rules = {name: tensor.clone() for name, tensor in self.model.rule_state.items()}
        if proving := self.proof.pending:
            self.proof.begin(work)
        loss = self._gradients(step, work, rules)
        grad_norm = self.engine.step(loss)
        if skipped := self.watch.skipped(step + 1, loss, grad_norm):
            self.model.restore(rules)
            self.watch.stop_if_hopeless(self.directory, train, batch, step + 1, first=self.first)
        else:
            self.recipe.adapter.after_step(self.model.adapters, step + 1, self.total_steps)
            self.engine.zero_grad()
            if proving:
                self.proof.after(loss, moves=lr > 0)
        seconds = time.perf_counter() - started
        self.progress = self.progress.after(batch, train, seconds)
        tokens = int(train.lengths[batch].sum())
        return {
            "step": self.progress.step,
            "epoch": self.progress.step / self.steps_per_epoch,
            "loss": None if skipped else loss,
            "lr": lr,
            "grad_norm": None if skipped else grad_norm,
            "skipped": int(skipped),
            "tokens": tokens,
            "supervised_tokens": int(train.supervised[batch].sum()),
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": process.peak_memory_bytes(),
            "seconds": seconds,
        }

    def _gradients(self, step: int, work: Step, rules: dict[str, Tensor]) -> float:
        """Compute the gradients of a step, with less and less at once while memory runs out. Returns the loss."""
        batch, fitting = work.batch, self.room.usual
        if fitting != self.limit:  # planned with a limit that has turned out to be too large
            work = self._again(work, fitting)
        while (loss := train_step(self.model, self.data.train, work, step)) is None:
            self.model.restore(rules)
            workers = self.accelerator.num_processes
            fitting = fault_handling.smaller(fitting, batch, self.data.train.lengths, workers)
            self.say(f"step {step + 1}: out of memory; the same batch is tried again, at most {fitting} at once")
            work = self._again(work, fitting)
        self.room.finished(step + 1, fitting)
        return loss

    def _again(self, work: Step, limit: Limit) -> Step:
        return step_of(self.model, self.data.train, work.batch, limit)

    def _due(self, every: int | str) -> bool:
        """Whether work that is done after every ``every`` steps, or after every epoch, is due after the current step.
        It is always due after the last step."""
        return self.ended or self._regular(every, self.progress.step)

    def _regular(self, every: int | str, step: int) -> bool:
        return step % (self.steps_per_epoch if isinstance(every, str) else every) == 0

    @property
    def ended(self) -> bool:
        """Whether no step is left to make."""
        return self.progress.step >= self.total_steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether ``training.early_stopping`` ends the run before its last step."""
        stopping, watched = self.training.early_stopping, self.progress.watched
        waited = watched.waited if watched else 0
        return stopping is not None and waited >= stopping.patience and self.progress.step < self.total_steps

    def validate(self, row: MetricsRow) -> None:
        """Add the loss of the held-out set to the row, if it is due and not there."""
        if "validation_loss" not in row and self.data.validation and self._due(self.training.validate_every):
            with self.model.packed():
                row["validation_loss"], each = validate(self.model, self.data.validation, self.room.usual)
            said = f"step {row['step']}: validation loss {row['validation_loss']:.4f}"
            if len(self.data.held_out) > 1:
                by_name = {self.data.held_out[place]: loss for place, loss in each.items()}
                row["validation_loss_by_dataset"] = by_name
                said += f" ({', '.join(f'{name} {loss:.4f}' for name, loss in by_name.items())})"
            self.say(said)

    def evaluate(self, row: MetricsRow) -> None:
        """Add the score of ``training.evaluate`` to the row, if it is due and not there. The first worker measures
        it."""
        if self.measure and f"eval_{self.measure.name}" not in row and self._due(self.measure.every):
            with self.model.generation_mode():
                accuracy = self.measure(self.model.module) if self.first else None
            score = collectives.from_first(self.accelerator, accuracy)
            row[f"eval_{self.measure.name}"] = score  # type: ignore[literal-required]

    def judge(self, row: MetricsRow) -> None:
        """Note whether the step is the best so far, if what ``training.keep_best`` names was measured after it."""
        measure, stopping = self.training.keep_best, self.training.early_stopping
        if measure is None or measure not in row:
            return
        step, value = row["step"], collectives.from_first(self.accelerator, row[measure])  # type: ignore[literal-required]
        before = self.progress.watched or Watched(measure)
        watched = before.after(Score(step, row["epoch"], value), stopping.min_delta if stopping else 0.0)
        self.progress, self._before_best = replace(self.progress, watched=watched), before
        if self._is_best:
            self.say(f"step {step}: the best so far, {measure} {value:.4f}")
        if stopping and watched.waited:
            best = f"the best is step {watched.best.step}" if watched.best else "none was finite"
            counted = f"no improvement in {watched.waited} of at most {stopping.patience} measurements"
            self.say(f"step {step}: {counted} ({best}){'; the run stops early' if self.stopped_early else ''}")
        if self.stopped_early:  # what is measured after the last step
            self.validate(row)
            self.evaluate(row)

    @property
    def _is_best(self) -> bool:
        watched = self.progress.watched
        return watched is not None and watched.best is not None and watched.best.step == self.progress.step

    def log(self, row: MetricsRow) -> None:
        """Write the row to the metrics and the trackers, and show it."""
        self.progress = self.progress.noted(row)
        if self.first:
            self.directory.log(row)
        if self.recipe.tracking.trackers:
            values = {key: value for key, value in flat(row).items() if key != "step" and value is not None}
            self.accelerator.log(values, step=row["step"])
        self.report.step(row)

    def stop_agreed(self, stop: StopSignal) -> bool:
        """Whether a worker was asked to stop and there are steps left. Every worker must call it."""
        asked = collectives.stop_agreed(self.accelerator, stop.reason)
        return asked and not self.ended

    def checkpoint(self, *, needed: bool) -> None:
        """Save the state if that is due, if the step is the best so far, if it is ``needed`` because the run stops, or
        if the last attempt failed. A full disk is reported once and leaves the previous checkpoint in place.

        Raises:
            OSError: the disk is full and the checkpoint is needed, or the disk fails (``running`` explains it).
        """
        if not (needed or self._unsaved or self._is_best or self._due(self.training.checkpoint_every)):
            return
        try:
            checkpoint.save(self.model, self.directory.checkpoints, self.progress, self.data.key)
        except OSError as error:
            if needed or not fault_handling.disk_full(error):
                raise
            if not self._unsaved:
                said = f"{error.strerror}: no checkpoint of step {self.progress.step} was written."
                kept = fault_handling.saved_at(self.directory)
                self.say(f"{said} {kept} The run goes on, and tries again after each step: make room.")
            self._unsaved = True
            if self._is_best:  # a later checkpoint must not name a step that is not there
                waited = self.progress.watched.waited if self.progress.watched else 0
                self.progress = replace(self.progress, watched=replace(self._before_best, waited=waited))
            return
        if self._unsaved:
            self.say(f"there is room again: the run is saved at step {self.progress.step}")
        self._unsaved = False
        if self.first and (self.training.keep_last or self.training.keep_best):
            regular = partial(self._regular, self.training.checkpoint_every)
            checkpoint.prune(self.directory.checkpoints, self.training.keep_last, regular)

    def write_adapter(self) -> None:
        """Write the finished adapter. Every worker must call it."""
        self.proof.finish()
        if not self.engine.sharded:
            self.model.ranks = effective_ranks(self.model.module)  # AdaLoRA's rule has changed them
        checkpoint.write_directory(self.directory.adapter, partial(checkpoint.write_adapter, self.model), self.engine)
        if self._unsaved:
            saved = fault_handling.saved_at(self.directory)
            self.say(f"the adapter is written; the last checkpoint is not. {saved}")

    def finish(self) -> Summary | None:
        """Write the summary and close the trackers. Returns the summary; None on all workers but the first."""
        summary = summarise(self) if self.first else None
        if summary:
            with fault_handling.explained(self.directory):
                write_json(self.directory.summary, summary)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()
        return summary
