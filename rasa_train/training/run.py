"""One training run, from a recipe to an adapter, top to bottom. Every worker runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import process
from ..adapters.inject import adapt, narrow_base
from ..adapters.saved import TENSORS as ADAPTER_TENSORS
from ..adapters.saved import load_tensors, read_adapter, write_config
from ..adapters.shared_input import packed
from ..adapters.site import Site
from ..adapters.state import adapters, groups, rule_state, saved_tensors, trainable
from ..data.ahead import ahead
from ..data.prepare import PreparedData, prepare
from ..distributed import collectives, preflight, rendezvous
from ..distributed.choose import make_engine
from ..distributed.engine import Engine
from ..errors import Stopped
from ..io.atomic import write_json
from ..io.base_fingerprint import base_samples
from ..io.run_dir import RunDirectory
from ..models import padding_free
from ..models.config import torch_dtype
from ..models.layers import checkpoint_layers, compile_layers
from ..models.load import empty_model, load_model, load_tokenizer, meta_model
from ..objectives import next_token
from ..objectives.next_token import Loss
from ..optim.optimizers import make_optimizer
from ..optim.schedule import lr_factor, set_lr
from ..recipe.load import dump_recipe
from ..recipe.schema import Recipe
from ..stop import StopSignal
from . import checkpoint, fault_handling
from .checkpoint import Progress
from .evaluation import TrainingEvaluation, best_of
from .micro_batches import fit, plan_steps, step_of
from .offload import with_offload
from .reporter import Reporter
from .step import restore, train_step, validate


def run(recipe: Recipe, stop: StopSignal, data: PreparedData | None = None) -> dict[str, Any]:
    """Train what the recipe says, going on where the run directory was left. Returns ``summary.json``'s content.

    ``data`` is what ``recipe.data`` prepares, for a caller that has it already.

    Raises:
        UserError: the model, the data or the adapter to start from cannot be used; steps fail (``guards``).
        Stopped: ``stop`` was asked for; the state is saved, the same call goes on from there.
        DeviceLost: the GPU has failed.
    """
    training, directory = recipe.training, RunDirectory(recipe.output_dir)
    data = data or prepare(recipe.data, load_tokenizer(recipe.model))
    steps_per_epoch = math.ceil(len(data.train) / training.batch_size)
    total_steps = training.max_steps or training.epochs * steps_per_epoch
    trackers: list[str] = list(recipe.tracking.trackers)
    tracker_files = str(directory.path / "trackers")
    accelerator = rendezvous.start(recipe.distributed.timeout_seconds, log_with=trackers, project_dir=tracker_files)
    preflight.same_everywhere(accelerator, facts(recipe, data))

    engine = make_engine(recipe.distributed, accelerator, training.max_grad_norm)
    model, sites, losses = build(recipe, engine)

    with fault_handling.explained(directory), ExitStack() as exits:
        report = exits.enter_context(Reporter(total_steps, training.log_every, accelerator))
        found = checkpoint.agreed_newest(directory.checkpoints, report.say, accelerator)
        origin = found or recipe.adapter.init_from
        if origin and engine.reads:
            load_tensors(model, read_adapter(origin).tensors, origin=str(origin))
        if not engine.first_reads:
            preflight.same_everywhere(accelerator, preflight.fingerprints(model))
        difference = None
        if recipe.model.base != "bf16":
            difference = narrow_base(model, recipe.model.base, accelerator.device)
            report.say(
                f"base held in {recipe.model.base}: its linears differ by {difference:.2%} from {recipe.model.dtype}"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}
        ranks = effective_ranks(model)
        engine.prepare(model, partial(make_optimizer, training.optimizer))
        parameters, placed = trainable(model), adapters(model)
        # Where parameters are divided, or in a compiled graph, the adapters' plain forward serves.
        fast = [] if engine.sharded or training.compile else groups(model)

        measure = None
        if training.evaluate:
            measure = TrainingEvaluation(recipe, divided=engine.sharded, say=report.say)
        progress = Progress()
        if found:
            progress = checkpoint.load_progress(found, data_key=data.key)
            checkpoint.load_optimizer(found, engine, parameters)
            checkpoint.load_rule_state(found, rule_state(model))
        if accelerator.is_main_process:
            directory.start_metrics(progress.step)
        if trackers:
            accelerator.init_trackers(recipe.tracking.project)

        count = sum(math.prod(shapes[name]) for name in parameters)
        report.say(f"{recipe.adapter.method}: {count:,} trainable parameters in {len(sites)} linears")
        if checked := preflight.preflight(accelerator, count):
            report.say(checked)
        report.say(f"{len(data.train):,} examples, {total_steps:,} steps of {training.batch_size} sequences")
        report.start(progress.step, f"resuming from {found} (step {progress.step} of {total_steps})" if found else None)

        limit = fit(engine, losses, model, fast, data.train, training, report.say)
        room = fault_handling.Room(limit, report.say)
        save = partial(save_checkpoint, engine, directory, recipe, model, shapes, data.key)
        watch, unsaved = fault_handling.Watch(training.max_skipped, report.say), False
        planned = plan_steps(recipe, data.train, limit, accelerator, range(progress.step, total_steps), steps_per_epoch)
        for step, work in enumerate(exits.enter_context(closing(ahead(planned))), progress.step):
            started = time.perf_counter()
            batch, position = work.batch, step % steps_per_epoch
            lr = training.optimizer.lr * lr_factor(training.schedule, step, total_steps)
            set_lr(engine.optimizer, lr)

            fitting = room.usual
            if fitting != limit:  # planned with as much at once as has turned out not to fit
                work = step_of(batch, data.train, fitting, training.flat, accelerator)
            rules = {name: tensor.clone() for name, tensor in rule_state(model).items()}
            while (loss := train_step(engine, losses, placed, fast, data.train, work, recipe, step)) is None:
                restore(engine, model, rules)
                fitting = fault_handling.smaller(fitting, batch, data.train.lengths, accelerator.num_processes)
                report.say(f"step {step + 1}: out of memory; the same batch again, at most {fitting} at once")
                work = step_of(batch, data.train, fitting, training.flat, accelerator)
            room.finished(step + 1, fitting)
            grad_norm = engine.step(loss)
            if skipped := watch.skipped(step + 1, loss, grad_norm):
                restore(engine, model, rules)
                watch.stop_if_hopeless(directory, data.train, batch, step + 1, first=accelerator.is_main_process)
            else:
                recipe.adapter.after_step(placed, step + 1, total_steps)
                engine.zero_grad()

            epoch_done = position + 1 == steps_per_epoch
            done = step + 1 == total_steps
            seconds = time.perf_counter() - started
            progress = progress.after(batch, data.train, seconds)
            row = {
                "step": progress.step,
                "epoch": progress.step / steps_per_epoch,
                "loss": None if skipped else loss,
                "lr": lr,
                "grad_norm": None if skipped else grad_norm,
                "skipped": int(skipped),
                "tokens": int(data.train.lengths[batch].sum()),
                "supervised_tokens": int(data.train.supervised[batch].sum()),
                "tokens_per_second": float(data.train.lengths[batch].sum()) / seconds,
                "peak_memory_bytes": process.peak_memory_bytes(),
                "seconds": seconds,
            }
            if data.validation and due(training.validate_every, progress.step, epoch_done, done):
                with packed(fast):
                    row["validation_loss"] = validate(engine, losses, data.validation, room.usual, training.flat)
                report.say(f"step {progress.step}: validation loss {row['validation_loss']:.4f}")
            if measure and due(measure.every, progress.step, epoch_done, done):
                with next_token.with_logits(model), padding_free.padded(model), mixed(recipe, model), packed(fast):
                    accuracy = measure(model) if accelerator.is_main_process else None
                row[f"eval_{measure.name}"] = collectives.from_first(accelerator, accuracy)
            if accelerator.is_main_process:
                directory.log(row)
            if trackers:
                accelerator.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=progress.step)
            report.step(row)

            stopping = collectives.stop_agreed(accelerator, stop.reason) and not done
            if stopping or unsaved or due(training.checkpoint_every, progress.step, epoch_done, done):
                unsaved = not save(progress, report.say, retry=unsaved, needed=stopping)
            if stopping:
                why = stop.reason or "another worker was asked to stop"
                raise Stopped(f"{why}: saved at step {progress.step}; the same command goes on from there")

        if not engine.sharded:
            ranks = effective_ranks(model)  # AdaLoRA's rule has changed them
        write = partial(write_current, engine, recipe, model, shapes)
        checkpoint.write_directory(directory.adapter, write, engine)
        if unsaved:
            report.say(f"the adapter is written; the last checkpoint is not. {fault_handling.saved_at(directory)}")

    summary: dict[str, Any] = {}
    if accelerator.is_main_process:
        last = directory.last_metrics()
        summary = summarize(recipe, count, ranks, data, progress, last) | {"workers": accelerator.num_processes}
        if difference is not None:
            summary["base_difference"] = difference
        if training.evaluate:
            summary["evaluation"] = best_of(directory.metrics)
        write_json(directory.summary, summary)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return summary


def build(recipe: Recipe, engine: Engine) -> tuple[nn.Module, list[Site], Loss]:
    """The adapted model, before it is placed and divided, its adapted sites, and how to get the loss of a batch from
    what the engine makes of it.

    Raises:
        UserError: the model cannot be loaded, or the adapter does not fit it.
    """
    method = recipe.adapter
    divide = recipe.distributed.strategy == "zero3" and not needs_whole_base(recipe)
    with engine.loading(torch_dtype(recipe.model), divide=divide):
        base = read_base(recipe, engine)
    if recipe.training.flat:
        padding_free.use_varlen(base)
    if checkpointing := recipe.training.activation_checkpointing:
        # Never the reentrant kind: it breaks parameters that are used once per layer, as RaSA's pools are.
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if not isinstance(checkpointing, bool | str):
            checkpoint_layers(base, checkpointing)
    torch.manual_seed(recipe.seed)
    model, sites = adapt(base, method)
    losses = next_token.install(model)
    if recipe.training.activation_offload:
        losses = with_offload(losses)
    if recipe.training.compile:
        compile_layers(model)
    if is_mixed(recipe, model):
        model.forward = mixed(recipe, model)(model.forward)
    return model, sites, losses


def is_mixed(recipe: Recipe, model: nn.Module) -> bool:
    """Whether base weights are trained in a low precision: they are held in fp32, and computed with under autocast."""
    return recipe.model.dtype != "float32" and any(map(recipe.adapter.trains, dict(model.named_parameters())))


def mixed(recipe: Recipe, model: nn.Module) -> torch.autocast:
    """Around the forward of such a model. No cache: it would keep the low-precision copies of the first step's weights
    for the whole run."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    enabled = is_mixed(recipe, model)
    return torch.autocast(kind, torch_dtype(recipe.model) if enabled else None, enabled=enabled, cache_enabled=False)


