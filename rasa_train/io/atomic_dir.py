"""A directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .atomic import remove

KEY = ".key"
"""Name of the file in an unfinished directory that holds the ``key`` of its content."""


@contextmanager
def new_directory(
    output: Path, *, overwrite: bool, inputs: Sequence[Path], nbytes: int, key: str = ""
) -> Iterator[Path]:
    """Yield a temporary directory beside ``output``; when the block ends without an error, it becomes ``output``.

    An error removes the temporary directory. A killed process leaves it behind as ``.NAME.partial-PID``: the next
    process continues in it if its ``key`` is the same, and removes it otherwise. Hidden files in the temporary
    directory do not become part of ``output``.

    Args:
        overwrite: replace an ``output`` that has files.
        inputs: directories that are read: ``output`` must not lie in one of them or contain one of them.
        nbytes: least number of bytes that will be written, so that a disk that is too small is found before the work.
        key: string that depends on everything that decides the content. Empty: unfinished work is never continued.
    Raises:
        UserError: ``output`` is refused or cannot be written.
    """
    output = Path(os.path.abspath(output)).resolve()
    _check(output, overwrite, inputs)
    parents = [parent for parent in output.parents if not parent.exists()]
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    lock, ours = None, False
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = _settle_stale(output, partial, key)
        ours = lock is not None
        there = sum(path.stat().st_size for path in partial.iterdir()) if ours else 0
        free = shutil.disk_usage(output.parent).free
        if free < nbytes - there:
            raise UserError(
                f"cannot write {output}: it needs {size(nbytes - there)}, but the disk has only {size(free)} free"
            )
        if not ours:
            partial.mkdir()
            ours = True
            lock = _lock(partial)
            (partial / KEY).write_text(key)
        yield partial
        for hidden in partial.glob(".*"):
            hidden.unlink()
        _sync(partial)
        _become(partial, output)
    except BaseException as error:
        if ours:  # a process of another machine on the same disk can have our process id
            shutil.rmtree(partial, ignore_errors=True)
        for parent in parents:  # innermost first; a parent that another process uses by now is not empty
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {output}: {error.strerror or error} (nothing was left there)") from None
        raise
    finally:
        if lock is not None:
            os.close(lock)


def size(nbytes: float) -> str:
    """Return a number of bytes as text such as ``1.5 GB``, in decimal units, in which disks are sold."""
    if nbytes < 1000:
        return f"{nbytes:.0f} bytes"
    units = ["kB", "MB", "GB", "TB"]
    while (nbytes := nbytes / 1000) >= 1000 and len(units) > 1:
        del units[0]
    return f"{nbytes:.1f} {units[0]}"


def _check(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    for used in (path.resolve() for path in inputs):
        if output == used or used in output.parents or output in used.parents:
            raise UserError(
                f"--output {output} must not lie in {used} or contain it, because that directory is read: give another "
                "directory"
            )
    try:
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output} is a file; it must be a new or empty directory")
        content = {path.name for path in output.iterdir()} if output.is_dir() else set()
    except OSError as error:
        raise UserError(f"--output {output} cannot be read: {error.strerror}") from None
    if content and not overwrite:
        raise UserError(f"--output {output} is not empty: give another directory, or --overwrite to replace it")
    # --overwrite deletes: a mistyped path must not cost somebody's home directory.
    if content and not content & {"config.json", "adapter_config.json"}:
        raise UserError(
            f"--output {output} has files but is not a model or adapter, so --overwrite does not replace it"
        )


def _settle_stale(output: Path, partial: Path, key: str) -> int | None:
    """Clean up what a killed merge into the same directory left, and undo a replacement that was interrupted.

    Returns:
        The lock of ``partial``, to which unfinished work with the same ``key`` has been moved; None if there is none.
    """
    name = glob.escape(output.name)
    for trash in output.parent.glob(f".{name}.removed-*"):
        remove(trash)
    for replaced in output.parent.glob(f".{name}.replaced-*"):
        if output.exists():
            _discard(replaced, output)
        else:
            replaced.rename(output)
    found = None
    for stale in output.parent.glob(f".{name}.partial-*"):
        if stale.is_symlink() or not stale.is_dir():
            remove(stale)
            continue
        lock = _lock(stale)
        whole = not any(path.is_symlink() for path in stale.rglob("*"))  # files are written where a link leads
        whole = whole and stale.stat().st_uid == os.geteuid()  # whoever made it chose what is in it
        if found is None and lock is not None and key and whole and _read_key(stale) == key:
            found = lock
            if stale != partial:
                stale.rename(partial)
            continue
        try:
            shutil.rmtree(stale)
        finally:
            if lock is not None:
                os.close(lock)
    return found


def _read_key(directory: Path) -> str:
    try:
        return (directory / KEY).read_text()
    except OSError:
        return ""


def _lock(directory: Path) -> int | None:
    """Lock a directory until the returned descriptor is closed or the process ends. None: the disk has no locks."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another merge is writing the same output: it has locked {directory}") from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _become(partial: Path, output: Path) -> None:
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    if output.exists() and any(output.iterdir()):
        output.rename(replaced)
    try:
        partial.rename(output)
    except OSError:
        if replaced.exists():
            replaced.rename(output)
        raise
    parent = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    if replaced.exists():
        _discard(replaced, output)


def _discard(replaced: Path, output: Path) -> None:
    """Remove the directory that ``output`` has replaced, after renaming it: if the process is killed here,
    ``_settle_stale`` must not restore a directory that is half removed."""
    trash = output.with_name(f".{output.name}.removed-{os.getpid()}")
    replaced.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
