"""From a recipe to worker processes. Work that must be done once per job is done here, before any worker starts.

There are three cases: this process trains alone; it starts the workers of its machine and watches over them; or a
launcher (torchrun, accelerate, DeepSpeed, SLURM) has started it as one of many, and it joins the others.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from .. import process
from ..adapters.contract import Method
from ..data.prepare import PreparedData, known_head, prepare
from ..distributed import rendezvous
from ..distributed.door import secret
from ..errors import DeviceLost, Stopped, UserError, WorkerLost, say
from ..io.atomic import write_text
from ..io.json_file import field
from ..io.run_dir import RunDirectory
from ..models.fused import fusable
from ..models.load import check_base, load_config, load_tokenizer, meta_model
from ..models.suitable import check_length, check_vocabulary, end_notes
from ..recipe.load import dump_recipe
from ..recipe.schema import Recipe
from ..stop import StopSignal
from .continued import is_complete
from .supervisor import GOES_ON, Workers, WorkersFailed, default_threads, start_and_watch

if TYPE_CHECKING:
    from ..training.summary import Summary


@dataclass(frozen=True)
class Finished:
    """Outcome of a launch. ``summary`` is the run's summary; None on a worker that does not report it."""

    summary: Summary | None
    was_complete: bool = False


def launch(recipe: Recipe, workers: Workers | None = None, *, fresh: bool = False) -> Finished:
    """Check and prepare everything, then train.

    Raises:
        UserError: the recipe cannot be carried out, or the run directory holds another run.
        Stopped: a stop was asked for; the state is saved.
        WorkersFailed: a worker died.
    """
    workers = workers or Workers()
    if workers.nodes == 1 and (_join_slurm() or process.world_size() > 1):
        return _as_one_of_many(recipe, fresh)
    per_node = _per_node(workers)
    if workers.nodes > 1:
        workers = _complete(workers)
    _check_strategy(recipe, workers.nodes * per_node)
    directory = RunDirectory(recipe.output_dir)
    if workers.node_rank:  # another node looks after the run directory
        _check_input(recipe)
        start_and_watch(recipe, workers, per_node)
        return Finished(None)
    with _locked(directory, fresh):
        data = _open_run(recipe, directory, fresh)
        if data is None:
            return Finished(_summary(directory), was_complete=True)
        if per_node == workers.nodes == 1:
            from ..training.run import run  # here, so that a wrong recipe is reported sooner

            try:
                with StopSignal() as stop:
                    return Finished(run(recipe, stop, data))
            except DeviceLost as lost:
                raise WorkersFailed(f"{lost}\n{GOES_ON}") from None
        start_and_watch(recipe, workers, per_node)
        return Finished(_summary(directory))


def _open_run(recipe: Recipe, directory: RunDirectory, fresh: bool) -> PreparedData | None:
    """Set up the directory for this run, and prepare its data. Returns None if the run is complete. Wrong input is
    reported here, before the old run is deleted and before the weights are loaded."""
    if not fresh and is_complete(recipe, directory):
        return None
    directory.create()  # says why a run that is not complete cannot be written
    data = _check_input(recipe)
    try:
        if fresh:
            directory.clear()
            directory.create()
        write_text(directory.recipe, dump_recipe(recipe))
    except OSError as error:
        raise directory.unwritable(error) from None
    for note in data.notes:
        say(f"note: {note}", file=sys.stderr)
    return data


@contextmanager
def _locked(directory: RunDirectory, fresh: bool) -> Iterator[None]:
    """Make the run directory and lock it. What cannot be written but may be a complete run is not locked: it can be
    shown."""
    try:
        directory.create()
    except UserError:
        directory.refuse_links()
        if fresh or not os.path.isfile(directory.summary):
            raise
        yield
        return
    with directory.lock():
        yield


