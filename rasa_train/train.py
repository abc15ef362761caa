"""One training run, from a recipe to an adapter, top to bottom. Every worker runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, group
from .adapters.base import Adapter, Method, Site
from .adapters.inject import adapt, adapters, groups, rule_state, saved_tensors, trainable
from .adapters.kernels import packed
from .adapters.saved import TENSORS as ADAPTER_TENSORS
from .adapters.saved import load_tensors, read_adapter, write_adapter
from .checkpoint import Progress
from .data.batching import collate, plan_epoch, split_batch
from .data.cache import TokenDataset
from .data.prepare import PreparedData, prepare
from .distributed import Engine, make_engine
from .errors import Stopped, UserError
from .model import load_model, load_tokenizer, meta_model, torch_dtype
from .optim import lr_factor, make_optimizer, set_lr
from .progress import Reporter
from .recipe.load import dump_recipe
from .recipe.schema import Recipe, TrainingConfig
from .run_dir import RunDirectory, write_json
from .stop import StopSignal


def run(recipe: Recipe, stop: StopSignal) -> dict[str, Any]:
    """Train what the recipe says, going on where the run directory was left. Returns ``summary.json``'s content.

    Raises:
        UserError: the model, the data or the adapter to start from cannot be used.
        Stopped: ``stop`` was asked for; the state is saved, the same call goes on from there.
    """
    training, directory = recipe.training, RunDirectory(recipe.output_dir)
    data = prepare(recipe.data, load_tokenizer(recipe.model))
    steps_per_epoch = math.ceil(len(data.train) / training.batch_size)
    total_steps = training.max_steps or training.epochs * steps_per_epoch
    trackers: list[str] = list(recipe.tracking.trackers)
    tracker_files = str(directory.path / "trackers")
    accelerator = group.start(recipe.distributed.timeout_seconds, log_with=trackers, project_dir=tracker_files)
    group.same_everywhere(accelerator, facts(recipe, data))

    engine = make_engine(recipe.distributed, accelerator, training.max_grad_norm)
    model, sites = build(recipe, engine)

    with Reporter(total_steps, training.log_every, accelerator) as report:
        found = checkpoint.agreed_newest(directory.checkpoints, report.say, accelerator)
        origin = found or recipe.adapter.init_from
        if origin:
            load_tensors(model, read_adapter(origin).tensors, origin=str(origin))
        group.same_everywhere(accelerator, group.fingerprints(model))
        shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}
        ranks = effective_ranks(model)
        engine.prepare(model, partial(make_optimizer, training.optimizer))
        parameters, placed = trainable(model), adapters(model)
        # Where parameters are divided, or hooks wait for their gradients, the adapters' plain forward serves.
        fast = [] if engine.sharded else groups(model)

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
        if checked := group.preflight(accelerator, count):
            report.say(checked)
        report.say(f"{len(data.train):,} examples, {total_steps:,} steps of {training.batch_size} sequences")
        report.start(progress.step, f"resuming from {found} (step {progress.step} of {total_steps})" if found else None)

        micro_batch_size = resolve_micro_batch_size(training, data.train, accelerator.num_processes)
        save = partial(save_checkpoint, engine, directory, recipe, model, shapes, data.key)
        for step in range(progress.step, total_steps):
            started = time.perf_counter()
            epoch, position = divmod(step, steps_per_epoch)
            batch = epoch_plan(data.train, training, recipe.seed, epoch)[position]
            micro_batches = split_batch(
                batch,
                data.train.lengths,
                micro_batch_size=micro_batch_size,
                num_workers=accelerator.num_processes,
            )
            lr = training.optimizer.lr * lr_factor(training.schedule, step, total_steps)
            set_lr(engine.optimizer, lr)

            with packed(fast):
                loss = train_step(engine, placed, data.train, micro_batches, recipe, step)
            grad_norm = engine.step()
            if not math.isfinite(loss + grad_norm):
                raise UserError(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}. Lower training.optimizer.lr?"
                )
            recipe.adapter.after_step(placed, step + 1, total_steps)
            engine.zero_grad()

            epoch_done = position + 1 == steps_per_epoch
            done = step + 1 == total_steps
            seconds = time.perf_counter() - started
            progress = progress.after(batch, data.train, seconds)
            row = {
                "step": progress.step,
                "epoch": progress.step / steps_per_epoch,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": int(data.train.lengths[batch].sum()),
                "supervised_tokens": int(data.train.supervised[batch].sum()),
                "tokens_per_second": float(data.train.lengths[batch].sum()) / seconds,
                "peak_memory_bytes": group.peak_memory_bytes(),
                "seconds": seconds,
            }
            if data.validation and due(training.validate_every, progress.step, epoch_done, done):
                with packed(fast):
                    row["validation_loss"] = validate(engine, data.validation, micro_batch_size)
                report.say(f"step {progress.step}: validation loss {row['validation_loss']:.4f}")
            if accelerator.is_main_process:
                directory.log(row)
            if trackers:
                accelerator.log({k: v for k, v in row.items() if k != "step"}, step=progress.step)
            report.step(row)

            stopping = group.stop_agreed(accelerator, stop.reason) and not done
            if stopping or due(training.checkpoint_every, progress.step, epoch_done, done):
                save(progress)
            if stopping:
                why = stop.reason or "another worker was asked to stop"
                raise Stopped(f"{why}: saved at step {progress.step}; the same command goes on from there")

    if not engine.sharded:
        ranks = effective_ranks(model)  # AdaLoRA's rule has changed them
    tensors = engine.gathered(saved_tensors(model), shapes)
    summary: dict[str, Any] = {}
    if accelerator.is_main_process:
        checkpoint.write_directory(directory.adapter, partial(write_current, recipe, tensors))
        last = directory.last_metrics()
        summary = summarize(recipe, count, ranks, data, progress, last) | {"workers": accelerator.num_processes}
        write_json(directory.summary, summary)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return summary


def build(recipe: Recipe, engine: Engine) -> tuple[nn.Module, list[Site]]:
    """The adapted model, before it is placed and divided.

    Raises:
        UserError: the model cannot be loaded, or the adapter does not fit it.
    """
    method = recipe.adapter
    divide = recipe.distributed.strategy == "zero3" and not needs_whole_base(recipe)
    with engine.loading(torch_dtype(recipe.model), divide=divide):
        base = load_model(recipe.model)
    if recipe.training.activation_checkpointing:
        # Never the reentrant kind: it breaks parameters that are used once per layer, as RaSA's pools are.
        base.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(recipe.seed)
    model, sites = adapt(base, method)
    if recipe.model.dtype != "float32" and any(map(method.trains, dict(model.named_parameters()))):
        # Base weights that are trained are held in fp32 and computed with under autocast. No cache: it would keep
        # the low-precision copies of the first step's weights for the whole run.
        kind, dtype = engine.accelerator.device.type, torch_dtype(recipe.model)
        model.forward = torch.autocast(kind, dtype, cache_enabled=False)(model.forward)
    return model, sites


def check_strategy(recipe: Recipe, workers: int) -> None:
    """Raise ``UserError`` if the method cannot do with the strategy."""
    method, strategy = recipe.adapter, recipe.distributed.strategy
    divided = strategy != "ddp" and (workers > 1 or recipe.distributed.offload != "none")
    if divided and type(method).after_step is not Method.after_step:
        raise UserError(
            f"distributed.strategy: {method.method} has a rule after each step that needs the gradients and weights "
            f"of all layers on each worker; it must be ddp, got {strategy}",
            key="distributed.strategy",
        )


def needs_whole_base(recipe: Recipe) -> bool:
    """Whether the method reads or trains weights of the base, which then cannot be divided as they are read."""
    model = meta_model(recipe.model)
    with torch.device("meta"):
        model, _ = adapt(model, recipe.adapter)
    trains = any(map(recipe.adapter.trains, dict(model.named_parameters())))
    return trains or any(adapter.needs_weight for adapter in adapters(model).values())


def facts(recipe: Recipe, data: PreparedData) -> dict[str, str]:
    """What must be the same on all workers."""
    return {**group.versions(), "recipe": checkpoint.digest(dump_recipe(recipe)), "data": data.key}


def train_step(
    engine: Engine,
    placed: Mapping[str, Adapter],
    train: TokenDataset,
    micro_batches: list[list[np.ndarray]],
    recipe: Recipe,
    step: int,
) -> float:
    """Gradients of one global batch, accumulated over the micro-batches of this worker and summed over workers.

    ``placed`` are the model's adapters by the path of their site, ``micro_batches[worker]`` the example indices of
    each worker's micro-batches.
    Returns the mean loss over the supervised tokens of the global batch.
    """
    accelerator = engine.accelerator
    workers, rank = accelerator.num_processes, accelerator.process_index
    everything = [m for worker in micro_batches for m in worker if len(m)]
    total_tokens = sum(int(train.supervised[m].sum()) for m in everything)
    loss_sum = 0.0
    for i, indices in enumerate(micro_batches[rank]):
        last = i + 1 == len(micro_batches[rank])
        torch.manual_seed(group.micro_batch_seed(recipe.seed, step, int(indices[0]) if len(indices) else -1))
        with engine.synchronizing(last):
            # What stands in for an empty micro-batch must not enter any statistics; but workers that gather weights
            # from each other must all run the same code.
            engine.model.train(len(indices) > 0 or engine.sharded)
            loss = token_losses(engine.model, batch_of(train, indices, accelerator.device))
            loss_sum += float(loss.detach())
            if recipe.training.loss_average == "tokens":
                weight = 1.0 / total_tokens
            else:  # the mean of each micro-batch, then the mean of these
                weight = 1.0 / (max(int(train.supervised[indices].sum()), 1) * len(everything))
            loss = loss * weight * workers  # engines average gradients over workers; the sum is wanted
            if last and (penalty := recipe.adapter.penalty(placed)) is not None:
                loss = loss + penalty
            engine.backward(loss, last=last)
    return group.sum_over_workers(accelerator, [loss_sum])[0] / total_tokens


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of the cross-entropies of the supervised tokens, fp32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:].reshape(-1)
    return F.cross_entropy(logits[:, :-1].reshape(len(targets), -1).float(), targets, reduction="sum")


def batch_of(dataset: TokenDataset, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """Right-padded tensors of these examples. No examples (a worker that has less to do) give one unsupervised
    sequence, so that every worker calls the model equally often."""
    batch = collate([dataset[i] for i in indices], pad_token_id=0) or {
        "input_ids": torch.zeros(1, 8, dtype=torch.long),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "labels": torch.full((1, 8), -100),
    }
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@torch.no_grad()
def validate(engine: Engine, dataset: TokenDataset, micro_batch_size: int) -> float:
    """Mean loss over the supervised tokens of a held-out set."""
    accelerator, model = engine.accelerator, engine.model
    model.eval()
    everything = np.argsort(-dataset.lengths, kind="stable")
    plan = split_batch(
        everything, dataset.lengths, micro_batch_size=micro_batch_size, num_workers=accelerator.num_processes
    )
    mine = plan[accelerator.process_index]
    loss = sum(float(token_losses(model, batch_of(dataset, indices, accelerator.device))) for indices in mine)
    return group.sum_over_workers(accelerator, [loss])[0] / int(dataset.supervised.sum())


def epoch_plan(train: TokenDataset, training: TrainingConfig, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of one epoch; the plan of the current epoch is kept."""
    key = (id(train), seed, epoch)
    if _plan.get("key") != key:
        batches = plan_epoch(
            train.lengths, batching=training.batching, batch_size=training.batch_size, seed=seed, epoch=epoch
        )
        _plan.update(key=key, batches=batches)
    return list(_plan["batches"])


