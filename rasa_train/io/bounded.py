"""Work on what others wrote, in a child process whose memory and computing time are bounded."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, Self

from ..errors import UserError

_FRAME, _MOST = 1 << 20, 256  # bytes and items that are sent at a time
_PLAIN = frozenset({int, float, bool, type(None)})


class Exceeded(Exception):
    """The child needed too much ``memory`` or ``time``, or made an item that is too ``large``.

    ``done`` is the number of items that it had made before.
    """

    def __init__(self, what: Literal["memory", "time", "large"], done: int) -> None:
        super().__init__(what)
        self.what, self.done = what, done


class Child:
    """A fork of this process that answers requests, within bounds. Used as a context, it ends with it.

    Args:
        answer: called in the child with each request; returns the items of the answer one by one.
        memory: bytes that the child may use more than this process does now (Linux only).
        seconds: computing time for each item.
        largest: bytes of the largest item, as it is sent.
    """

    def __init__(self, answer: Callable[[Any], Iterable[Any]], *, memory: int, seconds: int, largest: int) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, far = context.Pipe()
        self._done = mmap.mmap(-1, 8)
        bounds = (memory, seconds, largest)
        self._process = context.Process(target=self._serve, args=(far, answer, bounds), daemon=True)
        self._process.start()
        far.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Any) -> Iterator[Any]:
        """Yield the items of the answer. Another request may follow when all of them have been taken.

        Raises:
            Exceeded: a bound was exceeded. The child has ended.
            UserError: ``answer`` raised it.
        """
        try:
            self._pipe.send(request)
            while (reply := self._pipe.recv())[0] == "items":
                yield from reply[1]
        except (EOFError, ConnectionError):  # killed, by the kernel or by a limit
            self._process.join()
            what: Any = "time" if self._process.exitcode == -signal.SIGXCPU else "memory"
            reply = (what, None)
        if reply[0] == "error":
            raise UserError(reply[1][0], key=reply[1][1])
        if reply[0] == "bug":
            raise RuntimeError(reply[1])
        if reply[0] != "end":
            self.close()
            raise Exceeded(reply[0], int.from_bytes(self._done[:], "little"))

    def close(self) -> None:
        """End the child, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _serve(self, pipe: Connection, answer: Callable[[Any], Iterable[Any]], bounds: tuple[int, int, int]) -> None:
        self._pipe.close()  # so that the end of the parent ends the child
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        memory, seconds, largest = bounds
        _limit_memory(memory)
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                request = pipe.recv()
                try:
                    reply = self._answer(pipe, answer(request), seconds, largest)
                except MemoryError:
                    reply = ("memory", None)
                except UserError as error:
                    reply = ("error", (str(error), error.key))
                except Exception:
                    reply = ("bug", traceback.format_exc())
                pipe.send(reply)

    def _answer(self, pipe: Connection, items: Iterable[Any], seconds: int, largest: int) -> tuple[str, Any]:
        frame: list[Any] = []
        size = 0
        iterator = iter(items)
        for number in range(1 << 62):
            self._done[:] = number.to_bytes(8, "little")
            _more_time(seconds)
            item = next(iterator, _END)
            if item is not _END:
                frame.append(item)
                size += weight(item)
            if item is _END or size >= _FRAME or len(frame) >= _MOST:
                for part in [frame] if size < _FRAME else ([one] for one in frame):
                    data = ForkingPickler.dumps(("items", part))
                    if len(data) > max(largest, 2 * _FRAME):
                        return "large", None
                    pipe.send_bytes(data)
                frame, size = [], 0
            if item is _END:
                break
        return "end", None


_END = object()


def weight(value: Any) -> int:
    """Return about the number of bytes that a value takes in memory, which JSON can hold."""
    total, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str | bytes):
            total += sys.getsizeof(value)
        elif isinstance(value, Mapping):
            total += 64
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list | tuple):
            total += 8 * len(value)
            if not _PLAIN.issuperset(map(type, value)):
                waiting += value
        else:
            total += 8
    return total


def _limit_memory(more: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # there is neither /proc nor such a limit on macOS
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _more_time(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
