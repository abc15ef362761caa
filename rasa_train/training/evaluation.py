"""Task accuracy while a model is trained: the current adapter, evaluated on the worker that holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.prepare import PreparedData
from ..errors import UserError
from ..evaluate.class_scores import scores
from ..evaluate.classify import OWN, configs, logits_of, read_texts
from ..evaluate.generate import SampleFile
from ..evaluate.load import wrap
from ..evaluate.run import Evaluation, Options
from ..evaluate.suites import HEADLINE, shown_score
from ..models.families import most_tokens
from ..models.load import load_tokenizer, meta_model
from ..recipe.schema import Recipe


def make_measure(
    recipe: Recipe, data: PreparedData, *, divided: bool, say: Callable[[str], None]
) -> ClassifierMeasure | TrainingEvaluation | None:
    """Return what ``training.evaluate`` measures, if anything.

    Raises:
        UserError: questions, tokenizer or packages are missing, or the strategy divides the model.
    """
    config = recipe.training.evaluate
    if config is None:
        return None
    if divided:
        raise UserError(
            "training.evaluate computes with the whole model on one worker: distributed.strategy must be ddp, got "
            f"{recipe.distributed.strategy}; or evaluate the checkpoints with rasa-eval --all-checkpoints",
            key="training.evaluate",
        )
    return ClassifierMeasure(recipe, data, say) if data.head else TrainingEvaluation(recipe, say)


class ClassifierMeasure:
    """Scores of the classifier that is being trained, on the held-out rows or on a set of their own."""

    def __init__(self, recipe: Recipe, data: PreparedData, say: Callable[[str], None]) -> None:
        config, self.head = recipe.training.evaluate, data.head
        assert config is not None and self.head is not None
        self.every, self.say = config.every, say
        # a suite has one headline, and that of a regression is another one
        self.name = "regression" if (config.suite, self.head.problem) == (OWN, "regression") else config.suite
        if config.suite == OWN and config.data is None:
            assert data.validation is not None
            self.texts, self.answers = data.validation, data.validation.answers
            return
        most = most_tokens(meta_model(recipe.model, self.head))
        found = configs(config.suite, config.data, recipe.data.model_dump(), most)[""]
        self.texts, self.answers = read_texts(config.suite, found, load_tokenizer(recipe.model), self.head)

    def __call__(self, model: nn.Module) -> float:
        """Return the suite's headline metric."""
        assert self.head is not None
        with _as_it_was(model):
            model.eval()
            found = scores(self.head, self.answers, logits_of(model, self.head, self.texts, Options((), None).tokens))
        self.say(f"{self.name}: {', '.join(f'{key} {value:.4f}' for key, value in found.items())}")
        return found[HEADLINE[self.name]]


class TrainingEvaluation:
    """Evaluation of the model that is being trained, as ``training.evaluate`` says.

    Generation goes through the adapted layers themselves, so the weights do not change. The first worker evaluates
    while the others wait; every worker must hold the whole model.

    Raises:
        UserError: questions, tokenizer or packages are missing.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        config = recipe.training.evaluate
        assert config is not None
        self.name, self.every, self.say = config.suite, config.every, say
        self.tokenizer = load_tokenizer(recipe.model)
        if self.tokenizer is None:
            raise UserError(
                "training.evaluate needs a tokenizer, and the model has none: set model.tokenizer",
                key="training.evaluate",
            )
        options = Options((config.suite,), config.data, config.limit)
        self.evaluation = Evaluation(options, say, lambda title: lambda progress: None)

    def __call__(self, model: nn.Module) -> float:
        """Return the suite's headline metric, in [0, 1]; that of samsum is a percentage."""
        with _as_it_was(model):
            model.eval()
            lm = wrap(model, self.tokenizer)
            if self.name == "forgetting":
                metrics = self.evaluation.forgetting(lm, None)
            else:
                suite = self.evaluation.suites[self.name]
                metrics = self.evaluation.answer(lambda: lm, suite, SampleFile(None, {})).metrics
        self.say(f"{self.name}: {HEADLINE[self.name]} {shown_score(self.name, metrics[HEADLINE[self.name]])}")
        return metrics[HEADLINE[self.name]]


@dataclass(frozen=True)
class Score:
    """The score of a suite after a step."""

    step: int
    epoch: float
    value: float


@dataclass(frozen=True)
class Scores:
    """The best and the last score of a suite."""

    suite: str
    metric: str
    best: Score
    last: Score


def with_score(known: Scores | None, row: Mapping[str, Any]) -> Scores | None:
    """Return the best and the last of the ``eval_SUITE`` values in a run's metrics: those ``known``, and those of one
    more row. None if there are none."""
    for key in row:
        if key.startswith("eval_"):
            suite = key.removeprefix("eval_")
            last = Score(step=row["step"], epoch=row["epoch"], value=row[key])
            best = known.best if known and known.suite == suite else last
            best = max(best, last, key=lambda point: point.value)
            known = Scores(suite=suite, metric=HEADLINE[suite], best=best, last=last)
    return known


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore mode and random state at the end: training goes on as if nothing had been measured."""
    training = model.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            model.train(training)
