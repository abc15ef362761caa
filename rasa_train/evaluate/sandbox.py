"""Run programs that a model wrote, where they can do no harm (``jail`` is the inside).

On Linux 5.12 or newer each program is a process of its own in new user, mount, PID, network, IPC and UTS namespaces,
as an unprivileged user without capabilities: no network, the system and Python's files read-only and nothing else of
the disk, one small writable directory in memory, no new processes, no signals to others. Memory, CPU time, wall time,
file size and open files are limited, output goes nowhere. It works for root and for ordinary users.

What it does not cover: faults of the kernel itself; programs that use the resources they are allowed (CPU of the
time limit, memory of the limit times the workers); and a program that sets out to fool its own test, e.g. by
patching what the test calls. Benchmarks count that as passed everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .jail import SETUP_FAILED, STARTED, WRITABLE

JAIL = Path(__file__).with_name("jail.py")
REPORT_BYTES = 4096
"""Of what a program's process says about its end, no more is read."""
REASON_CHARACTERS = 400
START_SECONDS = 60.0
"""For starting the interpreter and building the namespaces, on a machine that is busy."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 20.0
    """CPU time (the paper's limit for HumanEval+ is 20 s): a busy machine fails nothing that an idle one passes."""
    wall_factor: float = 6.0
    """Wall time, in units of ``seconds``: for programs that wait."""
    memory_bytes: int = 4 << 30
    """Address space."""
    file_bytes: int = 16 << 20
    """Size of one file."""
    tmp_bytes: int = 64 << 20
    """All files together."""
    open_files: int = 64
    threads: int = 64


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end, and if not, why: the exception, ``time limit``, ``memory``, a signal."""

    passed: bool
    reason: str


class Sandbox:
    """Runs programs.

    Args:
        limits: for each program.
        isolated: False gives up the namespaces and keeps the limits: only for programs that are trusted.
    Raises:
        UserError: this machine cannot isolate programs.
    """

    def __init__(self, limits: Limits | None = None, *, isolated: bool = True) -> None:
        self.limits, self.isolated = limits or Limits(), isolated
        problem = self._probe()
        if problem:
            what = "cannot isolate programs" if isolated else "cannot run programs"
            raise UserError(
                f"this machine {what}: {problem}. Model-written code is not run without isolation; use Linux 5.12 or "
                "newer with user namespaces (in Docker: --security-opt seccomp=unconfined), or, on a machine that "
                "holds nothing of value, --allow-unsandboxed"
            )

    def run(self, program: str) -> Verdict:
        """Run one program to its end or its limits."""
        nonce = secrets.token_hex(16)
        read, write = os.pipe()
        with tempfile.TemporaryDirectory(prefix="rasa-eval-") as directory:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(JAIL)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[write],
                start_new_session=True,
                cwd="/" if self.isolated else directory,
                env=ENVIRONMENT if self.isolated else ENVIRONMENT | {"HOME": directory, "TMPDIR": directory},
            )
            os.close(write)
            try:
                return self._judge(process, read, nonce, self._request(program, nonce, write))
            finally:
                _kill(process)
                while _read(read, REPORT_BYTES, time.monotonic() + START_SECONDS):
                    pass  # until the program is dead as well, which holds the other end
                os.close(read)

    def run_all(self, programs: Iterable[str], workers: int | None = None) -> Iterator[Verdict]:
        """Verdicts in the order of the programs; ``workers`` at a time (default: one a core)."""
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            yield from pool.map(self.run, programs)

    def _judge(self, process: subprocess.Popen[bytes], read: int, nonce: str, request: bytes) -> Verdict:
        assert process.stdin and process.stderr
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.close()
        too_long = Verdict(False, f"time limit of {self.limits.seconds:g} s")
        started = _read(read, len(STARTED), time.monotonic() + START_SECONDS)
        deadline = time.monotonic() + self.limits.seconds * self.limits.wall_factor
        report = _read(read, REPORT_BYTES, deadline) if started else b""
        if report is None:
            return too_long
        if report == nonce.encode():
            return Verdict(True, "passed")
        if report:
            said = report.decode(errors="replace")[:REASON_CHARACTERS]
            return Verdict(False, "memory limit" if said.startswith("MemoryError") else said)
        try:
            code = process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            return too_long
        if not started:
            why = process.stderr.read(REPORT_BYTES).decode(errors="replace").strip()
            raise _NoSandbox(why if code == SETUP_FAILED else f"{why} (exit code {code})")
        if code in (-signal.SIGKILL, -signal.SIGXCPU, 128 + signal.SIGKILL, 128 + signal.SIGXCPU):
            return too_long
        return Verdict(False, "ended before its last statement" if 0 <= code < 128 else f"crashed, exit code {code}")

    def _request(self, program: str, nonce: str, result_fd: int) -> bytes:
        limits = self.limits
        request: dict[str, Any] = {
            "program": program,
            "nonce": nonce,
            "result_fd": result_fd,
            "isolated": self.isolated,
            "readable": READABLE,
            "sys_path": PACKAGES,
            "tmp_bytes": limits.tmp_bytes,
            "limits": {
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_CPU": max(int(limits.seconds), 1),
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_CORE": 0,
                **({"RLIMIT_NPROC": limits.threads} if self.isolated else {}),
            },
        }
        return json.dumps(request).encode()

    def _probe(self) -> str | None:
        """What is missing here, or None: a program that must end well, and one that must be kept from everything."""
        if self.isolated and sys.platform != "linux":
            return f"namespaces are Linux's, this is {sys.platform}"
        try:
            verdict = self.run(_PROBE if self.isolated else "pass")
        except (_NoSandbox, OSError) as error:
            return str(error)
        return None if verdict.passed else verdict.reason


class _NoSandbox(Exception):
    pass


_PROBE = """
import os, socket
def refused(action):
    try:
        action()
    except OSError:
        return True
    return False
assert refused(socket.socket), "sockets can be opened"
assert refused(os.fork), "processes can be started"
assert refused(lambda: open("/probe", "w")), "the disk can be written"
assert os.getpid() == 1, "other processes can be seen"
open("probe", "w").close()
"""

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": WRITABLE,
    "TMPDIR": WRITABLE,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")},
}
"""Nothing of ours: tokens and keys live in environments."""

PACKAGES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
READABLE = sorted({*PACKAGES, sys.prefix, sys.base_prefix} - {"/", "/usr"})


def _read(pipe: int, most: int, deadline: float) -> bytes | None:
    """What is written to the pipe, up to ``most`` bytes or until its last writer is gone; None if it takes longer."""
    report = b""
    while len(report) < most:
        if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
            return None
        chunk = os.read(pipe, most - len(report))
        if not chunk:
            break
        report += chunk
    return report


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The group first; what left it dies with its parent, and the namespace with its first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()
