"""Standard streams that never end the work: what a terminal, a pipe or a log does not take is dropped."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

PLAIN = "rasa_train.plain"
"""Name of the error handler that writes what an encoding does not have: an ellipsis as dots, the rest as escapes."""
GONE = (errno.EPIPE, errno.EBADF, errno.EIO)
"""Errors of a stream that nobody reads any more: a pipe whose reader has ended, a closed stream, a terminal that is
gone."""


def guard() -> None:
    """Replace stdout and stderr by streams that never fail, and give closed ones to ``/dev/null``.

    A run of days must not end because its terminal is closed, its reader has gone (``| head``) or its log is on a full
    disk. The number of a closed stream must not go to a file either, or libraries would write their messages into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    codecs.register_error(PLAIN, _plain)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - for as long as the process lives
    sys.stdout = _guarded(1, sys.stdout, patience=10.0)
    sys.stderr = _guarded(2, sys.stderr, patience=1.0)


def lost() -> OSError | None:
    """Return why a part of the result did not reach stdout; None if all of it did, or if its reader has gone."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Output) else None
    return None if error is None or error.errno in GONE else error


class _Output(io.RawIOBase):
    """A file descriptor that takes everything, and forgets what it cannot write.

    Args:
        patience: seconds to wait for a reader that is slow, if the descriptor does not wait by itself.
    """

    def __init__(self, descriptor: int, name: str, patience: float) -> None:
        self.name, self.mode = name, "wb"
        self.error: OSError | None = None
        """The first error."""
        self._descriptor, self._patience, self._wait = descriptor, patience, patience

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
                self._wait = self._patience
            except BlockingIOError as error:
                if not self._room():
                    self._wait = 0.0  # until the reader wakes up, so that each message does not wait again
                    self.error = self.error or error
                    break
            except OSError as error:
                self.error = self.error or error
                break
        return size

    def _room(self) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(self._wait * 1000))


def _guarded(descriptor: int, old: TextIO | None, patience: float) -> TextIO:
    with suppress(OSError, ValueError, AttributeError):
        old.flush()  # type: ignore[union-attr]
    raw = _Output(descriptor, "<stdout>" if descriptor == 1 else "<stderr>", patience)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(old, "encoding", None) or "utf-8",
        errors=PLAIN,
        line_buffering=descriptor == 2 or raw.isatty(),
        write_through=bool(getattr(old, "write_through", False)),
    )


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and error.object[error.start] == "…":
        return "...", error.start + 1
    return codecs.backslashreplace_errors(error)
