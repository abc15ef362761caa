"""Classifiers judged on texts whose labels are known: GLUE, and any file of texts and labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.saved import CONFIG, read_adapter, tokenizer_files
from ..data.built_in import CLASSIFIED, GLUE
from ..data.cache import TokenDataset
from ..data.config import DataConfig
from ..data.prepare import prepare_texts
from ..data.sources import HELD_OUT, splits_of
from ..errors import UserError
from ..io.json_file import read_bytes, read_object
from ..io.yaml_lines import parse
from ..merging.source import check_identity, find_adapter, find_base
from ..models.classifier import head_of
from ..models.config import ModelConfig
from ..models.families import most_tokens
from ..models.load import load_config, load_model, load_tokenizer
from ..models.task import Head
from ..models.vocabulary import with_words
from ..objectives.classification import Classification
from . import results
from .class_scores import scores
from .load import Plan, Subject, put_in
from .results import Result
from .run import Options
from .suites import HEADLINE, SUITES

OWN = "classification"
"""Suite of any file of texts and labels."""
SECOND = "_mm"
"""End of the names of the metrics on MNLI's mismatched rows."""


@dataclass(frozen=True)
class Classifier:
    """A classifier, and what its texts are read with."""

    model: nn.Module
    tokenizer: Any
    head: Head


def head_of_subject(subject: Subject, *, trust_remote_code: bool = False) -> Head | None:
    """Return the head of an adapter or a model; None if it is not a classifier. No weights are read."""
    if subject.is_adapter:
        path = find_adapter(Path(subject.path)) / CONFIG
        return Head.of_task(read_object(path).get("task"), f"{path}: task") if path.is_file() else None
    try:
        config = load_config(ModelConfig(name=subject.path, trust_remote_code=trust_remote_code))
    except UserError:  # said where the model is opened
        return None
    classifies = any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())
    return head_of(config) if classifies else None


def check_suites(options: Options, *, classifier: bool) -> Options:
    """Return the options for this kind of model: a classifier's suite is its ``data`` unless another is named.

    Raises:
        UserError: a suite is not for this kind of model, or a classifier has no data.
    """
    asked = (OWN,) if classifier and options.suites == ("math",) and options.data else options.suites
    for name in asked:
        if classifier != (name in CLASSIFIED):
            what = "a classifier, which writes no text" if classifier else "a language model, which gives no labels"
            fits = ", ".join(CLASSIFIED if classifier else SUITES)
            raise UserError(
                f"--suite {name} does not fit {what}: use one of {fits}"
                + (", or --data FILE with texts and labels" if classifier else "")
            )
    if OWN in asked and not options.data:
        raise UserError(f"--suite {OWN} needs the texts and labels: --data FILE")
    return replace(options, suites=asked)


