"""The command line of gpu_check: reads the options, runs the steps, and prints a table of what they gave."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from . import record, steps, wheels
from .driver import run_steps
from .results import NEEDS_GPU, Results, Row
from .summary import succeeded, table

ROOT = steps.ROOT
BUDGET, TINY_BUDGET = 530, 1800
"""Seconds in all, on a GPU and on a CPU: the first is less than nine minutes."""
FOUND = """
import json, torch
there = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name(0) if there else "cpu"}))
"""
"""Program that asks torch, in a process of its own: this one needs no package."""


class Wrong(Exception):
    """Something in the command is wrong."""


class Parser(argparse.ArgumentParser):
    """A parser that reports what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise Wrong(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    try:
        options = parsed(sys.argv[1:] if arguments is None else arguments, os.environ)
        if options.record:
            print(record.record(options.record))
            return 0
        if options.download_wheels:
            print(wheels.download())
            return 0
        return check(options)
    except (Wrong, record.Refused) as wrong:
        print(f"gpu_check: {wrong}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1


def parsed(arguments: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Return the options. Those of ``make gpu-check`` come as variables of the environment.

    Raises:
        Wrong: one is not what it must be.
    """
    parser = Parser(prog="gpu_check", description="Prove and measure everything on the GPU of this machine.")
    given = environment.get
    parser.add_argument("--budget", default=given("BUDGET"), help=f"seconds in all (BUDGET; default: {BUDGET})")
    parser.add_argument("--steps", default=given("STEPS"), help="which steps to run (STEPS; default: all)")
    tiny = given("TINY", "0")
    parser.add_argument("--tiny", action="store_true", default=tiny == "1", help="tiny shapes on a CPU (TINY=1)")
    out = given("OUT") or "gpu_check_out"
    parser.add_argument("--out", type=Path, default=Path(out), help="where results go (OUT; default: gpu_check_out)")
    parser.add_argument("--wheels", type=Path, help="install these first (default: .whl, if pydantic is missing)")
    parser.add_argument("--download-wheels", action="store_true", help="download wheels for a bare machine into .whl")
    parser.add_argument("--record", type=Path, nargs="+", metavar="OUT", help="copy results to benchmarks/")
    options = parser.parse_args(arguments)
    if tiny not in ("0", "1", ""):
        raise Wrong(f"TINY must be 0 or 1, got {tiny!r}")
    options.budget = _seconds(options.budget or str(TINY_BUDGET if options.tiny else BUDGET))
    options.steps = _names(options.steps or "")
    if options.wheels is not None and not options.wheels.is_dir():
        raise Wrong(f"--wheels: {options.wheels} is not a directory")
    if options.wheels is None and wheels.WHEELS.is_dir() and not find_spec("pydantic"):
        options.wheels = wheels.WHEELS
    return options


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise Wrong(f"BUDGET must be a number of seconds, got {text!r}")
    return seconds


def _names(text: str) -> list[str]:
    """Return the steps that are named, in their own order; all of them if none is named."""
    wanted = text.replace(",", " ").split()
    if unknown := [name for name in wanted if name not in steps.NAMES]:
        raise Wrong(f"STEPS: there is no {', '.join(unknown)}; there are {', '.join(steps.NAMES)}")
    return [name for name in steps.NAMES if name in wanted or not wanted]


def check(options: argparse.Namespace) -> int:
    """Run the steps and say what they gave. Returns the exit code."""
    began = time.monotonic()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that processes are ended

    def say(text: str) -> None:
        line = f"[{time.monotonic() - began:4.0f} s] {text}"
        print(line, flush=True)
        with results.log.open("a") as log:
            log.write(line + "\n")

    with tempfile.TemporaryDirectory() as temporary:
        environment = environment_of(options, out, Path(temporary))
        if options.wheels is not None and (wrong := wheels.install(options.wheels, Path(temporary, "site"))):
            raise RuntimeError(f"the wheels of {options.wheels} could not be installed: {wrong}")
        facts = facts_of(options, environment)
        results = prepared(out, facts, fresh=options.steps == steps.NAMES)
        chosen = [step for step in steps.all_steps(options.tiny) if step.name in options.steps]
        if facts["device"] == "cpu" and not options.tiny:
            say("torch sees no GPU here, so nothing is run; TINY=1 tries the steps on a CPU")
            for step in chosen:
                results.add({"step": step.name, "outcome": NEEDS_GPU, "seconds": 0, "figure": ""})
        else:
            deadline = began + options.budget
            with card_watched(out / "smi.csv", facts["device"]):
                run_steps(chosen, results, deadline=deadline, environment=environment, directory=ROOT, say=say)
        written = record.write_benchmark(results, facts)
    fine = succeeded(results, options.steps, options.tiny)
    print(f"\n{table(results, options.steps)}\n\n{time.monotonic() - began:.0f} s in all; results: {written.parent}")
    return 0 if fine else 1


def environment_of(options: argparse.Namespace, out: Path, temporary: Path) -> dict[str, str]:
    """What the processes of the steps find in their environment."""
    places = [temporary / "site", ROOT, ROOT / "scripts", os.environ.get("PYTHONPATH")]
    environment = {
        "OMP_NUM_THREADS": "1" if options.tiny else str(min(8, os.cpu_count() or 1)),
        "RASA_TRAIN_CACHE": str(temporary / "cache"),
        "TRITON_CACHE_DIR": str(temporary / "triton"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(place) for place in places if place),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "GPU_CHECK_OUT": str(out),
        "GPU_CHECK_TINY": "1" if options.tiny else "0",
        "RASA_TEST_GPU": "0" if options.tiny else "1",
    }
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if options.tiny else {})


def facts_of(options: argparse.Namespace, environment: Mapping[str, str]) -> Row:
    """What this run is: on which device, with which torch, of which commit."""
    asked = subprocess.run([sys.executable, "-c", FOUND], env=environment, capture_output=True, text=True)
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        raise Wrong(f"{sys.executable} cannot use torch: {last}")
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    words = ["python", "scripts/gpu_check", *(["--tiny"] if options.tiny else [])]
    words += ["--steps", ",".join(options.steps)] if options.steps != steps.NAMES else []
    return {
        **found,
        "tiny": options.tiny,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join([*words, "--budget", f"{options.budget:g}"]),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout, with a plus sign if files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def prepared(out: Path, facts: Row, *, fresh: bool) -> Results:
    """Return the results of the directory. It is emptied, unless only some steps are to run and its results are of the
    same code on the same device."""
    results, run = Results(out), out / "run.json"
    same = {key: facts[key] for key in ("device", "torch", "tiny", "commit")}
    earlier = json.loads(run.read_text()) if run.exists() else None
    if fresh or earlier != same:
        for name in ("results.jsonl", "steps.log", "bench.jsonl", "profile.txt", "smi.csv", record.FILE):
            (out / name).unlink(missing_ok=True)
    run.write_text(json.dumps(same) + "\n")
    return results


@contextlib.contextmanager
def card_watched(file: Path, device: str) -> Iterator[None]:
    """Write to a file what the card does, every two seconds, if there is nvidia-smi."""
    what = "timestamp,utilization.gpu,memory.used,power.draw,clocks.sm,clocks.mem,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv", "--loop=2"]
    if device == "cpu":
        yield
        return
    with file.open("a") as opened, contextlib.ExitStack() as ended:
        with contextlib.suppress(OSError):
            watching = subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT)
            ended.callback(watching.wait)
            ended.callback(watching.terminate)
        yield