def _check_input(recipe: Recipe) -> PreparedData:
    for tracker in recipe.tracking.trackers:
        if find_spec(tracker) is None:  # accelerate would go on without it
            raise UserError(
                f"tracking.trackers: {tracker} is not installed; pip install {tracker}", key="tracking.trackers"
            )
    base = check_base(recipe.model, known_head(recipe.data, recipe.task))
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe.data, tokenizer, task=recipe.task)
    check_vocabulary(base, recipe.model.name, data.largest_id)
    if data.head:
        check_length(base, recipe.model.name, data.longest)
    return replace(data, notes=data.notes + end_notes(base, tokenizer, data.stats.turn_ends))


def _check_strategy(recipe: Recipe, workers: int) -> None:
    """Raise ``UserError`` if the method does not work with the strategy, or the model without padding."""
    method, strategy = recipe.adapter, recipe.distributed.strategy
    capabilities = recipe.distributed.capabilities(workers)
    divided = capabilities.stage > 0
    if recipe.training.flat:
        from ..models.padding_free import check_packable

        check_packable(meta_model(recipe.model))
        if method.method == "peft":
            raise UserError(
                "training.batching: methods of PEFT are trained with padding; use length-grouped or shuffled, and "
                "padding_free: false",
                key="training.batching",
            )
    compiles = recipe.training.compile is True
    if recipe.model.quantization != "none" and (divided or compiles):
        raise UserError(
            f"model.quantization: {recipe.model.quantization} works with distributed.strategy: ddp and without "
            "training.compile",
            key="model.quantization",
        )
    if recipe.training.kernels == "liger":
        why = "they do not work with training.compile" if compiles else None
        why = f"they do not work with distributed.strategy: {strategy}" if capabilities.divides_weights else why
        if why := why or fusable(str(load_config(recipe.model).model_type)):
            raise UserError(
                f"training.kernels: liger cannot be used: {why}; auto uses it where it can", key="training.kernels"
            )
    if recipe.training.activation_offload and capabilities.divides_weights:
        raise UserError(
            f"training.activation_offload must be false for distributed.strategy: {strategy}, which replaces the "
            "weights at each layer; it works with ddp, zero1 and zero2",
            key="training.activation_offload",
        )
    if compiles and divided:
        raise UserError(
            f"training.compile must be false for distributed.strategy: {strategy}, whose hooks gather the weights of "
            "a layer; it works with ddp",
            key="training.compile",
        )
    if divided and type(method).after_step is not Method.after_step:
        raise UserError(
            f"distributed.strategy: {method.method} has a rule after each step that needs the gradients and weights "
            f"of all layers on each worker; it must be ddp, got {strategy}",
            key="distributed.strategy",
        )


def _summary(directory: RunDirectory) -> Summary:
    """Return the summary of a complete run. Raises ``UserError`` if it is damaged."""
    try:
        summary = directory.read_summary()
        field(summary, "steps", int, directory.summary)
        if summary.get("loss") is not None:
            field(summary, "loss", float, directory.summary)
    except (FileNotFoundError, UserError) as error:
        said = f"output_dir: {error}. Remove {directory.summary}: the same command then writes it again"
        raise UserError(said, key="output_dir") from None
    return cast("Summary", summary)


# -- one of many ---------------------------------------------------------------------------------------------


