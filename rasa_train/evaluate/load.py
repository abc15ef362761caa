"""Find and load the models to evaluate: a model, or a base with an adapter merged in memory; wrapped for lm-eval."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapters.fold import fold
from ..adapters.inject import adapt
from ..adapters.saved import CONFIG, PEFT_TENSORS, TENSORS, SavedAdapter, read_adapter, tokenizer_files
from ..errors import UserError
from ..io.checksums import sha256
from ..io.json_file import field, read_bytes, read_object
from ..io.links import refuse_links_out
from ..io.run_dir import RunDirectory, numbered
from ..merging.bias import new_biases
from ..merging.source import Source, check_identity, find_adapter, find_base, open_source
from ..merging.tied import untie
from ..models.config import ModelConfig
from ..models.load import load_model, load_tokenizer
from ..models.vocabulary import with_words
from ..models.words import put, release, row_parameters, trained_names
from .suites import digest, needs_harness

Backend = Literal["hf", "vllm"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Subject:
    """One thing to evaluate."""

    name: str
    """``model``, ``adapter`` or a checkpoint's name, which is also the file name of the results."""
    path: str
    """Adapter directory, model directory or hub id."""
    results: Path
    """Directory for the results."""
    is_adapter: bool
    step: int | None = None
    """Optimizer steps of a checkpoint or of a finished run, where known."""
    epoch: float | None = None
    """Epochs at ``step``, where known."""


def find_subjects(
    target: str, *, all_checkpoints: bool, output: Path | None, checkpoint: str | None = None
) -> list[Subject]:
    """Return the subjects that ``RUN_OR_MODEL`` stands for: a run (its adapter, or every checkpoint), an adapter
    directory, or a model.

    Args:
        checkpoint: ``best``, or the number of a step, for one checkpoint of a run.
    Raises:
        UserError: ``target`` is none of these, or has no such checkpoint.
    """
    if all_checkpoints and checkpoint is not None:
        raise UserError(f"give --all-checkpoints or --checkpoint {checkpoint}, not both")
    path = Path(target).expanduser()
    run = next((p for p in (path, path.parent, path.parent.parent) if (p / "recipe.yaml").is_file()), None)
    if run is not None:
        RunDirectory(run).refuse_links()
    refuse_links_out(path, ["evaluation"])
    if all_checkpoints:
        if run != path or not (found := [p for p in numbered(path / "checkpoints") if (p / CONFIG).is_file()]):
            raise UserError(f"--all-checkpoints needs the directory of a run with checkpoints/step-*, got {target}")
        return [_checkpoint(p, output or path / "evaluation", run) for p in found]
    if checkpoint is not None:
        return [_checkpoint(find_adapter(path, checkpoint), output or path / "evaluation", run)]
    if path.is_dir() and (path / "config.json").is_file() and not (path / CONFIG).is_file():
        return [Subject("model", str(path), output or path / "evaluation", False)]
    if path.is_dir():
        adapter = find_adapter(path)
        results = output or (run or path) / "evaluation"
        if (adapter / "trainer.json").is_file():
            return [_checkpoint(adapter, results, run)]
        return [Subject("adapter", str(adapter), results, True, *_last(run))]
    if path.exists() or path.is_absolute() or target.startswith((".", "~")) or target.count("/") != 1:
        raise UserError(
            f"{target} is not a run, an adapter or a model: give the output_dir of a run, an adapter or checkpoint "
            "directory, a model directory, or a hub id (owner/name)"
        )
    return [Subject("model", target, output or Path("evaluation") / target.replace("/", "--"), False)]


@dataclass(frozen=True)
class Plan:
    """How a subject is loaded, and the facts that identify it in results."""

    subject: Subject
    base: str | None = None
    backend: Backend = "hf"
    dtype: Dtype = "auto"
    trust_remote_code: bool = False

    @property
    def resolved_dtype(self) -> Literal["bfloat16", "float16", "float32"]:
        """The dtype to load, where ``auto`` is bf16 (the paper's) on a GPU and fp32 on a CPU."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if torch.cuda.is_available() else "float32"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Facts that identify the model in results. The base's or model's weight files are not read."""
        path = Path(self.subject.path)
        if self.subject.is_adapter:
            config = read_object(path / CONFIG)
            base = self.base or config.get("base_model", config.get("base_model_name_or_path"))
            model: dict[str, Any] = {"base": base, "adapter_sha256": _tensors_digest(path)}
        else:
            model = {"model": self.subject.path} | ({"files": _model_digest(path)} if path.is_dir() else {})
        return {**model, "dtype": self.resolved_dtype, "backend": self.backend}


def load_lm(plan: Plan) -> Any:
    """Load a subject as a model of lm-eval.

    Raises:
        UserError: the model cannot be loaded, has no tokenizer, or is not supported by the backend.
    """
    needs_harness()
    _check_generates(Path(plan.subject.path))
    name, source, inside, own = plan.subject.path, None, None, None
    if plan.subject.is_adapter:
        if (inside := _unmerged(plan)) is not None:
            name = str(inside[1])
        else:
            source = open_source(plan.subject.path, plan.base, weights=True)
            name = str(source.directory)
        own = str(Path(plan.subject.path).absolute()) if tokenizer_files(Path(plan.subject.path)) else None
    config = ModelConfig(name=name, tokenizer=own, dtype=plan.resolved_dtype, trust_remote_code=plan.trust_remote_code)
    tokenizer = load_tokenizer(config)
    if tokenizer is None:
        raise UserError(
            f"{name} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json), and prompts are text: copy the "
            "tokenizer of the model that it was made from into the directory"
        )
    words = inside[0].words if inside else source.words if source else None
    tokenizer = with_words(tokenizer, words, plan.subject.path)
    if plan.backend == "vllm":
        if inside is not None:
            raise UserError("--backend vllm reads merged models, and this adapter cannot be merged: use --backend hf")
        if source is not None:
            raise UserError(
                "--backend vllm reads merged models only: merge the adapter with rasa-merge first, or use --backend hf"
            )
        return _vllm(plan)
    model = load_model(config)
    if source is not None:
        merge_in_memory(model, source)
    evaluated: nn.Module = model if inside is None else put_in(model, inside[0])
    return wrap(evaluated.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)


