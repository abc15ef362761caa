"""Bottleneck adapters: small networks inside the layers of a frozen model, which no change of its weights can replace.

A(x) = U f(D x + b) + c        D (m x d), U (d x m), f an activation: 2 d m + m + d values

``houlsby``   h + A(h) after attention and after the FFN of each layer, before the residual sum (arXiv 1902.00751)
``pfeiffer``  only after the FFN (arXiv 2005.00247). Where a norm follows the residual sum (BERT and its relatives),
              A reads the normed sum, and its result is added to the sum before the same norm:
              LN(h + x + A(LN(h + x))), x the layer's residual. Otherwise h + A(h).
``lin``       x + A(LN'(x)) at the end of each layer, with a trained norm LN' of its own (arXiv 2004.03829): 2 d more
``dropped``   ``pfeiffer`` without the first layers (AdapterDrop, arXiv 2010.11918)

These are the baselines AdapterH, AdapterP, AdapterL and AdapterD of the LoRA paper (arXiv 2106.09685, section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ..adapters.contract import Built, Method
from ..adapters.inserted import Hook, Inserted, insert_after
from ..adapters.site import Site
from ..errors import UserError
from ..models.families import decoder_layers, sublayers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu, "tanh": F.tanh}


class Bottleneck(Method):
    """Bottleneck adapters: Houlsby's, Pfeiffer's, Lin's, and AdapterDrop. The base is frozen. They are not updates of
    weights, so they cannot be merged; ``targets`` and ``exclude`` cannot be set."""

    method: Literal["bottleneck"] = "bottleneck"
    kind: Literal["houlsby", "pfeiffer", "lin", "dropped"] = "houlsby"
    """Where the networks are, and what they read: the baselines AdapterH, AdapterP, AdapterL and AdapterD of the LoRA
    paper."""
    size: PositiveInt = 64
    """Width m of the bottleneck."""
    activation: Literal["relu", "gelu", "swish", "tanh"] | None = None
    """Activation function of the bottleneck. The default is that of the LoRA paper's scripts: ``swish`` for
    ``houlsby``, otherwise ``relu``."""
    layers: list[int] | None = None
    """Numbers of the layers that get adapters, from 0; -1 is the last one. ``null``: all, or, for ``dropped``, all but
    the first five."""

    never_used: ClassVar[frozenset[str]] = frozenset({"targets", "exclude"})

    @property
    def unmerged(self) -> str | None:
        return "bottleneck adapters are layers of their own, not changes of weights"

    def build(self, sites: list[Site]) -> Built:
        return Built({}, {})

    def insert(self, model: nn.Module) -> None:
        """Put the networks into the layers of the model, each as the module ``adapter`` of the module that it follows.

        Raises:
            UserError: ``layers`` are not layers of the model, or the structure of its layers is not known.
        """
        layers = decoder_layers(model)
        for number in self._numbers(len(layers)):
            for module, hook in self._places(layers[number]):
                device = next(layers[number].parameters()).device
                insert_after(module, Network(self, _width(model)).to(device), hook)

    def _places(self, layer: nn.Module) -> list[tuple[nn.Module, Hook]]:
        """Return the modules of one layer that a network follows, and how."""
        if self.kind == "lin":
            return [(layer, _after)]
        if (ends := sublayers(layer)) is None:
            raise UserError(
                f"adapter.kind: {self.kind} needs to know where attention and FFN end in {type(layer).__name__} "
                f"({', '.join(name for name, _ in layer.named_children())}), and does not; use adapter.kind: lin, "
                "which needs only the end of the layer",
                key="adapter.kind",
            )
        attention, ffn, norm = ends
        if self.kind == "houlsby":
            return [(layer.get_submodule(attention), _after), (layer.get_submodule(ffn), _after)]
        if norm is not None:
            return [(layer.get_submodule(norm), _before_the_norm)]
        return [(layer.get_submodule(ffn), _after)]

    def _numbers(self, count: int) -> list[int]:
        wanted = self.layers
        if wanted is None:
            wanted = list(range(DROPPED if self.kind == "dropped" else 0, count))
        if not wanted or any(not -count <= number < count for number in wanted):
            raise UserError(
                f"adapter.layers must be numbers of the model's {count} layers, from {-count} to {count - 1}, got "
                f"{wanted}",
                key="adapter.layers",
            )
        return sorted({number % count for number in wanted})


class Network(Inserted):
    """A(x) = U f(D x + b) + c, or A(LN'(x)), of vectors x (..., d). U and c start at zero, and so does A."""

    norm: Norm | None

    def __init__(self, method: Bottleneck, width: int) -> None:
        super().__init__()
        self.norm = Norm(width, dtype=torch.float32) if method.kind == "lin" else None
        self.down = Linear(width, method.size, dtype=torch.float32)
        self.up = Linear(method.size, width, dtype=torch.float32)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.activation = method.activation or ("swish" if method.kind == "houlsby" else "relu")
        self.dropout, self.wide = method.dropout, method.compute == "float32"

    def forward(self, x: Tensor) -> Tensor:
        """Return A(x) in the dtype of x. It is computed in that dtype, or in fp32 with ``compute: float32``."""
        y = x.float() if self.wide else x
        y = y if self.norm is None else self.norm(y)
        y = F.dropout(y, self.dropout, self.training)
        update: Tensor = self.up(ACTIVATIONS[self.activation](self.down(y)))
        return update.to(x.dtype)


class Linear(nn.Linear):
    """A linear with fp32 tensors that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Norm(nn.LayerNorm):
    """A layer norm with fp32 tensors, computed in fp32, whose result has the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def _after(module: Any, args: Any, output: Any) -> Any:
    """Add the network's update to what a module returns: h + A(h). Of several results, h is the first."""
    if isinstance(output, tuple):
        return (output[0] + module.adapter(output[0]), *output[1:])
    return output + module.adapter(output)


def _before_the_norm(norm: Any, args: Any, output: Tensor) -> Tensor:
    """Return LN(s + A(LN(s))) instead of LN(s)."""
    result: Tensor = norm.forward(args[0] + norm.adapter(output))
    return result


def _width(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


DROPPED = 5
"""Layers without adapters in AdapterDrop."""
