"""The two programs in Java that come with pycocoevalcap: Stanford's Penn Treebank tokenizer, and METEOR 1.5."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from threading import Timer

PUNCTUATION = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""Tokens that coco-caption drops."""
SECONDS = 600
"""Time that each program may take."""


class JavaFailed(Exception):
    """Java is not here, or one of the programs did not do its work. The text says which, in a line."""


def treebank(texts: Sequence[str]) -> list[str]:
    """Return the lower-cased Penn Treebank tokens of each text (a single line) without punctuation, joined by spaces.

    Raises:
        JavaFailed: there is no Java, or the tokenizer failed.
    """
    jar = _package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    # The input is a file, because the tokenizer would wait on a pipe's other end while nobody reads its output.
    with tempfile.TemporaryFile() as file:
        file.write("".join(f"{text}\n" for text in texts).encode())
        file.seek(0)
        command = [_java(), "-Xmx1G", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
        try:
            done = subprocess.run(command, stdin=file, capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise JavaFailed(f"the tokenizer took more than {SECONDS} s") from None
    lines = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(lines) != len(texts):
        raise JavaFailed(f"the tokenizer failed: {_last_line(done.stderr) or f'{len(lines)} lines of {len(texts)}'}")
    return [" ".join(word for word in line.split() if word not in PUNCTUATION) for line in lines]


def meteor(truths: Mapping[int, list[str]], results: Mapping[int, list[str]]) -> tuple[float, list[float]]:
    """Return METEOR of all texts together and of each text.

    Args:
        truths: tokens of the references of each text, joined by spaces.
        results: tokens of each text, in a list of one.
    Raises:
        JavaFailed: there is no Java, or METEOR failed.
    """
    _java()
    from pycocoevalcap.meteor.meteor import Meteor

    program = Meteor()
    watch = Timer(SECONDS, program.meteor_p.kill)  # the library waits for an answer as long as there is a process
    watch.start()
    try:
        together, each = program.compute_score(truths, results)
    except (ValueError, OSError):  # no number, or a broken pipe: the process has ended
        why = _last_line(program.meteor_p.stderr.read()) or f"it ended, or took more than {SECONDS} s"
        raise JavaFailed(f"METEOR failed: {why}") from None
    finally:
        watch.cancel()
        if program.lock.locked():  # or the library's own destructor waits for it for ever
            program.lock.release()
    return float(together), [float(value) for value in each]


def _java() -> str:
    if (java := which("java")) is None:
        raise JavaFailed("needs Java, which is not installed here (on Debian: apt install default-jre-headless)")
    return java


def _package() -> Path:
    found = find_spec("pycocoevalcap")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