_plan: dict[str, Any] = {}


def resolve_micro_batch_size(training: TrainingConfig, train: TokenDataset, workers: int) -> int:
    """``auto``: as many of the longest sequences as make up 16k tokens on a GPU, 4k on a CPU."""
    most = math.ceil(training.batch_size / workers)
    if training.micro_batch_size != "auto":
        return min(training.micro_batch_size, most)
    budget = 16_384 if torch.cuda.is_available() else 4_096
    return max(1, min(budget // int(train.lengths.max()), most))


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
) -> None:
    """Every worker gives its part, the first writes."""
    tensors = engine.gathered(saved_tensors(model), shapes)
    state = engine.gathered_optimizer(trainable(model))
    if engine.accelerator.is_main_process:
        write = partial(write_current, recipe, tensors)
        checkpoint.save(directory.checkpoints, progress, write, state, rule_state(model), data_key=data_key)
        checkpoint.prune(directory.checkpoints, recipe.training.keep_last)
    engine.accelerator.wait_for_everyone()


def write_current(recipe: Recipe, tensors: Mapping[str, Tensor], directory: Path) -> None:
    name, revision = recipe.model.name, recipe.model.revision
    write_adapter(directory, recipe.adapter, tensors, base_model=name, base_revision=revision)
    checkpoint.check_header(directory / ADAPTER_TENSORS, tensors)


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
        "validation_loss": last.get("validation_loss"),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "strategy": recipe.distributed.strategy,
        "versions": group.versions(),
    }