def _as_one_of_many(recipe: Recipe, fresh: bool) -> Finished:
    """Train as one of the workers that a launcher started. The first worker looks after the run directory, the first of
    each machine prepares the data, then all train."""
    default_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    places = rendezvous.join(recipe.distributed.timeout_seconds)
    _check_strategy(recipe, process.world_size())
    directory, first = RunDirectory(recipe.output_dir), process.rank() == 0
    prepared: list[PreparedData] = []  # at most one: a worker that has prepared it does not read the cache again
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def open_run() -> str:
        lock.__enter__()
        data = _open_run(recipe, directory, fresh and not restarted)
        prepared.extend([data] if data else [])
        return "train" if data else "complete"

    def prepare_node() -> str:
        if not prepared:
            prepared.append(_check_input(recipe))
        return "ready"

    lock = _locked(directory, fresh and not restarted)
    try:
        if rendezvous.once("run directory", first, open_run) == "complete":
            return Finished(_summary(directory) if first else None, was_complete=True)
        hosts = [place.split()[0] for place in places]
        for host in sorted(set(hosts)):
            rendezvous.once(f"data on {host}", hosts.index(host) == process.rank(), prepare_node)

        from ..training.run import run

        with StopSignal() as stop, rendezvous.watching(recipe.distributed.timeout_seconds):
            return Finished(run(recipe, stop, *prepared))
    except (WorkerLost, DeviceLost) as lost:
        raise WorkersFailed(f"{lost}\n{GOES_ON}") from None
    except (UserError, Stopped):
        if not first and os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(75 if sys.exc_info()[0] is Stopped else 2) from None  # another worker reports it
        raise
    finally:
        if first:
            lock.__exit__(None, None, None)


def _join_slurm() -> bool:
    """Under ``srun`` with several tasks, give SLURM's variables the names torch reads. Returns whether it did so."""
    env = os.environ
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    if "RANK" in env or "SLURM_PROCID" not in env or tasks == 1:
        return False
    hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], str(tasks)
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env.setdefault("LOCAL_WORLD_SIZE", re.split(r"[(,]", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    one_machine = env["LOCAL_WORLD_SIZE"] == env["WORLD_SIZE"]
    env.setdefault("MASTER_ADDR", rendezvous.LOCALHOST if one_machine else first_host(hosts))
    env.setdefault("MASTER_PORT", str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 20_000))
    return True


def first_host(nodelist: str) -> str:
    """Return the first host of SLURM's compressed list: ``gpu[003-005,9],login`` -> ``gpu003``."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]*)\])?([^,\[]*)", nodelist)
    if not match:
        raise UserError(f"SLURM_JOB_NODELIST: cannot read {nodelist!r}")
    head, numbers, tail = match[1], match[2], match[3]
    return head if numbers is None else head + re.split(r"[-,]", numbers)[0] + tail


# -- starting workers ----------------------------------------------------------------------------------------


def number(workers: Workers) -> int:
    """Return the number of workers on all nodes: those of a launcher if there is one, else those to start."""
    if workers.nodes == 1 and (_join_slurm() or process.world_size() > 1):
        return process.world_size()
    return workers.nodes * _per_node(workers)


def _per_node(workers: Workers) -> int:
    if workers.per_node != "auto":
        return workers.per_node
    if "RANK" in os.environ and workers.nodes == 1:
        return 1  # a launcher has started one process, and meant it
    import torch

    return max(torch.cuda.device_count(), 1)


def _complete(workers: Workers) -> Workers:
    """Return ``workers`` with node rank and meeting point, taken from SLURM if they are not given.

    Raises:
        UserError: one of them is neither given nor known to SLURM, or is wrong; or there is no secret.
    """
    env = os.environ
    node_rank = workers.node_rank
    if node_rank is None and "SLURM_NODEID" in env:
        node_rank = int(env["SLURM_NODEID"])
    meeting = workers.rendezvous
    if meeting is None and "SLURM_JOB_NODELIST" in env:
        meeting = f"{first_host(env['SLURM_JOB_NODELIST'])}:{20_000 + int(env.get('SLURM_JOB_ID', '0')) % 20_000}"
    if node_rank is None or meeting is None or not 0 <= node_rank < workers.nodes:
        raise UserError(
            f"--nnodes {workers.nodes} needs --node-rank (0 to {workers.nodes - 1}, different on each node) and --rdzv "
            f"HOST:PORT (of node 0, the same on each node), got --node-rank {node_rank} --rdzv {meeting}"
        )
    if not re.fullmatch(r".+:\d+", meeting):
        raise UserError(f"--rdzv must be HOST:PORT, got {meeting!r}")
    secret()
    return Workers(workers.per_node, workers.nodes, node_rank, meeting, workers.max_restarts)
