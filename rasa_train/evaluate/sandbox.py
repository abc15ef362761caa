"""Run programs that a model wrote, where they can do no harm (``jail`` is the inside of the sandbox).

On Linux 5.12 or newer each program is a process of its own in new user, mount, PID, network, IPC and UTS namespaces,
as an unprivileged user without capabilities: it has no network, sees only the system's and Python's files of the disk,
read-only, has one small writable directory in memory, and cannot start processes or signal others. Memory, CPU time,
wall time, file size and open files are limited, and output is discarded. This works for root and for ordinary users.

A program's test runs in a second such process, which never runs the program's code and gets its results as plain data.
Patching what the test calls, finding what the test expects, or returning an object that is equal to everything
therefore does not help a program.

The sandbox does not cover: faults of the kernel itself; and programs that use up the resources they are allowed (CPU up
to the time limit, memory up to the limit times the number of workers).
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
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import process
from ..errors import UserError
from ..io.scratch import scratch_directory
from .jail import SETUP_FAILED, STARTED, WRITABLE

JAIL = Path(__file__).with_name("jail.py")
MODULES = str(JAIL.parent)
REPORT_BYTES = 4096
"""Most bytes that are read of a process's report on its end."""
REASON_CHARACTERS = 400
"""Length to which the reason in a verdict is cut."""
START_SECONDS = 60.0
"""Time limit for starting the interpreter and building the namespaces, enough on a busy machine."""


@dataclass(frozen=True)
class Limits:
    """Resources that one program may use."""

    seconds: float = 20.0
    """CPU time (the paper's limit for HumanEval+ is 20 s), so that programs do not fail because the machine is busy."""
    wall_factor: float = 6.0
    """Wall time in units of ``seconds``, which ends programs that wait."""
    memory_bytes: int = 4 << 30
    """Address space of the program. Its test has half of it more, in its own process."""
    file_bytes: int = 16 << 20
    """Size of one file."""
    tmp_bytes: int = 64 << 20
    """Size of all files together."""
    open_files: int = 64
    threads: int = 64


@dataclass(frozen=True)
class Program:
    """A program that a model wrote, and its test."""

    source: str
    prompt: str = ""
    """The problem's own text, which may define what the test calls besides the program."""
    test: str = ""
    """Defines ``check``, which is called with the program's function. Without a test, a program passes by ending."""
    entry_point: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end, and if not, the reason: an exception, a time or memory limit, or a signal."""

    passed: bool
    reason: str


class Sandbox:
    """Runs programs in isolation.

    Args:
        limits: resources for each program.
        isolated: False drops the namespaces and keeps the limits, for trusted programs only.
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

    def run(self, program: Program | str) -> Verdict:
        """Run one program and its test until they end or exceed their limits. Text is a program without a test."""
        program = Program(program) if isinstance(program, str) else program
        nonce = secrets.token_hex(16)
        read, write = os.pipe()
        with scratch_directory("eval") as directory:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(JAIL)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[write],
                start_new_session=True,
                cwd="/" if self.isolated else directory,
                env=ENVIRONMENT if self.isolated else ENVIRONMENT | {"HOME": str(directory), "TMPDIR": str(directory)},
            )
            os.close(write)
            try:
                return self._judge(process, read, nonce, self._request(program, nonce, write))
            finally:
                _kill(process)
                while _read(read, REPORT_BYTES, time.monotonic() + START_SECONDS):
                    pass  # wait until the program is dead too: it holds the other end of the pipe
                os.close(read)

    def run_all(self, programs: Iterable[Program | str], workers: int | None = None) -> Iterator[Verdict]:
        """Yield verdicts in the order of the programs, running ``workers`` at a time (default: one per core). Programs
        are taken as they are needed, a few ahead of the verdicts."""
        count, begun = workers or process.cores(), deque[Future[Verdict]]()
        with ThreadPoolExecutor(count) as pool:
            try:
                for program in programs:
                    begun.append(pool.submit(self.run, program))
                    if len(begun) > 2 * count:
                        yield begun.popleft().result()
                while begun:
                    yield begun.popleft().result()
            finally:
                for future in begun:
                    future.cancel()

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

    def _request(self, program: Program, nonce: str, result_fd: int) -> bytes:
        """Return what the jail reads: first what every process may know, after its length; then the test's part."""
        limits = self.limits
        request: dict[str, Any] = {
            "program": program.source,
            "prompt": program.prompt,
            "modules": MODULES,
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
        task = {"nonce": nonce, "test": program.test, "entry_point": program.entry_point}
        first = json.dumps(request).encode()
        return len(first).to_bytes(8, "big") + first + json.dumps(task).encode()

    def _probe(self) -> str | None:
        """Return why this machine cannot run programs, or None if it can. With isolation the probe is a program that
        checks that it is kept from everything; without, it is one that does nothing."""
        if self.isolated and sys.platform != "linux":
            return f"namespaces exist only on Linux, and this is {sys.platform}"
        try:
            verdict = self.run(_PROBE if self.isolated else "pass")
        except (_NoSandbox, OSError) as error:
            return str(error)
        return None if verdict.passed else verdict.reason


class _NoSandbox(Exception):
    """The process could not start or could not build the sandbox."""


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
"""Environment of every program. Nothing of our own environment is passed on, because it may hold tokens and keys."""

PACKAGES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
READABLE = sorted({*PACKAGES, sys.prefix, sys.base_prefix} - {"/", "/usr"})


def _read(pipe: int, most: int, deadline: float) -> bytes | None:
    """Return the bytes written to the pipe, up to ``most`` or until the last writer is gone; None if the deadline comes
    first."""
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
    """Kill the process group. A process that left the group dies with its parent, and a namespace with its first
    process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()
