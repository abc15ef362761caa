"""The suites that can be evaluated: each is a task of lm-evaluation-harness with its questions and protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..data.built_in import CLASSIFIED
from ..errors import UserError
from ..process import version_of
from .problems import Row

TASKS = {
    "math": "rasa_math",
    "gsm8k": "rasa_gsm8k",
    "code": "rasa_humaneval_plus",
    "e2e": "rasa_e2e",
    "samsum": "rasa_samsum",
    "wikisql": "rasa_wikisql",
}
"""Suites whose answers are generated, and the task of each in ``tasks/``. ``forgetting`` is scored by likelihood."""
SUITES = (*TASKS, "forgetting")
HEADLINE = {
    "math": "math_sympy",
    "gsm8k": "accuracy",
    "code": "pass@1",
    "e2e": "bleu",
    "samsum": "rouge1",
    "wikisql": "lf_accuracy",
    "forgetting": "average",
    **dict.fromkeys(CLASSIFIED, "accuracy"),
    "regression": "pearson",
    "glue/cola": "matthews_correlation",
    "glue/stsb": "pearson",
}
"""Main metric of each suite: tables show it first, and training chooses the best checkpoint by it."""
DEFINITIONS = Path(__file__).parent / "tasks"
STEP_BY_STEP = "Let's think step by step."
"""Beginning of the response in the paper's prompt for mathematics (Figure 8); training responses lack this sentence."""


@dataclass(frozen=True)
class Question:
    """One prompt with the row that it comes from."""

    index: int
    """Position of the question in the set."""
    row: Row
    prompt: str
    """Text of the prompt, without bos."""


@dataclass(frozen=True)
class Suite:
    """A generative suite with its questions loaded."""

    name: str
    task: Any
    """Task of lm-eval."""
    data: str | None
    """File or directory of the questions, or ``demo``; None for the hub."""

    @cached_property
    def questions(self) -> list[Question]:
        questions = []
        for index, row in enumerate(self.task.test_docs()):
            prompt = self.task.doc_to_text(row)
            # The demo's tiny model knows only the prompt that it was trained on.
            prompt = prompt.removesuffix(STEP_BY_STEP) if self.data == "demo" else prompt
            questions.append(Question(index, dict(row), prompt))
        return questions

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of generation, from the YAML."""
        return dict(self.task.config.generation_kwargs)

    @property
    def samples(self) -> int:
        """Number of responses to each question."""
        return int(self.task.config.repeats)

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self.task.config.metadata)

    @property
    def beams(self) -> int:
        """Number of beams; 1 for greedy and sampled responses."""
        return int(self.decoding.get("num_beams", 1))

    def prompt(self, question: Question, bos: str, eos: str) -> str:
        """Return the prompt of a question with the tokenizer's bos: before it, or in the template ``separated`` after
        it (eos, where there is no bos)."""
        if self.metadata.get("template") == "separated":
            return question.prompt + (bos or eos)
        return question.prompt if bos and question.prompt.startswith(bos) else bos + question.prompt

    def protocol(self) -> dict[str, Any]:
        """Return everything but the model that a response depends on. Results of different protocols are never
        mixed."""
        hooks = "hooks.py" if self.name in ("math", "gsm8k", "code") else "text_hooks.py"
        source = (DEFINITIONS / f"{TASKS[self.name]}.yaml").read_text() + (DEFINITIONS / hooks).read_text()
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
    """Raise ``UserError`` for an unknown suite."""
    for name in names:
        if name not in (known := (*SUITES, *CLASSIFIED)):
            raise UserError(f"--suite must name suites out of {', '.join(known)} (separated by commas), got {name!r}")


def shown_score(suite: str, value: float) -> str:
    """Return a value of a suite's metrics as text: as its publications print it, or in percent."""
    if suite in ("e2e", "nlg"):
        return f"{value:.4f}"
    return f"{value:.2f}" if suite == "samsum" else f"{value:.1%}"


def load_suite(name: str, data: str | None) -> Suite:
    """Return a suite with its questions.

    Raises:
        UserError: the questions cannot be found, or lm-eval is not installed.
    """
    needs_harness()
    from lm_eval.tasks import TaskManager

    # lm-eval passes the metadata on to the function that the YAML names for the rows.
    manager = TaskManager(include_path=str(DEFINITIONS), include_defaults=False, metadata={"data": data})
    tasks = manager.load(TASKS[name])["tasks"]
    return Suite(name, tasks[TASKS[name]], data)


def needs_harness() -> None:
    """Raise ``UserError`` unless lm-eval is installed. If it is, hide its progress bars and log messages."""
    if find_spec("lm_eval") is None:
        raise UserError("evaluation needs lm-evaluation-harness: pip install 'rasa_train[eval]'")
    import logging

    import datasets

    datasets.disable_progress_bars()
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    models = ("rasa_train", "torch", "transformers", "lm_eval", "vllm")
    names = (*models, "math-verify", "sympy", "sacrebleu", "pycocoevalcap", "rouge-score")
    return {name: version_of(name) or "unknown" for name in names if find_spec(name.replace("-", "_")) is not None}


def digest(value: Any) -> str:
    """Return a short hash of a value that can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
