"""The launch files of ``scripts/``, run as far as one machine goes: nodes are processes on the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import STEPS, difference, metrics, reach

SCRIPTS = Path(__file__).parents[2] / "scripts"
NODES = (0, 1)


@pytest.fixture
def bin_directory(tmp_path: Path) -> Path:
    """First in the PATH: the commands of this package and of torch, SLURM's, and an ssh that stays here."""
    path = tmp_path / "bin"
    path.mkdir()
    programs = {
        "rasa-train": f'exec {sys.executable} -m rasa_train.cli.train "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol',
        "scancel": f"for pid in $(cat {tmp_path}/tasks); do kill -${{1#--signal=}} $pid; done",
        "ssh": 'while [[ $1 == -* ]]; do [[ $1 == -[op] ]] && shift; shift; done; shift; exec "$@"',
        # Two nodes, a task on each; the exit code of the first that is not 0, as srun's is the highest.
        "srun": f"""
            while [[ $1 == -* ]]; do shift; done
            for node in 0 1; do
              SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=2 "$@" &
              pids+=($!)
            done
            echo "${{pids[@]}}" > {tmp_path}/tasks
            code=0
            for pid in "${{pids[@]}}"; do wait $pid || code=$?; done
            exit $code""",
    }
    for name, body in programs.items():
        (path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (path / name).chmod(0o755)
    return path


def start(words: list[str], cwd: Path, first: Path, **env: str) -> subprocess.Popen[str]:
    path = f"{first}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, cwd=cwd, env={**os.environ, "PATH": path, **env}, stdout=pipe, stderr=pipe, text=True
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["rasa-train", "torchrun"])
def test_torchrun_nodes(launcher: str, home: Path, tmp_path: Path, bin_directory: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text("that of the machines\n")
    env = {"NODES": "2", "GPUS": "1", "HEAD": f"127.0.0.1:{free_port()}", "LAUNCHER": launcher}
    env["RASA_TRAIN_SECRET_FILE"] = str(secret)
    words = [str(SCRIPTS / "torchrun_nodes.sh"), "recipe.yaml", f"output_dir=by_{launcher}"]
    nodes = [start(["bash", *words], home, bin_directory, NODE_RANK=str(node), **env) for node in NODES]
    answers = [node.communicate(timeout=900) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], answers
    assert difference(home / "one", home / f"by_{launcher}")["loss"] < 1e-5


@pytest.mark.slow
def test_slurm(home: Path, tmp_path: Path, bin_directory: Path) -> None:
    """USR1 before the time limit: saved, back into the queue; the same job then finishes the run."""
    env = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost"}
    words = ["bash", str(SCRIPTS / "slurm.sbatch"), "recipe.yaml", "output_dir=by_slurm", "distributed.strategy=zero2"]
    job = start(words, home, bin_directory, **env)
    reach(job, home / "by_slurm", 3)
    job.send_signal(signal.SIGUSR1)
    stdout, stderr = job.communicate(timeout=900)
    assert job.returncode == 75 and "back into the queue" in stdout, stderr
    assert (tmp_path / "scontrol").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"
    assert len(metrics(home / "by_slurm")) < STEPS
    job = start(words, home, bin_directory, **env)
    _, stderr = job.communicate(timeout=900)
    assert job.returncode == 0, stderr
    assert difference(home / "one", home / "by_slurm")["loss"] < 1e-5


@pytest.mark.slow
def test_deepspeed_hostfile(home: Path, tmp_path: Path, bin_directory: Path) -> None:
    """One machine in the hostfile: more would need a real ssh."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    words = [str(SCRIPTS / "deepspeed_hostfile.sh"), str(tmp_path / "hosts"), "recipe.yaml", "output_dir=by_deepspeed"]
    job = start(["bash", *words], home, bin_directory, MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu")
    stdout, stderr = job.communicate(timeout=900)
    assert job.returncode == 0, stdout + stderr
    assert json.loads((home / "by_deepspeed" / "summary.json").read_text())["workers"] == 2
    assert difference(home / "one", home / "by_deepspeed")["loss"] < 1e-5


def kubernetes() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((SCRIPTS / "kubernetes.yaml").read_text())
    return job


def test_kubernetes_structure() -> None:
    """What the operator requires, and that the numbers of the file agree with each other."""
    job = kubernetes()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "the operator looks for this name"
        assert {m["name"] for m in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        given = {entry["name"]: entry.get("value") or entry["valueFrom"]["secretKeyRef"] for entry in container["env"]}
        assert given.pop("RASA_TRAIN_SECRET") == {"name": "rasa-train", "key": "secret"}
        assert all(isinstance(value, str) for value in given.values())
        per_node = str(container["resources"]["limits"]["nvidia.com/gpu"])
        nodes = sum(r["replicas"] for r in replicas.values())
        assert job["spec"]["nprocPerNode"] == per_node
        assert f"--nproc {per_node} --nnodes {nodes} " in container["args"][0]
        assert subprocess.run(["bash", "-n"], input=container["args"][0], text=True).returncode == 0


@pytest.mark.slow
def test_kubernetes_pods(home: Path, bin_directory: Path) -> None:
    """The shell of two pods. An eviction (SIGTERM) of one: all save, and both end with the code that is retried."""
    (program,) = kubernetes()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["args"]
    for old, new in (("--nproc 8", "--nproc 1"), ("--nnodes 8", "--nnodes 2"), ("/shared/run", "by_pods")):
        assert old in program
        program = program.replace(old, new)
    program = program.replace("/shared/", "")
    env = {"RASA_TRAIN_SECRET": "that of the pods' Secret", "WORLD_SIZE": "2", "PET_NNODES": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pods = [start(["bash", "-c", program], home, bin_directory, RANK=str(node), **env) for node in NODES]
    reach(pods[0], home / "by_pods", 3)
    pods[1].send_signal(signal.SIGTERM)
    answers = [pod.communicate(timeout=900) for pod in pods]
    assert [pod.returncode for pod in pods] == [143, 143], answers
    env["MASTER_PORT"] = str(free_port())
    pods = [start(["bash", "-c", program], home, bin_directory, RANK=str(node), **env) for node in NODES]
    answers = [pod.communicate(timeout=900) for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], answers
    assert difference(home / "one", home / "by_pods")["loss"] < 1e-5
