"""Run one program where it can do no harm: the inside of the sandbox, which ``sandbox`` starts as a separate script.

Only the standard library is imported, and nothing of the package: the program can reach every module imported here.

    request on stdin (JSON)  ->  J, this process, which stays outside
                                 A, in new user, mount, PID, network, IPC and UTS namespaces
                                 C, process 1 of the namespace: builds its root, drops all rights, runs the program

C writes the verdict to the result pipe: the request's nonce once the last statement of the program was reached, or the
exception. A program that ends its process early, by whatever means, therefore does not pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW_USER, NEW_NS, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS = (
    0x10000000,
    0x00020000,
    0x20000000,
    0x40000000,
    0x08000000,
    0x04000000,
)
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV, MS_RDONLY, MS_REMOUNT = 4096, 16384, 1 << 18, 2, 4, 1, 32
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
NOBODY = 65534
WRITABLE = "/sandbox"
"""Directory in which the program runs, the only one that it can write to."""
STARTED = b"."
"""First byte of the report, written when the program begins."""
SETUP_FAILED = 97
"""Exit code when the sandbox could not be built; stderr says why."""

SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

# Numbers of the system calls that are refused (EPERM): signals to processes, sockets, new processes and programs,
# access to other processes, mounts, and kernel interfaces with a history of vulnerabilities. Threads are allowed.
DENIED = {
    "x86_64": (
        62, 200, 129, 297,
        41, 53, 57, 58, 59, 322, 101, 310, 311, 434, 438, 165, 166, 155, 161, 272, 308, 428, 429, 430, 442,
        321, 248, 249, 250, 298, 323, 425, 175, 313, 246, 317,
    ),
    "aarch64": (
        129, 130, 138, 240,
        198, 199, 221, 281, 117, 270, 271, 434, 438, 40, 39, 41, 51, 97, 268, 428, 429, 430, 442,
        280, 217, 218, 219, 241, 282, 425, 105, 273, 104, 277,
    ),
}  # fmt: skip
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3, MOUNT_SETATTR = 435, 442  # the same on both architectures
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_THREAD = 0x00010000

libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """The kernel does not provide what the sandbox needs."""


def main() -> None:
    """Run J: start A, write A's user ids, wait for A to end."""
    request = json.loads(sys.stdin.buffer.read())
    result = request["result_fd"]
    die_with_parent()
    if not request["isolated"]:
        run(request, result)
    entered, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        setting_up(lambda: enter(entered[1], mapped[0]))
        inner = os.fork()
        if inner == 0:
            setting_up(lambda: settle(request))
            run(request, result)
        os.close(result)
        leave(os.waitpid(inner, 0)[1])
    os.close(result)
    os.close(entered[1])
    if os.read(entered[0], 1):
        setting_up(lambda: write_id_maps(child))
        os.write(mapped[1], b"x")
    leave(os.waitpid(child, 0)[1])


def setting_up(step: Callable[[], None]) -> None:
    """Run a step of the set-up. If it fails, write the reason to stderr and exit with ``SETUP_FAILED``."""
    try:
        step()
    except (OSError, SetupError) as error:
        os.write(2, f"{error}\n".encode())
        os._exit(SETUP_FAILED)


def leave(status: int) -> None:
    """Exit with the child's exit code, or with 128 + N if signal N killed the child."""
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def enter(entered: int, mapped: int) -> None:
    """Set up A: enter the new namespaces, then wait until J has written the user ids, because only a process outside
    may map more than one id."""
    die_with_parent()
    call("unshare", libc.unshare(NEW_USER | NEW_NS | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS))
    die_with_parent()  # again, because the new capabilities have undone it
    os.write(entered, b"x")
    if not os.read(mapped, 1):
        raise SetupError("user ids could not be mapped")


def write_id_maps(pid: int) -> None:
    """Map user and group ids: root is mapped, to build the inner root, and so is nobody, to run the program; any other
    user maps only their own id."""
    uid, gid = os.geteuid(), os.getegid()
    process = Path(f"/proc/{pid}")
    if uid != 0:
        (process / "setgroups").write_text("deny")
    for name, own in (("uid_map", uid), ("gid_map", gid)):
        extra = f"{NOBODY} {NOBODY} 1\n" if uid == 0 else ""
        (process / name).write_text(f"{own} {own} 1\n{extra}")


def settle(request: dict[str, Any]) -> None:
    """Set up C: build its root directory and give up all rights."""
    die_with_parent()
    build_root(request["readable"], request["tmp_bytes"])
    drop_rights()
    die_with_parent()  # again, because the change of user has undone it
    refuse_system_calls()