def read_base(recipe: Recipe, engine: Engine) -> PreTrainedModel:
    """The base, with its weights where this worker reads them. If only the first does, the others wait for it as long
    as it takes: a large base on a slow disk takes longer than an exchange may."""
    if not engine.first_reads:
        return load_model(recipe.model)
    read: list[PreTrainedModel] = []

    def work() -> str:
        read.append(load_model(recipe.model))
        return "read"

    rendezvous.once("base", engine.reads, work)
    return read[0] if read else empty_model(recipe.model)


def needs_whole_base(recipe: Recipe) -> bool:
    """Whether the method reads or trains weights of the base, which then cannot be divided as they are read."""
    model = meta_model(recipe.model)
    with torch.device("meta"):
        model, _ = adapt(model, recipe.adapter)
    trains = any(map(recipe.adapter.trains, dict(model.named_parameters())))
    return trains or any(adapter.needs_weight for adapter in adapters(model).values())


def facts(recipe: Recipe, data: PreparedData) -> dict[str, str]:
    """What must be the same on all workers."""
    return {**process.versions(), "recipe": checkpoint.digest(dump_recipe(recipe)), "data": data.key}


def due(every: int | str, step: int, epoch_done: bool, done: bool) -> bool:
    return done or (epoch_done if isinstance(every, str) else step % every == 0)


