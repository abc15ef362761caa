"""The package as a library: put adapters into your own model and train them in your own loop.

    from rasa_train import RaSA, adapt, merge, save_adapter

    model = adapt(AutoModelForCausalLM.from_pretrained(name), RaSA(r=8, k=1, alpha=8))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ...                                      # loss.backward(); clip; optimizer.step(), as usual
    save_adapter(model, "adapter")           # rasa-merge, rasa-eval and load_adapter read it

An adapted model is the model itself: its forward, ``generate`` and trainers of other libraries work as before.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .adapters import inject
from .adapters.contract import Method
from .adapters.fold import detach, fold_all
from .adapters.packed_forward import PackedForward
from .adapters.saved import Origin, SavedAdapter, load_tensors, read_adapter, write_adapter
from .adapters.state import saved_tensors, with_own_head
from .errors import UserError
from .io.base_fingerprint import base_identity
from .merging.source import find_adapter
from .models.classifier import head_of, is_classifier
from .models.words import check_start, put, words_of

ADAPTED = "rasa_train_adapted"
"""Name of the attribute of an adapted model that holds its method and the hooks of its fast path."""


def adapt(model: nn.Module, method: Method) -> nn.Module:
    """Freeze a model and put the adapters of ``method`` into it, for your own training loop.

    The linears of the repeated layers that ``method.targets`` selects get an update, which is zero at first for almost
    every method, so the outputs do not change. Adapter parameters are fp32, on the device of the weights they belong
    to; only they have ``requires_grad``, and the head of a sequence classifier, which is then held in fp32 too.
    Forward and backward take the fast path (factors packed in the dtype of the weights once per forward pass), and
    ``loss.backward()`` leaves complete gradients in the parameters. Afterwards the model may be moved to another
    device, compiled, checkpointed (``use_reentrant=False``) or wrapped in DDP or FSDP.

    Args:
        model: a transformers model with repeated layers, with its weights: a decoder, or a sequence classifier of an
            encoder or a decoder.
        method: the hyper-parameters, for example ``RaSA(r=8, k=1, alpha=8)`` or
            ``LoRA(r=8, alpha=16, dropout=0.05)``. Where ``init_from`` names an adapter directory, the adapters start
            with the values stored there.
    Returns:
        The model itself, changed in place.
    Raises:
        UserError: the model already has adapters, a target matches nothing, or the method wraps the model in a model
            of another library (``peft``: use that library directly).
    """
    start = read_adapter(method.init_from) if method.init_from else None
    return _adapt(model, method, start, any_head=True)


def _adapt(model: nn.Module, method: Method, start: SavedAdapter | None, *, any_head: bool = False) -> nn.Module:
    if hasattr(model, ADAPTED):
        raise UserError("the model already has adapters: call merge(model) first, which folds them into its weights")
    adapted, _ = inject.adapt(model, method)
    if adapted is not model:
        raise UserError(
            f"adapt: the method {method.method!r} wraps the model in one of another library; use that library directly"
        )
    if start is not None:
        _load(model, start, any_head)
    setattr(model, ADAPTED, (method, PackedForward(model)))
    return model


def save_adapter(model: nn.Module, directory: str | Path, *, base_model: str | None = None) -> Path:
    """Write the adapters of a model to a directory that ``load_adapter``, ``rasa-merge`` and ``rasa-eval`` read.

    Args:
        directory: created if it does not exist; the files of an adapter already in it are replaced.
        base_model: directory or hub id of the base model, recorded in the adapter for later readers. Default: where
            the model was loaded from.
    Returns:
        The directory.
    Raises:
        UserError: the model was not adapted by ``adapt``, or the location of its base model is not known.
    """
    method, _ = _adapted(model)
    name = base_model or getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        raise UserError(
            "save_adapter: the location of the base model is unknown; give base_model, a directory or a hub id"
        )
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # so that it is found from any working directory
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    origin = Origin(base_model=name, base_revision=None, base_tensors=base_identity(name))
    if is_classifier(model):
        origin["head"] = head_of(model.config)  # type: ignore[arg-type]
    origin["words"] = words_of(model)
    write_adapter(path, method, saved_tensors(model), **origin)
    return path


def load_adapter(model: nn.Module, directory: str | Path, *, checkpoint: str | None = None) -> nn.Module:
    """Put a saved adapter into a model without adapters, to use the model or to train it further.

    Args:
        directory: an adapter of this package (``adapter`` in an output directory, or a checkpoint), of PEFT or of
            the reference implementation.
        checkpoint: with the output directory of a run as ``directory``, ``best`` for the best step of the run
            (``training.keep_best``), or the number of a step.
    Returns:
        The model itself, changed in place.
    Raises:
        UserError: the directory holds no adapter or no such checkpoint, the adapter is damaged, or it does not fit the
            model.
    """
    saved = read_adapter(directory if checkpoint is None else find_adapter(Path(directory), checkpoint))
    if words_of(model) is None and not hasattr(model, ADAPTED):
        put(model, saved.words)  # type: ignore[arg-type]
    return _adapt(model, saved.method, saved)


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapters of a model into its weights, W <- round(W + dW) in the weights' dtype, and remove the adapters.

    ``rasa-merge`` does the same from file to file, without the model in memory, and reports what rounding changed.

    Returns:
        The model itself, again an ordinary model of its class.
    Raises:
        UserError: the model was not adapted by ``adapt``, or the method has nothing to merge.
    """
    method, forward = _adapted(model)
    if why := method.unmerged:
        raise UserError(f"merge: an adapter of method {method.method!r} cannot be merged: {why}")
    forward.remove()
    fold_all(model)
    delattr(model, ADAPTED)
    return model


def _load(model: nn.Module, saved: SavedAdapter, any_head: bool) -> None:
    """Load the values of a saved adapter. An adapter that does not fit leaves the model without adapters.
    ``any_head``: if the adapter's head has another shape, the model keeps its own.
    """
    try:
        check_start(model, saved.words, str(saved.directory))
        tensors = with_own_head(model, saved.tensors)[0] if any_head else saved.tensors
        load_tensors(model, tensors, origin=str(saved.directory))
    except UserError:
        detach(model)
        raise


def _adapted(model: nn.Module) -> tuple[Method, PackedForward]:
    found: tuple[Method, PackedForward] | None = getattr(model, ADAPTED, None)
    if found is None:
        raise UserError("the model has no adapters: put them into it with adapt() or load_adapter() first")
    return found
