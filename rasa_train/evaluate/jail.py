"""Run one program where it can do no harm: the inside of the sandbox, which ``sandbox`` starts as a separate script.

Only the standard library is imported, and of the package only ``values`` and ``peers``, by their path: the program can
reach every module imported here.

    program on stdin (JSON)  ->  J, this process, which stays outside
                                 A, in new user, mount, PID, network, IPC and UTS namespaces
    test on stdin (JSON)     ->  C, process 1 of the namespace: builds its root, drops all rights, runs the test
                                 D, process 1 of a PID namespace of its own: drops all rights, runs the program

D is started before C reads the test, and cannot see C. C asks D for what the test calls, and writes the verdict to the
result pipe: the nonce once the test's last statement was reached, or the exception. A program that ends its process
early, by whatever means, therefore does not pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

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
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
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
# access to other processes, mounts, and kernel interfaces with a history of vulnerabilities; in the last two lines
# memory that the limit of address space does not count: System V's shared memory, semaphores and messages, files in
# memory, message queues, and pages that are given to a pipe. Threads are allowed.
DENIED = {
    "x86_64": (
        62, 200, 129, 297, 424,
        41, 53, 57, 58, 59, 322, 101, 310, 311, 434, 438, 165, 166, 155, 161, 272, 308, 428, 429, 430, 442,
        321, 248, 249, 250, 298, 323, 425, 175, 313, 246, 317, 312, 426, 427, 300, 440, 447,
        29, 30, 31, 67, 64, 65, 66, 220, 68, 69, 70, 71,
        319, 240, 242, 278,
    ),
    "aarch64": (
        129, 130, 138, 240, 424,
        198, 199, 221, 281, 117, 270, 271, 434, 438, 40, 39, 41, 51, 97, 268, 428, 429, 430, 442,
        280, 217, 218, 219, 241, 282, 425, 105, 273, 104, 277, 272, 426, 427, 262, 440, 447,
        194, 195, 196, 197, 190, 191, 192, 193, 186, 187, 188, 189,
        279, 180, 182, 75,
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
    request = json.loads(read_exactly(int.from_bytes(read_exactly(8), "big")))
    result = request["result_fd"]
    sys.path.insert(0, request["modules"])
    modules = [importlib.import_module(name) for name in ("values", "peers")]
    del sys.path[0], sys.modules["values"], sys.modules["peers"]
    die_with_parent()
    if not request["isolated"]:
        run(request, result, *modules)
    entered, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        setting_up(lambda: enter(entered[1], mapped[0]))
        inner = os.fork()
        if inner == 0:
            setting_up(lambda: settle(request))
            run(request, result, *modules)
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


def leave(status: int) -> NoReturn:
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
    """Set up C: build its root directory."""
    die_with_parent()
    build_root(request["readable"], request["tmp_bytes"])


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


def run(request: dict[str, Any], result: int, values: Any, peers: Any) -> NoReturn:
    """Start D, read the test, run it on the program in D, write the verdict, and exit."""
    sys.path += request["sys_path"]
    limits, isolated = request["limits"], request["isolated"]
    down, up = os.pipe(), os.pipe()
    if isolated:
        setting_up(lambda: call("unshare", libc.unshare(NEW_PID)))
    child = os.fork()
    if child == 0:
        try:
            setting_up(lambda: confine(isolated))
            silence()
            pipes = keep(down[0], up[1])
            limit(limits)
            os.write(pipes[1], STARTED)
            peer = peers.Peer(values.Codec, pipes, request["prompt"], lambda why: os._exit(0))
            peers.hold_program(peer, request["program"])
        finally:
            os._exit(1)
    prompt = request["prompt"]
    request.clear()
    os.close(down[0])
    os.close(up[1])
    setting_up(lambda: confine(isolated))
    task = json.loads(sys.stdin.buffer.read())
    silence()
    limit(limits | {"RLIMIT_AS": limits["RLIMIT_AS"] // 2})

    def say(text: str) -> NoReturn:
        os.write(result, text.encode(errors="replace"))
        os._exit(0 if text == task["nonce"] else 1)

    def fail(why: str | None) -> NoReturn:
        if why:
            say(why)
        leave(os.waitpid(child, 0)[1])

    peer = peers.Peer(values.Codec, (up[0], down[1]), prompt, fail, hostile=True)
    if not os.read(up[0], 1):
        leave(os.waitpid(child, 0)[1])
    os.write(result, STARTED)
    try:
        peers.check(peer, prompt, task["test"], task["entry_point"])
    except BaseException as error:
        say(peers.reason(peer, error))
    say(task["nonce"])


def confine(isolated: bool) -> None:
    """Give up all rights, for good, and keep other processes of the user from reading this one's memory."""
    die_with_parent()
    if isolated:
        drop_rights()
        die_with_parent()  # again, because the change of user has undone it
        refuse_system_calls()
    if sys.platform == "linux":
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def limit(limits: dict[str, int]) -> None:
    """Limit the resources of this process."""
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        with contextlib.suppress(ValueError, OSError):  # macOS does not support RLIMIT_AS properly
            resource.setrlimit(number, (value, value) if hard < 0 else (min(value, hard),) * 2)


def keep(*descriptors: int) -> tuple[int, ...]:
    """Close all descriptors but the standard ones and those given, which become the first after them."""
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 100) for number in descriptors]
    os.closerange(3, 100)
    kept = tuple(fcntl.fcntl(number, fcntl.F_DUPFD, 3) for number in high)
    os.closerange(100, 1000)
    return kept


def read_exactly(size: int) -> bytes:
    """Read from stdin without reading ahead: what follows is not for every process."""
    data = b""
    while len(data) < size and (chunk := os.read(0, size - len(data))):
        data += chunk
    return data


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
