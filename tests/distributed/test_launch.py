"""rasa-train with several workers, as a user starts, stops, kills and resumes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rasa_train.distributed.preflight import slow_workers
from rasa_train.launch.launch import first_host
from rasa_train.launch.supervisor import WorkersFailed, report
from rasa_train.launch.worker_process import Outcome
from tests.conftest import Cli

from .conftest import STEPS, adapter, command, difference, metrics, reach, start

PATIENCE = 900
"""Seconds after which a process hangs: far more than any of them needs, since the imports of a worker alone take half
a minute on a busy machine."""


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of its children, in the order in which they started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process.pid:
            found.append((int(fields[19]), int(path.parent.name)))
    return [pid for _, pid in sorted(found)]


@pytest.mark.slow  # in one group of workers test_full_fine_tuning_across_strategies does the same, always
def test_resume_across_strategies_and_world_sizes(home: Path) -> None:
    """ZeRO-3 on two workers, one process, FSDP, ZeRO-1, DDP: each is asked to stop, the next goes on."""
    run = home / "across"
    stages = [
        (["--nproc", "2", "distributed.strategy=zero3"], 3, signal.SIGTERM),
        (["--nproc", "1"], 6, signal.SIGUSR1),
        (["--nproc", "2", "distributed.strategy=fsdp"], 9, signal.SIGINT),
        (["--nproc", "2", "distributed.strategy=zero1"], 13, signal.SIGUSR1),
        (["--nproc", "2"], None, None),
    ]
    for options, step, number in stages:
        process = start(home, *options, "output_dir=across")
        if step and number:
            reach(process, run, step)
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == (75 if number else 0), stderr
        assert "Traceback" not in stderr
        if number:
            assert f"{number.name}: saved at step" in stderr and stdout == ""
    found = difference(home / "one", run)
    assert found["loss"] < 1e-5 and found["parameter"] < 1e-4, found
    assert len(metrics(run)) == STEPS


@pytest.mark.slow  # test_killed_worker_is_restarted kills one, always; test_the_cause_is_told has the message
def test_killed_worker_is_named(home: Path) -> None:
    process = start(home, "--nproc", "2", "output_dir=killed")
    reach(process, home / "killed", 7)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and stdout == ""
    assert "worker 1 was ended by SIGKILL" in stderr and "Traceback" not in stderr


LOST = Outcome("lost", 0, "worker 1 (b) did not answer", rank=0, host="a", ended=1000.4)
FAILED = Outcome("failed", 0, "disk full", trace="Traceback\n", rank=1, host="b", ended=997.0)


@pytest.mark.parametrize(
    ("outcomes", "exits", "told"),
    [
        ([LOST], {0: (1, 1000)}, "worker 1 (b) did not answer"),
        ([LOST], {1: (-signal.SIGKILL, 1000)}, "worker 1 (b) did not answer"),  # by the worker that lost it
        ([LOST], {1: (-signal.SIGKILL, 997)}, "worker 1 was ended by SIGKILL"),  # lost because of that
        ([FAILED, LOST], {1: (1, 997)}, "Traceback\nworker 1 (b) failed first: disk full"),
        ([], {0: (1, 1000)}, "workers ended without a message; exit codes by rank: {0: 1}"),
        ([LOST], {}, "worker 1 (b) did not answer"),  # nor did the agent of node 0
        ([], {}, "node 0 does not answer at a:1"),
    ],
)
def test_the_cause_is_told(outcomes: list[Outcome], exits: dict[int, tuple[int, int]], told: str) -> None:
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=when) for rank, (code, when) in exits.items()}
    with pytest.raises(WorkersFailed) as error:
        report(outcomes, SimpleNamespace(failures=failures), stop_asked=False, meeting="a:1")
    assert str(error.value).startswith(told)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])  # the store is in that of rank 0
def test_a_worker_that_hangs_is_named(rank: int, home: Path) -> None:
    """The others wait for it for as long as they were told to, and the launcher ends it."""
    options = ["distributed.timeout_seconds=30", "training.epochs=1000", f"output_dir=hangs{rank}"]
    process = start(home, "--nproc", "2", *options)
    reach(process, home / f"hangs{rank}", 3)
    os.kill(workers_of(process)[rank], signal.SIGSTOP)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and stdout == ""
    assert f"worker {rank} (" in stderr and "did not answer (distributed.timeout_seconds=30)" in stderr, stderr
    assert f"worker {1 - rank} (" not in stderr.partition("did not answer")[0]
    assert "Traceback" not in stderr


def test_killed_worker_is_restarted(home: Path) -> None:
    process = start(home, "--nproc", "2", "--max-restarts", "1", "--json", "output_dir=restarted")
    reach(process, home / "restarted", 7)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert "a worker has died; restart 1" in stderr and "step-00000006 (step 6 of 20)" in stderr
    assert json.loads(stdout)["steps"] == STEPS, "stdout is one JSON object"
    found = difference(home / "one", home / "restarted")
    assert found["loss"] < 1e-5 and found["parameter"] < 1e-4, found


def test_a_signal_to_one_worker_stops_all(home: Path) -> None:
    options = ["--nproc", "2", "--max-restarts", "3", "distributed.strategy=zero2", "output_dir=one_signal"]
    process = start(home, *options)
    reach(process, home / "one_signal", 3)
    os.kill(workers_of(process)[1], signal.SIGUSR1)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "SIGUSR1: saved at step" in stderr, stderr
    steps = len(metrics(home / "one_signal"))
    assert (home / "one_signal" / "checkpoints" / f"step-{steps:08d}").is_dir()


@pytest.mark.slow
def test_workers_end_with_the_launcher(home: Path) -> None:
    process = start(home, "--nproc", "2", "training.epochs=1000", "output_dir=orphans")
    reach(process, home / "orphans", 2)
    workers = workers_of(process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert len(workers) == 2 and not alive


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(home: Path) -> None:
    """Also where no worker hears that it was asked to save."""
    process = start(home, "--nproc", "2", "training.epochs=1000", "output_dir=twice")
    reach(process, home / "twice", 3)
    workers = workers_of(process)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert (
        process.returncode == 130 and "press Ctrl-C again to end it at once" in stderr and "Traceback" not in stderr
    ), stderr
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_an_error_of_the_user_in_a_worker_is_told_once(home: Path) -> None:
    options = ["--nproc", "2", "--max-restarts", "2", "training.optimizer.lr=1e30", "output_dir=nan"]
    done = subprocess.run(command(*options), cwd=home, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "a lower training.optimizer.lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_strategy_cannot_do(home: Path, cli: Cli) -> None:
    recipe = home / "recipe.yaml"
    wrong = cli("train", recipe, "--nproc", "2", "adapter={method: adalora, r: 4}", "distributed.strategy=zero2")
    assert wrong.returncode == 2 and "adalora" in wrong.stderr and "must be ddp, got zero2" in wrong.stderr
    wrong = cli("train", recipe, "distributed.offload=all", "distributed.strategy=zero2")
    assert wrong.returncode == 2 and "one of zero3, fsdp, got zero2" in wrong.stderr
    wrong = cli("train", recipe, "--nnodes", "2", "--node-rank", "0")
    assert wrong.returncode == 2 and "--rdzv" in wrong.stderr
    assert cli("train", recipe, "--nproc", "some").returncode == 2


@pytest.mark.slow  # test_covering keeps both in host memory on two workers, always
def test_host_memory_of_one_process(home: Path) -> None:
    """One process divides nothing, but may keep weights and optimizer state in host memory. stdout stays clean."""
    options = ["--nproc", "1", "--json", "distributed.strategy=zero3", "distributed.offload=all", "output_dir=host"]
    done = subprocess.run(command(*options), cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == STEPS
    assert difference(home / "one", home / "host")["loss"] < 1e-5


@pytest.mark.slow  # test_joins_slurm takes the same way in, and so do the workers of the parity tests
def test_joins_torchrun(home: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = ["-m", "rasa_train.cli.train", "recipe.yaml", "output_dir=torchrun", "distributed.strategy=fsdp"]
    done = subprocess.run([*torchrun, *program], cwd=home, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the adapter is in torchrun/adapter") == 1
    assert difference(home / "one", home / "torchrun")["loss"] < 1e-5


@pytest.mark.slow
def test_joins_slurm(home: Path) -> None:
    """Two tasks with the variables that srun sets."""
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost"}
    pipe, options = subprocess.PIPE, command("output_dir=slurm", "distributed.strategy=zero2")
    tasks = [
        subprocess.Popen(
            options,
            cwd=home,
            env={**os.environ, **slurm, "SLURM_PROCID": task, "SLURM_LOCALID": task},
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for task in "01"
    ]
    (first, error), (second, _) = (task.communicate(timeout=PATIENCE) for task in tasks)
    assert all(task.returncode == 0 for task in tasks), error
    assert "the adapter is in slurm/adapter" in first and second == ""
    assert difference(home / "one", home / "slurm")["loss"] < 1e-5


def worker(home: Path, rank: int, port: int, *options: str) -> subprocess.Popen[str]:
    """One of two workers, as a launcher would start it."""
    env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*options), cwd=home, env={**os.environ, **env}, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_a_worker_that_does_not_come_is_named(home: Path) -> None:
    first = worker(home, 0, 29_541, "output_dir=lonely", "distributed.timeout_seconds=3")
    _, error = first.communicate(timeout=PATIENCE)
    assert first.returncode == 2 and "1 of 2 workers did not come within 3 s: worker 1." in error, error


@pytest.mark.slow
def test_workers_that_disagree_are_named(home: Path) -> None:
    options = ["output_dir=disagree", "training.max_steps=2"]
    both = [worker(home, rank, 29_542, *options, f"seed={rank}") for rank in (0, 1)]
    _, error = both[0].communicate(timeout=PATIENCE)
    both[1].communicate(timeout=PATIENCE)
    assert [process.returncode for process in both] == [2, 2], error
    assert "workers do not agree:" in error and "recipe: " in error and "on worker 1 (" in error


def test_slow_workers() -> None:
    places = ["a GPU 0", "a GPU 1", "b GPU 0", "b GPU 1"]
    usual = [(0.01, 0.02)] * 3
    assert slow_workers([*usual, (0.012, 0.02)], places) == []
    assert slow_workers([*usual, (0.01, 0.3)], places) == ["worker 3 (b GPU 1) computes slowly: 300 ms, most 20 ms"]
    (line,) = slow_workers([(0.01, 0.02), (0.01, 0.02), (0.9, 0.02), (0.01, 0.02)], places)
    assert line.startswith("worker 2 (b GPU 0) receives slowly")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[003-005,9],x", "gpu003"), ("n[1,4]-ib,z", "n1-ib"), ("n-1.x.org,b", "n-1.x.org")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.slow  # test_covering compares the adapters' files themselves, always
def test_zero3_adapter_merges_like_one_process(home: Path, cli: Cli) -> None:
    """Trained on a base that was divided as it was read; merged it gives the logits of the run on one process."""
    import torch
    from transformers import AutoModelForCausalLM

    options = ["--nproc", "2", "distributed.strategy=zero3", "output_dir=zero3"]
    subprocess.run(command(*options), cwd=home, check=True, capture_output=True)
    logits = []
    for run in ("one", "zero3"):
        cli("merge", home / run, "--output", home / run / "merged", check=True)
        model = AutoModelForCausalLM.from_pretrained(home / run / "merged", dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(torch.tensor([[1, 5, 7, 9, 11]])).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (home / "zero3" / "adapter" / "adapter_config.json").read_bytes() == (
        home / "one" / "adapter" / "adapter_config.json"
    ).read_bytes()
    assert adapter(home / "zero3").keys() == adapter(home / "one").keys()


# -- two hosts -----------------------------------------------------------------------------------------------


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces joined by a pair of interfaces: 10.78.0.1 and 10.78.0.2."""
    if os.getuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"rasa{os.getpid()}_{i}" for i in (0, 1)]
    ends = [f"rv{os.getpid() % 100_000}_{i}" for i in (0, 1)]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}"]
    for i, (name, end) in enumerate(zip(names, ends, strict=True)):
        commands += [f"-n {name} addr add 10.78.0.{i + 1}/24 dev {end}"]
        commands += [f"-n {name} link set lo up", f"-n {name} link set {end} up"]
    try:
        for words in commands:
            if subprocess.run(["ip", *words.split()], capture_output=True).returncode:
                pytest.skip("network namespaces cannot be made here")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on(host: str, node: int, home: Path, *options: str) -> subprocess.Popen[str]:
    nodes = ["--nnodes", "2", "--node-rank", str(node), "--rdzv", "10.78.0.1:29517", "--nproc", "1"]
    words = ["ip", "netns", "exec", host, *command(*nodes, *options)]
    env = {**os.environ, "RASA_TRAIN_SECRET": "that of both hosts"}
    return subprocess.Popen(words, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_hosts(home: Path, two_hosts: list[str]) -> None:
    nodes = [on(host, node, home, "output_dir=hosts") for node, host in enumerate(two_hosts)]
    (first, error), (second, other) = (node.communicate(timeout=PATIENCE) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], (error, other)
    assert "the adapter is in hosts/adapter" in first and second == ""
    assert difference(home / "one", home / "hosts")["loss"] < 1e-5

    alone = on(two_hosts[0], 0, home, "output_dir=alone", "distributed.timeout_seconds=3")
    _, error = alone.communicate(timeout=PATIENCE)
    assert alone.returncode == 2 and "the 2 nodes did not meet at 10.78.0.1:29517 within 3 s" in error


@pytest.mark.slow
def test_a_cut_link(home: Path, two_hosts: list[str]) -> None:
    """Nothing is refused and nothing arrives: each side waits for as long as it was told to, and names the other."""
    options = ["output_dir=cut", "training.epochs=1000", "distributed.timeout_seconds=30"]
    nodes = [on(host, node, home, *options) for node, host in enumerate(two_hosts)]
    reach(nodes[0], home / "cut", 3)
    link = f"rv{os.getpid() % 100_000}_1"
    subprocess.run(["ip", "-n", two_hosts[1], "link", "set", link, "down"], check=True)
    errors = [node.communicate(timeout=PATIENCE)[1] for node in nodes]
    for node, error in enumerate(errors):
        assert nodes[node].returncode == 1 and "Traceback" not in error, errors
        assert f"worker {1 - node} (" in error.partition(" did not answer")[0], errors
        assert "did not answer (distributed.timeout_seconds=30)" in error, errors


def test_check_of_a_large_model(tmp_path: Path, cli: Cli) -> None:
    """Memory arithmetic from shapes alone: what is divided, and which strategy a 40 GiB GPU needs."""
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(shape))
    (tmp_path / "r.yaml").write_text(
        "model: {name: shape}\nadapter: {method: rasa, r: 8}\ndata: {dataset: no.jsonl, max_length: 1024}\n"
        "training: {micro_batch_size: 1, activation_checkpointing: true}\noutput_dir: o\n"
        "distributed: {gpu_memory_gib: 40}\n"
    )

    def facts(*options: str) -> dict[str, Any]:
        done = cli("train", "r.yaml", "--check", "--json", *options)
        assert done.returncode == 2, "there are no weights"
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    whole, divided = facts(), facts("--nproc", "8", "--nnodes", "8", "--rdzv", "a:1", "distributed.strategy=zero3")
    assert whole["memory_bytes"]["base_weights"] == 2 * 70_553_706_496 and whole["workers"] == 1
    assert divided["memory_bytes"]["base_weights"] == 2 * 70_553_706_496 // 64 and divided["workers"] == 64
    assert "no strategy fits 40 GiB" in whole["advice"][0]
    assert divided["advice"][0].startswith("distributed.strategy=zero3: ")
    layer = 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192)  # bytes, without its adapters
    assert 2 * layer < divided["memory_bytes"]["gathered_weights"] < 2.1 * layer + 2 * 128256 * 8192
    by_strategy = divided["memory_bytes_by_strategy"]
    assert by_strategy["zero3"] < by_strategy["fsdp"] < 40 * 2**30 < by_strategy["zero2"] < by_strategy["ddp"]
