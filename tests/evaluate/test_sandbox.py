"""Programs that try to get out, or to hold everything up: each is kept in, and counts as failed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rasa_train.errors import UserError
from rasa_train.evaluate import sandbox as sandbox_module
from rasa_train.evaluate.sandbox import Limits, Sandbox

PACKAGE = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(Limits(seconds=1, wall_factor=2))
    except UserError as error:
        pytest.skip(str(error))


def test_a_program_that_ends_well_passes(sandbox: Sandbox) -> None:
    program = "import math, tempfile\nprint(math.pi)\ntempfile.TemporaryFile().write(b'x')\nassert 1 + 1 == 2"
    assert sandbox.run(program).passed


def test_packages_and_threads_are_there(sandbox: Sandbox) -> None:
    thread = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()"
    assert sandbox.run(f"import numpy\nassert numpy.ones(3).sum() == 3\n{thread}").passed


PLANTED = {
    "infinite loop": ("while True:\n    pass", "time limit"),
    "sleep": ("import time\ntime.sleep(1000)", "time limit"),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "PermissionError"),
    "fork bomb that goes on": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "time limit",
    ),
    "another program": ("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])", "PermissionError"),
    "10 GB": ("x = bytearray(10 * 1000**3)", "memory limit"),
    "disk": ("open('big', 'wb').write(bytes(10**8))", "OSError"),
    "socket": ("import socket\nsocket.socket()", "PermissionError"),
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "kill everything": ("import os\nos.kill(-1, 9)", "PermissionError"),
    "garbage": ("while True:\n    print('x' * 100_000)", "time limit"),
    "garbage into every descriptor": (
        "import os\nfor fd in range(1, 40):\n    try:\n        os.write(fd, b'z' * 10**7)\n"
        "    except OSError:\n        pass",
        "",
    ),
    "early exit": ("import sys\nsys.exit(0)\nassert False", "SystemExit"),
    "very early exit": ("import os\nos._exit(0)\nassert False", "ended before"),
    "crash": ("import ctypes\nctypes.string_at(0)", "crashed"),
    "recursion": ("def f():\n    f()\nf()", "RecursionError"),
    "wrong": ("assert 1 == 2", "AssertionError"),
    "no program": ("def (", "SyntaxError"),
    "shared memory": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nfor _ in range(40):\n"
        "    n = c.shmget(0, 1 << 28, 0o1600)\n    if n < 0:\n        raise OSError(ctypes.get_errno(), 'refused')",
        "PermissionError",
    ),
    "files in memory": (
        "import os\nwhile True:\n    os.write(os.memfd_create('x'), bytes(1 << 24))",
        "PermissionError",
    ),
    "a message queue": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "if c.mq_open(b'/x', 0o102, 0o600, None) < 0:\n    raise OSError(ctypes.get_errno(), 'refused')",
        "PermissionError",
    ),
    "pages that are given to pipes": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nb = ctypes.create_string_buffer(9)\n"
        "v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 9)\n"
        "if c.vmsplice(os.pipe()[1], v, 1, 0) < 0:\n    raise OSError(ctypes.get_errno(), 'refused')",
        "PermissionError",
    ),
    "shared pages": (
        "import mmap\nkept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 1 << 30))",
        "",
    ),
    "reads the password file": ("open('/etc/passwd')", "FileNotFoundError"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_failures_are_contained(sandbox: Sandbox, name: str) -> None:
    program, reason = PLANTED[name]
    started = time.monotonic()
    verdict = sandbox.run(program)
    assert not verdict.passed and reason in verdict.reason, verdict
    assert len(verdict.reason) <= 500, "a reason is short, whatever the program writes"
    assert time.monotonic() - started < sandbox_module.START_SECONDS


def test_nothing_outside_is_written(sandbox: Sandbox, tmp_path: Path) -> None:
    target = tmp_path / "written"
    for path in (target, "/usr/written", "/written", Path(sys.prefix) / "written"):
        assert not sandbox.run(f"open({str(path)!r}, 'w').write('x')").passed
        assert not Path(path).exists()


def test_no_process_is_left(sandbox: Sandbox) -> None:
    mark = "rasa-eval-test-mark"
    program = f"import os, ctypes\nctypes.CDLL(None).prctl(15, b'{mark[:15]}')\nos.setsid()\nwhile True:\n    pass"
    assert not sandbox.run(program).passed
    deadline = time.monotonic() + 30  # for the kernel to take the dead process off its list
    while mark[:15] in _process_names() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert mark[:15] not in _process_names()


def _process_names() -> set[str]:
    names = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            names.add(path.read_text().strip())
    return names


def test_the_environment_stays_outside(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert sandbox.run("import os\nassert 'HF_TOKEN' not in os.environ").passed


def test_verdicts_come_in_the_order_of_the_programs(sandbox: Sandbox) -> None:
    programs = ["import time\ntime.sleep(0.5)", "assert False", "pass"]
    assert [v.passed for v in sandbox.run_all(programs, workers=3)] == [True, False, True]


def test_programs_are_taken_as_they_are_needed(sandbox: Sandbox) -> None:
    """A million samples do not have to be in memory at once."""
    taken = itertools.count()
    verdicts = sandbox.run_all(("pass" for _ in iter(lambda: next(taken), 1000)), workers=1)
    assert next(verdicts).passed and next(taken) <= 5


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists() or not shutil.which("setpriv"), reason="no system Python")
def test_works_for_an_ordinary_user(sandbox: Sandbox, tmp_path: Path) -> None:
    code = tmp_path / "rasa_train"
    for name in ("evaluate", "io"):
        shutil.copytree(PACKAGE / "rasa_train" / name, code / name, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("__init__.py", "errors.py", "process.py"):
        shutil.copy(PACKAGE / "rasa_train" / name, code)
    script = (
        "from rasa_train.evaluate.sandbox import Limits, Sandbox\n"
        "s = Sandbox(Limits(seconds=1))\n"
        "print([s.run(p).passed for p in ('pass', 'import socket; socket.socket()', 'import os; os.fork()',\n"
        '  \'open("/usr/x", "w")\')])'
    )
    for directory in (tmp_path, *tmp_path.parents):
        if str(directory).startswith("/tmp/"):
            directory.chmod(0o755)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", script],
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[True, False, False, False]", done.stderr


def test_no_isolation_is_refused_and_can_be_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "jail.py"
    source = sandbox_module.JAIL.read_text()
    broken.write_text(source.replace('call("unshare", libc.unshare(', 'call("unshare", 1 or libc.unshare('))
    assert broken.read_text() != source
    monkeypatch.setattr(sandbox_module, "JAIL", broken)
    with pytest.raises(UserError, match=r"cannot isolate programs: unshare: .*--allow-unsandboxed"):
        Sandbox()
    unsandboxed = Sandbox(Limits(seconds=2), isolated=False)
    assert unsandboxed.run("pass").passed
    assert unsandboxed.run("x = bytearray(10 * 1000**3)").reason == "memory limit"