def save_checkpoint(
    engine: Engine,
    directory: RunDirectory,
    recipe: Recipe,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    data_key: str,
    progress: Progress,
    say: Callable[[str], None],
    *,
    retry: bool,
    needed: bool,
) -> bool:
    """Every worker gives its part. The first writes; if base weights are trained, each writes a share.

    Returns whether it is written: a full disk is said once (not at a ``retry``), and leaves the checkpoint before.

    Raises:
        UserError: the disk is full, and the checkpoint ``needed``.
    """
    of_base = any(map(recipe.adapter.trains, dict(model.named_parameters())))
    writers = engine.accelerator.num_processes if of_base else 1
    write = partial(write_current, engine, recipe, model, shapes, writers=writers)
    parameters, state = trainable(model), rule_state(model)
    try:
        checkpoint.save(
            engine, directory.checkpoints, progress, write, parameters, state, data_key=data_key, writers=writers
        )
    except OSError as error:
        if needed or not fault_handling.disk_full(error):
            raise
        if not retry:
            said = f"{error.strerror}: no checkpoint of step {progress.step}. {fault_handling.saved_at(directory)}"
            say(f"{said} The run goes on, and tries again after each step: make room.")
        return False
    if retry:
        say(f"there is room again: saved at step {progress.step}")
    if engine.accelerator.is_main_process:
        checkpoint.prune(directory.checkpoints, recipe.training.keep_last)
    return True


