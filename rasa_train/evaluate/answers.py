"""Decide whether two mathematical answers are the same, by the paper's rule and by a robust one.

``math_sympy``            the RaSA paper's rule: Minerva's normalisation (2206.14858, appendix D), then
                          ``simplify(parse_latex(a) - parse_latex(b)) == 0``. An answer that does not parse is wrong,
                          even when both are identical: intervals and most tuples score 0.
``math_sympy_or_string``  ``math_sympy``, or equal after the normalisation.
``accuracy``              the rule of ``answer_equality.py``, with units, sets, intervals, matrices, text.

Text of a model is parsed, never evaluated (of an answer, sympy's own ``eval`` sees the digits of its numbers, which are
a token of the grammar). A comparison may take forever or use all memory (``9^{9^{9^9}}``), in loops
that no signal interrupts; so separate processes compare the pairs, and are killed when they take too long. Their
verdicts depend neither on chance nor on earlier pairs: hashes and random numbers have a fixed seed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from types import FrameType, TracebackType

from .. import process
from ..errors import UserError
from .answer_equality import equal

MARKER = "The answer is: "
RESPONSE = "### Response:\n"
SECONDS = 5
"""CPU time of one comparison by one rule. The reference implementation has the same limit by the clock."""
MEMORY_BYTES = 1 << 30
"""Address space of a comparing process."""
LONGEST = 1000
"""Characters of the longest answer, and of the longest gold answer, that is compared; a longer one is wrong."""


@dataclass(frozen=True)
class Same:
    """Whether an answer equals the gold answer, by each rule."""

    math_sympy: bool = False
    math_sympy_or_string: bool = False
    accuracy: bool = False
    reason: str = ""
    """Why an answer is wrong: ``no answer``, ``an answer of N characters``, ``a gold answer of N characters``,
    ``different`` or ``time limit``; empty for a right one."""


def marked_answer(text: str) -> str | None:
    """Return the text after the last ``The answer is: ``, up to a full stop that ends a line: the paper's
    extraction."""
    _, found, tail = text.rpartition(RESPONSE)[2].rpartition(MARKER)
    if not found:
        return None
    return tail.split(".\n")[0].strip().removesuffix(".").strip() or None


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last ``\boxed`` (or ``\fbox``): its balanced braces, or one token without braces."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$.,]+", rest)
        return bare[0] if bare else None
    depth = 0
    for i, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:i].strip() or None
    return None


def given_answer(text: str) -> str | None:
    """Return the answer of a response, however it is marked: as the paper's prompts ask for, boxed, or by ``####``."""
    return marked_answer(text) or boxed_answer(text) or gsm8k_answer(text)


def gsm8k_answer(text: str) -> str | None:
    """Return the text after the last ``####``, to the end of the line, without thousands separators."""
    _, found, tail = text.rpartition("####")
    line = tail.strip().split("\n")[0] if found else ""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", line).strip() or None