class ClassifierEvaluation:
    """Suites applied to one classifier after another."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say

    def evaluate(self, subject: Subject) -> list[Result]:
        """Return the results of one subject; each is written to disk as soon as it is complete."""
        options = self.options
        plan = Plan(subject, options.base, options.backend, options.dtype, options.trust_remote_code)
        if options.backend != "hf":
            raise UserError("--backend vllm generates text; classifiers are evaluated with --backend hf")
        opened = _Lazy(plan, self.say)
        with results.writable(subject.results):
            return [self._one(subject, opened, name) for name in options.suites]

    def _one(self, subject: Subject, opened: _Lazy, name: str) -> Result:
        options, started = self.options, time.perf_counter()
        tokenizer, head = opened.tokenizer, opened.head
        sets = {
            end: read_texts(name, config, tokenizer, head)
            for end, config in configs(name, options.data, settings_of(subject), opened.most_tokens).items()
        }
        read = {end or "data": texts.directory.name for end, (texts, _) in sets.items()}
        depends_on: dict[str, Any] = {
            "protocol": {"suite": name, "tokens": read, "labels": list(head.labels), "problem": head.problem},
            "model": opened.plan.identity,
        }
        done = results.finished(subject.results, name, subject.name, options.limit, depends_on)
        if done and not options.fresh:
            self.say(f"{subject.name}: {name} is done already; add --fresh to evaluate it again")
            return done
        metrics, rows = dict[str, float](), list[dict[str, Any]]()
        for end, (texts, answers) in sets.items():
            self.say(f"{subject.name}: {name}{end}, {len(texts)} texts")
            chosen = texts.select(np.arange(min(options.limit or len(texts), len(texts))))
            logits = logits_of(opened.model, head, chosen, options.tokens)
            found = scores(head, answers[: len(chosen)], logits)
            metrics |= {f"{key}{end}": value for key, value in found.items()}
            rows += verdicts(head, answers, logits, len(rows))
        first = HEADLINE["regression" if (name, head.problem) == (OWN, "regression") else name]
        seconds = round(time.perf_counter() - started, 1)
        measured = {"metrics": metrics, "questions": len(rows), "seconds": seconds, **depends_on, "rows": rows}
        result = results.result_of(subject, name, first, options.limit, measured)
        results.write_result(subject.results, result)
        return result


class _Lazy:
    """The classifier of a subject, whose weights are loaded only when a result is missing."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan, self.say = plan, say
        name, own = plan.subject.path, None
        self._saved = None
        if plan.subject.is_adapter:
            self._saved = read_adapter(find_adapter(Path(name)))
            _, base = find_base(self._saved, plan.base, None, weights=True)
            check_identity(self._saved, base)
            name, own = str(base), name if tokenizer_files(self._saved.directory) else None
        own = str(self._saved.directory.absolute()) if own and self._saved else None
        self._config = ModelConfig(
            name=name, tokenizer=own, dtype=plan.resolved_dtype, trust_remote_code=plan.trust_remote_code
        )
        head = head_of_subject(plan.subject, trust_remote_code=plan.trust_remote_code)
        assert head
        self.head, self.tokenizer = head, load_tokenizer(self._config)
        if self.tokenizer is None:
            raise UserError(f"{name} has no tokenizer: copy that of the model that it was made from into the directory")
        self.tokenizer = with_words(self.tokenizer, self._saved.words if self._saved else None, plan.subject.path)

    @cached_property
    def model(self) -> nn.Module:
        self.say(f"loading {self.plan.subject.path}")
        base = load_model(self._config, self.head)
        model: nn.Module = base
        if self._saved is not None:
            with torch.random.fork_rng(devices=[]):  # the values that are drawn are replaced
                model = put_in(base, self._saved)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @cached_property
    def most_tokens(self) -> int | None:
        return most_tokens(self.model)


def settings_of(subject: Subject) -> Mapping[str, Any]:
    """Return the section ``data:`` of the run that a subject belongs to; empty if it belongs to none."""
    path = Path(subject.path).absolute()
    for place in (path, path.parent, path.parent.parent):
        if subject.is_adapter and (recipe := place / "recipe.yaml").is_file():
            values, _ = parse(read_bytes(recipe).decode(errors="replace"), str(recipe))
            found = values.get("data")
            return found if isinstance(found, dict) else {}
    return {}


def configs(name: str, data: str | None, settings: Mapping[str, Any], most: int | None) -> dict[str, DataConfig]:
    """Return where the texts of a suite are, by the end of the names of their metrics.

    Args:
        data: file, directory or name of the texts; None for the held-out split of a set of GLUE on the hub.
        settings: the section ``data:`` of the recipe that the classifier was trained with.
        most: most tokens that the model can read; None for any number.
    """
    kept = {key: settings[key] for key in ("max_length", "cache_dir", "num_workers") if settings.get(key)}
    if most is not None:
        kept["max_length"] = min(kept.get("max_length", most), most)
    if name in GLUE:
        kept["columns"] = GLUE[name].columns
    elif columns := _columns(settings):
        kept["columns"] = columns
    if data is None:
        kept.pop("columns", None)  # those of the name
        ends = dict(zip(("", SECOND), GLUE[name].splits, strict=False))
        return {end: DataConfig(dataset=name, split=split, **kept) for end, split in ends.items()}
    if name == "glue/mnli" and Path(data).is_dir() and len(both := _matched(Path(data))) == 2:
        return {end: DataConfig(dataset=str(file), **kept) for end, file in both.items()}
    split = next((split for split in HELD_OUT if split in (splits_of(data) or ())), None)
    split = split or (
        "train" if Path(data).expanduser().exists() else (GLUE[data].splits[0] if data in GLUE else "test")
    )
    return {"": DataConfig(dataset=data, split=split, **kept)}