def write_current(
    engine: Engine,
    recipe: Recipe,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    *,
    writers: int = 1,
) -> list[Path]:
    """Write the adapter as it is now, tensor by tensor. Every worker must call it; returns the files of this one."""
    accelerator, written = engine.accelerator, []
    if accelerator.is_main_process:
        name, revision = recipe.model.name, recipe.model.revision
        samples = base_samples(name, revision)
        written = [write_config(path, recipe.adapter, base_model=name, base_revision=revision, base_tensors=samples)]
    tensors = engine.gathered(saved_tensors(model), shapes)
    return written + checkpoint.write_tensors(path / ADAPTER_TENSORS, tensors, shapes, accelerator, writers)


def effective_ranks(model: nn.Module) -> dict[str, int]:
    """The largest effective rank of each kind. The model must not be divided."""
    ranks: dict[str, int] = {}
    for adapter in adapters(model).values():
        ranks[adapter.site.kind] = max(ranks.get(adapter.site.kind, 0), adapter.effective_rank)
    return ranks


def summarize(
    recipe: Recipe,
    trainable_parameters: int,
    ranks: dict[str, int],
    data: PreparedData,
    progress: Progress,
    last: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "method": recipe.adapter.method,
        "trainable_parameters": trainable_parameters,
        "effective_rank": ranks,
        "steps": progress.step,
        "epochs": last["epoch"],
        "examples": len(data.train),
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "seconds": progress.seconds,
        "loss": last["loss"],
        "skipped_steps": last["skipped_steps"],
        "validation_loss": last.get("validation_loss"),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "strategy": recipe.distributed.strategy,
        "versions": process.versions(),
    }