def _unmerged(plan: Plan) -> tuple[SavedAdapter, Path] | None:
    """Return an adapter that cannot be merged, and the directory of its base; None for other adapters."""
    saved = read_adapter(find_adapter(Path(plan.subject.path)))
    if saved.method.unmerged is None:
        return None
    _, base = find_base(saved, plan.base, None, weights=True)
    check_identity(saved, base)
    return saved, base


def put_in(model: PreTrainedModel, saved: SavedAdapter) -> nn.Module:
    """Put a saved adapter into a loaded base. Returns the model to evaluate, which computes with the adapter in place.

    Raises:
        UserError: the adapter does not fit the base.
    """
    put(model, saved.words)
    adapted, _ = adapt(model, saved.method)
    saved.method.load(adapted, saved.tensors, str(saved.directory))
    return adapted.eval()


def wrap(model: nn.Module, tokenizer: Any) -> Any:
    """Wrap a model in memory as lm-eval's model ``hf``. No bos is added, because prompts contain their own."""
    needs_harness()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", add_bos_token=False, batch_size=1)


@torch.no_grad()
def merge_in_memory(model: PreTrainedModel, source: Source) -> None:
    """Fold an adapter into the weights of a loaded base: W <- round(W + dW), computed in fp32.

    Raises:
        UserError: the adapter adds biases that the model does not have. Such an adapter can be evaluated after a merge
            on disk.
    """
    if new_biases(source).tensors:
        raise UserError(
            f"the {source.label} adapter adds biases that the base does not have: merge it with rasa-merge, and "
            "evaluate the merged model"
        )
    if source.untied:
        untie(model)
    put(model, source.words)
    trained_names(model, source.replaced.keys() - row_parameters(model).keys())  # rows may be part of a whole weight
    parameters = dict(model.named_parameters())
    for name, tensor in source.replaced.items():
        parameters[name].copy_(tensor)
    release(model, keep=True)
    for site in source.sites:
        fold(site, source.adapters[site.path], parameters)


def _check_generates(path: Path) -> None:
    """Raise ``UserError`` for a local classifier, which writes no text."""
    found = next((path / name for name in (CONFIG, "config.json") if (path / name).is_file()), None)
    facts = {} if found is None else read_object(found)
    task, names = facts.get("task"), facts.get("architectures")
    classifies = isinstance(task, dict) and task.get("name") == "classification"
    if classifies or any(str(name).endswith("ForSequenceClassification") for name in names or ()):
        raise UserError(
            f"{path} classifies texts, and this suite needs a model that writes: evaluate a causal language model, or "
            "name a suite of classification"
        )


def _vllm(plan: Plan) -> Any:
    if find_spec("vllm") is None:
        raise UserError("--backend vllm needs vLLM: pip install vllm")
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(
        pretrained=plan.subject.path,
        dtype=plan.resolved_dtype,
        add_bos_token=False,
        batch_size="auto",
        trust_remote_code=plan.trust_remote_code,
    )


def _checkpoint(path: Path, results: Path, run: Path | None) -> Subject:
    try:
        step = field(read_object(path / "trainer.json"), "step", int, path / "trainer.json")
    except (FileNotFoundError, UserError):
        raise UserError(f"{path} is not a checkpoint: it has no readable trainer.json") from None
    return Subject(path.name, str(path), results, True, step, _epoch(run, step))


def _last(run: Path | None) -> tuple[int | None, float | None]:
    """Return the steps and epochs of a finished run, where its summary has them."""
    if run is None or not (summary := RunDirectory(run).summary).is_file():
        return None, None
    facts = RunDirectory(run).read_summary()
    return field(facts, "steps", int, summary), field(facts, "epochs", float, summary)


def _epoch(run: Path | None, step: int) -> float | None:
    """Return the epoch of a step from the run's metrics; None where they do not have it."""
    if run is None or not (metrics := RunDirectory(run).metrics).is_file():
        return None
    rows = (row for row in RunDirectory(run).rows() if row["step"] == step and "epoch" in row)
    return next((field(row, "epoch", float, metrics) for row in rows), None)


def _tensors_digest(directory: Path) -> str:
    """Return a digest of the adapter's tensors, which may be in parts. Raises ``UserError`` if there are none."""
    for name in map(Path, (TENSORS, PEFT_TENSORS)):
        found = [directory / name, *sorted(directory.glob(f"{name.stem}-*-of-*{name.suffix}"))]
        if files := [path for path in found if path.is_file()]:
            sums = [sha256(path) for path in files]
            return (sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest())[:16]
    raise UserError(f"{directory} holds no tensors: neither {TENSORS} nor {PEFT_TENSORS} is there")


def _model_digest(directory: Path) -> str:
    """Return a digest of the configuration and of the name, size and modification time of each weight file. The
    weights are not read, because reading those of a large model twice would take minutes."""
    parts: list[Any] = [read_bytes(directory / "config.json").decode(errors="replace")]
    for path in sorted(directory.glob("*.safetensors")):
        stat = path.stat()
        parts.append([path.name, stat.st_size, stat.st_mtime_ns])
    return digest(parts)