# Minerva, appendix D. The order matters.
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)  # fmt: skip
_REWRITTEN = (
    (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
    (r"(\\text\{)(.*?)(\})", r"\2"),
    (r"(\\textbf\{)(.*?)(\})", r"\2"),
    (r"(\\overline\{)(.*?)(\})", r"\2"),
    (r"(\\boxed\{)(.*)(\})", r"\2"),
    (r"(frac)([^{])(.)", r"frac{\2}{\3}"),
    (r"(sqrt)([^{])", r"sqrt{\2}"),
)


def normalize(answer: str) -> str:
    """Apply Minerva's normalisation of a final answer (2206.14858, appendix D)."""
    answer = answer.split("=")[-1]
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for word in _REMOVED:
        answer = answer.replace(word, "")
    for pattern, new in _REWRITTEN:
        answer = re.sub(pattern, new, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer


class Checker:
    """Compares answers in processes of its own. Use it as a context manager, which ends the processes.

    Args:
        workers: number of processes. Default: one per core, at most 16.
        seconds: time limit of one comparison by one rule.
    Raises:
        UserError: math-verify or sympy's parser for LaTeX is not installed.
    """

    def __init__(self, workers: int | None = None, seconds: float = SECONDS) -> None:
        needs_math()
        self.workers, self.seconds = workers or min(process.cores(), 16), seconds
        self._idle: list[_Comparer] = []

    def __enter__(self) -> Checker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for comparer in self._idle:
            comparer.stop()
        self._idle.clear()

    def check(self, pairs: Sequence[tuple[str, str | None, str | None]]) -> Iterator[Same]:
        """Yield the verdict on each (gold answer, answer by the paper's extraction, answer by any extraction), in
        order."""
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(self._one, pairs)

    def _one(self, pair: tuple[str, str | None, str | None]) -> Same:
        gold, marked, given = pair
        if not given:
            return Same(reason="no answer")
        for name, text in (("an answer", given), ("an answer", marked or ""), ("a gold answer", gold)):
            if len(text) > LONGEST:
                return Same(reason=f"{name} of {len(text)} characters")
        comparer = self._idle.pop() if self._idle else _Comparer(self.seconds)
        strict = comparer.ask("math_sympy", gold, marked) if marked else False
        string = strict or (bool(marked) and normalize(gold) == normalize(str(marked)))
        robust = comparer.ask("accuracy", gold, given)
        self._idle.append(comparer)
        reason = "" if robust else "time limit" if None in (strict, robust) else "different"
        return Same(bool(strict), bool(string), bool(robust), reason)


_HASHES = threading.Lock()


class _Comparer:
    """A process that compares pairs of answers. It is started when first needed, and again after it was killed."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: multiprocessing.process.BaseProcess | None = None

    def ask(self, rule: str, gold: str, answer: str) -> bool | None:
        """Return whether the answers are the same by a rule; None when the comparison took too long."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send((rule, gold, answer))
            # The process stops or dies at its limit of CPU time; by the clock it may take longer on a busy machine.
            if self._pipe.poll(4 * self.seconds + 2):
                same: bool | None = self._pipe.recv()
                return same
        except (EOFError, OSError):  # out of memory, or a crash
            pass
        self.stop()
        return None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.seconds), daemon=True)
        with _HASHES:
            given = os.environ.get("PYTHONHASHSEED")
            os.environ["PYTHONHASHSEED"] = "0"  # sympy's results may depend on the order of a set
            try:
                self._process.start()
            finally:
                del os.environ["PYTHONHASHSEED"]
                if given is not None:
                    os.environ["PYTHONHASHSEED"] = given
        theirs.close()
        self._pipe.recv()  # wait for the imports, which take seconds that must not count for the pair


def _serve(pipe: Connection, seconds: float) -> None:
    """Run the comparing process: answer one question at a time, until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _too_long)
    logging.disable(logging.CRITICAL)
    for rule in _RULES.values():
        rule("x + 1", "x + 2")  # imports
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    pipe.send(True)
    while True:
        try:
            name, gold, answer = pipe.recv()
        except EOFError:
            return
        try:
            try:
                signal.setitimer(signal.ITIMER_PROF, seconds)
                _kill_after(seconds + 1)  # in a loop that no signal interrupts
                _forget()
                same: bool | None = _RULES[name](gold, answer)
            finally:  # inside, because the time limit may be reached while it is being switched off
                signal.setitimer(signal.ITIMER_PROF, 0)
        except _TooLong:
            same = None
        except (Exception, RecursionError):  # parsers raise anything; the reference counts such an answer as wrong
            same = False
        pipe.send(same)


def _kill_after(seconds: float) -> None:
    """Let the kernel kill this process after so much more CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _forget() -> None:
    """Make a comparison independent of chance and of those before it."""
    import sympy
    from sympy.core.random import seed

    sympy.core.cache.clear_cache()
    seed(0)
    random.seed(0)


class _TooLong(BaseException):
    """Raised at the time limit. Not an ``Exception``, because sympy catches those."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise _TooLong


def _math_sympy(gold: str, answer: str) -> bool:
    import sympy
    from sympy.parsing.latex import parse_latex

    difference = parse_latex(normalize(gold)) - parse_latex(normalize(answer))
    return bool(sympy.simplify(difference) == 0)


_RULES: dict[str, Callable[[str, str], bool]] = {"math_sympy": _math_sympy, "accuracy": equal}


def needs_math() -> None:
    """Raise ``UserError`` unless the packages that compare answers are installed."""
    if find_spec("math_verify") is None or find_spec("antlr4") is None:
        raise UserError("checking answers needs math-verify: pip install 'rasa_train[eval]'")
    if (found := version("antlr4-python3-runtime")).rpartition(".")[0] != "4.11":
        raise UserError(
            f"sympy reads LaTeX only with antlr4-python3-runtime 4.11, but {found} is installed: "
            "pip install 'antlr4-python3-runtime==4.11.*'"
        )
