"""Compiled decoder layers, or fused kernels: which of them a run uses, decided before its first step.

Compiled layers are used only if they give the loss and the gradients of the layers themselves, which is tried with two
of the run's own examples. So a compiler that is missing or wrong costs a line of output and not the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.cache import TokenDataset
from ..distributed import collectives
from ..models.layers import checkpoint_layers, compile_layers, uncompile_layers
from .micro_batches import batch_of, on_device
from .trainable_model import TrainableModel

LEAST_STEPS = 300
"""Number of steps below which ``auto`` does not compile: compiling takes as long as many steps."""
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 1e-1), torch.float16: (1e-2, 1e-1)}
"""Largest relative differences of the loss, and of the gradients (norm of the difference), by the dtype of the base:
compiled code rounds to 16 bits less often."""


class Result(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]


def compile_or_fuse(model: TrainableModel, train: TokenDataset, steps: int, say: Callable[[str], None]) -> None:
    """Compile the decoder layers if the recipe wants it and they then compute the same; if they are not compiled, use
    fused kernels if the recipe and the machine allow it. Every worker must call this function.

    Args:
        steps: number of steps of the whole run.
    """
    wanted = model.recipe.training.compile
    if wanted is True or (wanted == "auto" and pays(model, steps)):
        why = _compile(model, train)
        model.compiled = why is None
        if why is None:
            say("the decoder layers are compiled; loss and gradients are those of the layers themselves")
        else:
            say(f"the decoder layers are not compiled: {why}")
    if not model.compiled:
        model.fuse()


def pays(model: TrainableModel, steps: int) -> bool:
    """Whether ``training.compile: auto`` compiles."""
    recipe, engine = model.recipe, model.engine
    return (
        steps >= LEAST_STEPS
        and engine.accelerator.device.type == "cuda"
        and engine.capabilities.stage == 0
        and recipe.model.quantization == "none"
        and recipe.adapter.method != "peft"
        and recipe.training.kernels != "liger"
    )


def _compile(model: TrainableModel, train: TokenDataset) -> str | None:
    """Compile the layers. Returns why they are left as they were, or None."""
    by_length = np.argsort(train.lengths, kind="stable")
    examples = by_length[len(by_length) // 2 :][:2]
    expected = _try(model, train, examples)
    light = model.recipe.training.activation_checkpointing == "light"
    compile_layers(model.module, light=light)
    if light:  # the compiler's own way to do so
        checkpoint_layers(model.module, 0)
    why = None
    try:
        found = _try(model, train, examples)
    except torch.OutOfMemoryError:
        why = "there is no memory for two examples"
    except Exception as error:  # no compiler on this machine, or one that fails: the layers themselves still work
        model.engine.zero_grad()
        why = f"{type(error).__name__}: {_reason(error)}"
    else:
        why = difference(expected, found, TOLERANCE[model.torch_dtype])
    failed = collectives.sum_over_workers(model.engine.accelerator, [float(why is not None)])[0]
    if not failed:
        return None
    uncompile_layers(model.module)
    if light:
        checkpoint_layers(model.module, len(model.layers))
    return why or "another worker could not compile them"


def _try(model: TrainableModel, train: TokenDataset, examples: np.ndarray) -> Result:
    """Run forward and backward. The trial leaves no trace in the model."""
    device = model.engine.accelerator.device
    rules = {name: tensor.clone() for name, tensor in model.rule_state.items()}
    # Dropout outside the fast path draws other random numbers in compiled code.
    random = any(adapter.dropout for adapter in model.adapters.values()) and not model.packs_all
    model.engine.model.train(not random)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with model.packed(), model.engine.synchronizing(False):
            loss = model.loss(on_device(batch_of(model, train, examples), device))
            model.engine.backward(loss, last=False)
    found = {name: p.grad.detach().clone() for name, p in model.parameters.items() if p.grad is not None}
    model.restore(rules)
    return Result(float(loss.detach()), found)


def difference(expected: Result, found: Result, tolerance: tuple[float, float]) -> str | None:
    """Return in words how far two results differ; None if they agree."""
    of_loss = abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-12)
    if not of_loss <= tolerance[0]:
        return f"their loss would be {found.loss:.4f} instead of {expected.loss:.4f}"
    if found.gradients.keys() != expected.gradients.keys():
        return "their gradients would reach other tensors"
    squared = sum(float(g.double().square().sum()) for g in expected.gradients.values())
    apart = sum(float((found.gradients[n] - g).double().square().sum()) for n, g in expected.gradients.items())
    if not apart <= tolerance[1] ** 2 * squared:
        return f"their gradients would differ by {(apart / max(squared, 1e-300)) ** 0.5:.1%}"
    return None


def _reason(error: Exception) -> str:
    """Return the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"