def build_root(readable: list[str], tmp_bytes: int) -> None:
    """Make the root a tmpfs into which the system's and Python's files are bound, read-only, with one empty writable
    directory. There is no /proc, /home or /tmp, and of /etc only the loader's cache and the local time zone."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = "/tmp" if os.path.isdir("/tmp") else "/mnt"
    # A bound path may lie below the directory that the new root covers, so it is opened before the mount.
    sources = {path: os.open(path, os.O_PATH) for path in (*SYSTEM, *DEVICES, *readable) if os.path.exists(path)}
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path, source in sources.items():
        bind(source, root + path)
        os.close(source)
    for name in (WRITABLE, "/old"):
        os.makedirs(root + name, exist_ok=True)
    options = f"size={tmp_bytes},nr_inodes=4096,mode=1777"
    mount("tmpfs", f"{root}{WRITABLE}", "tmpfs", MS_NOSUID | MS_NODEV, options)
    call("pivot_root", libc.syscall(PIVOT_ROOT[machine()], root.encode(), f"{root}/old".encode()))
    os.chdir("/")
    call("umount2", libc.umount2(b"/old", MNT_DETACH))
    os.rmdir("/old")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)
    os.chdir(WRITABLE)


PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def bind(source: int, target: str) -> None:
    if os.path.lexists(target):
        return  # inside a directory that is bound already
    held = f"/proc/self/fd/{source}"
    if os.path.isdir(held):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    mount(held, target, None, MS_BIND | MS_REC)
    if not target.endswith(DEVICES):
        # struct mount_attr {set, clear, propagation, userns}: read-only, no set-uid, with all mounts below
        attributes = ctypes.create_string_buffer(struct.pack("4Q", 1 | 2, 0, 0, 0), 32)
        done = libc.syscall(MOUNT_SETATTR, -100, target.encode(), 0x8000, attributes, ctypes.c_size_t(32))
        call(f"mount_setattr {target} (Linux 5.12 or newer)", done)


def drop_rights() -> None:
    """Become nobody if the user is root, drop all capabilities, and forbid gaining new ones by running a program."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
    call("capset", libc.capset(header, ctypes.create_string_buffer(24)))
    call("no_new_privs", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def refuse_system_calls() -> None:
    """Install a seccomp filter that refuses the system calls in ``DENIED``."""
    arch = machine()
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x00050001, 0x00050026  # allow, EPERM, ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[arch]), (give, 0, 0, refuse), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # the x32 numbers
    for number in DENIED[arch]:
        code += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    # A filter cannot see the flags of clone3. It reports clone3 as unknown, so that libc falls back to clone.
    code += [(equal, 0, 1, CLONE3), (give, 0, 0, unknown)]
    code += [(equal, 0, 3, CLONE[arch]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), (give, 0, 0, refuse)]
    code += [(give, 0, 0, allow)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters)), 16)
    call("seccomp", libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0))


def run(request: dict[str, Any], result: int) -> None:
    """Limit this process, run the program in it, write the verdict, and exit."""
    silence()
    for name, value in request["limits"].items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        with contextlib.suppress(ValueError, OSError):  # macOS does not support RLIMIT_AS properly
            resource.setrlimit(number, (value, value) if hard < 0 else (min(value, hard),) * 2)
    sys.path += request["sys_path"]
    nonce, program = request["nonce"], request["program"]
    request.clear()
    os.write(result, STARTED)
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        line = getattr(error.__traceback__.tb_next if error.__traceback__ else None, "tb_lineno", None)
        where = f" (line {line})" if line else ""
        os.write(result, f"{type(error).__name__}: {str(error)[:300]}{where}".encode(errors="replace"))
        os._exit(1)
    os.write(result, nonce.encode())
    os._exit(0)


def silence() -> None:
    """Redirect stdin, stdout and stderr to /dev/null."""
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)


def die_with_parent() -> None:
    """Ask the kernel, on Linux, to kill this process when its parent ends."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [value.encode() if value is not None else None for value in (source, target, kind, options)]
    call(f"mount {target}", libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]))


def call(what: str, returned: int) -> None:
    """Raise ``SetupError`` if a system call did not return 0."""
    if returned != 0:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")


def machine() -> str:
    arch = platform.machine()
    if arch not in DENIED:
        raise SetupError(f"no list of system calls for {arch}")
    return arch


if __name__ == "__main__":
    main()