def _columns(settings: Mapping[str, Any]) -> Any:
    """Return the columns that the recipe names for its set, or for all sets of a mixture."""
    mix = settings.get("mix")
    found = [one.get("columns") for one in (mix if isinstance(mix, list) else [settings]) if isinstance(one, dict)]
    return found[0] if found and all(columns == found[0] for columns in found) else None


def _matched(directory: Path) -> dict[str, Path]:
    files = sorted(path for path in directory.iterdir() if path.is_file() and "matched" in path.name)
    return {SECOND if "mismatched" in path.name else "": path for path in files}


def read_texts(name: str, config: DataConfig, tokenizer: Any, head: Head) -> tuple[TokenDataset, np.ndarray]:
    """Return the texts of a suite, and their answers for this head.

    Raises:
        UserError: the texts cannot be read, or their labels are not those of the head.
    """
    own = GLUE[name].head if name in GLUE else head
    if own.problem != head.problem or len(own.labels) != len(head.labels):
        gives = f"{len(head.labels)} labels ({head.problem})" if head.labels else "a number"
        needs = f"{len(own.labels)} labels, {', '.join(own.labels)}" if own.labels else "a number"
        raise UserError(f"the suite {name} needs {needs}, and this classifier gives {gives}")
    texts = prepare_texts(config, tokenizer, own)
    answers = texts.answers
    if own.problem == "single_label" and set(own.labels) == set(head.labels):  # perhaps in another order
        places = np.array([head.labels.index(label) for label in own.labels], np.float64)
        answers = places[answers.astype(int)]
    return texts, answers


@torch.no_grad()
def logits_of(model: nn.Module, head: Head, texts: TokenDataset, tokens: int) -> np.ndarray:
    """Return the logits of a classifier in eval mode, whose forward returns logits; fp64, shape (texts, outputs).

    Args:
        tokens: most tokens that are computed at once, with padding.
    """
    objective = Classification(head)
    objective.look_at(model)
    device = next(model.parameters()).device
    found = np.zeros((len(texts), head.outputs))
    order, lengths, at = np.argsort(-texts.lengths, kind="stable"), texts.lengths, 0
    while at < len(order):
        some = order[at : at + max(1, tokens // int(lengths[order[at]]))]
        batch = objective.tensors([texts[int(i)] for i in some], flat=False)
        inputs = {k: v.to(device) for k, v in batch.items() if k != "targets" and isinstance(v, Tensor)}
        found[some] = model(**inputs).logits.double().cpu().numpy()
        at += len(some)
    return found


def verdicts(head: Head, answers: np.ndarray, logits: np.ndarray, start: int) -> list[dict[str, Any]]:
    """Return a row for each text: its place, its answer, and what the classifier says."""
    rows: list[dict[str, Any]] = []
    for i, (answer, logit) in enumerate(zip(answers, logits, strict=False), start):
        if head.problem == "regression":
            rows.append({"index": i, "answer": float(answer[0]), "prediction": float(logit[0])})
            continue
        if head.problem == "single_label":
            right, said = head.labels[int(answer[0])], head.labels[int(logit.argmax())]
            rows.append({"index": i, "answer": right, "prediction": said, "correct": right == said})
            continue
        both = [[n for n, has in zip(head.labels, some, strict=True) if has > 0] for some in (answer, logit)]
        rows.append({"index": i, "answer": both[0], "prediction": both[1], "correct": both[0] == both[1]})
    return rows
