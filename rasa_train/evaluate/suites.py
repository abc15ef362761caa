"""What can be measured: the task of lm-evaluation-harness behind each suite, with its questions and protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..process import version_of
from .problems import Row

TASKS = {"math": "rasa_math", "gsm8k": "rasa_gsm8k", "code": "rasa_humaneval_plus"}
"""Suites whose answers are generated, and their task in ``tasks/``. ``forgetting`` is scored by likelihood."""
SUITES = (*TASKS, "forgetting")
HEADLINE = {"math": "math_sympy", "gsm8k": "accuracy", "code": "pass@1", "forgetting": "average"}
"""The metric of a suite that tables show first, and that training picks its best checkpoint by."""
DEFINITIONS = Path(__file__).parent / "tasks"
STEP_BY_STEP = "Let's think step by step."
"""How the paper's prompt for mathematics begins the response (Figure 8); training has no such words."""


@dataclass(frozen=True)
class Question:
    """One prompt: without bos, with the row it comes from and its place in the set."""

    index: int
    row: Row
    prompt: str


@dataclass(frozen=True)
class Suite:
    """A generative suite with its questions loaded."""

    name: str
    task: Any
    """lm-eval's task."""
    data: str | None

    @cached_property
    def questions(self) -> list[Question]:
        questions = []
        for index, row in enumerate(self.task.test_docs()):
            prompt = self.task.doc_to_text(row)
            # The demo's tiny model knows the prompt that it was trained on, and no other.
            prompt = prompt.removesuffix(STEP_BY_STEP) if self.data == "demo" else prompt
            questions.append(Question(index, dict(row), prompt))
        return questions

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of generation, as in the YAML."""
        return dict(self.task.config.generation_kwargs)

    @property
    def samples(self) -> int:
        """Responses for each question."""
        return int(self.task.config.repeats)

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self.task.config.metadata)

    def protocol(self) -> dict[str, Any]:
        """What a response depends on beside the model. Results of different protocols are never mixed."""
        source = (DEFINITIONS / f"{TASKS[self.name]}.yaml").read_text() + (DEFINITIONS / "hooks.py").read_text()
        return {
            "task": TASKS[self.name],
            "version": self.metadata["version"],
            "prompt": digest(source),
            "prompt_example": self.questions[0].prompt,
            "extractor": self.metadata["extractor"],
            "decoding": self.decoding,
            "samples": self.samples,
            "seed": self.metadata.get("seed"),
            "questions": digest([[question.prompt, question.row] for question in self.questions]),
        }


def check_names(names: Sequence[str]) -> None:
    """Raise ``UserError`` for a suite that there is not."""
    for name in names:
        if name not in SUITES:
            raise UserError(f"--suite must be of {', '.join(SUITES)} (separated by commas), got {name!r}")


def load_suite(name: str, data: str | None) -> Suite:
    """The suite with its questions.

    Raises:
        UserError: the questions are not there, or lm-eval is not installed.
    """
    needs_harness()
    from lm_eval.tasks import TaskManager

    # Metadata are what reaches the function in the YAML that gives the rows.
    manager = TaskManager(include_path=str(DEFINITIONS), include_defaults=False, metadata={"data": data})
    tasks = manager.load(TASKS[name])["tasks"]
    return Suite(name, tasks[TASKS[name]], data)


def needs_harness() -> None:
    """Raise ``UserError`` unless lm-eval is installed. Quiet its log otherwise."""
    if find_spec("lm_eval") is None:
        raise UserError("evaluation needs lm-evaluation-harness: pip install 'rasa_train[eval]'")
    import logging

    import datasets

    datasets.disable_progress_bars()
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def versions() -> dict[str, str]:
    """Of what results depend on."""
    names = ("rasa_train", "torch", "transformers", "lm_eval", "math-verify", "sympy", "vllm")
    return {name: version_of(name) or "unknown" for name in names if find_spec(name.replace("-", "_")) is not None}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
