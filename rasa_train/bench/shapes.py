"""Make models to measure on, by shape, with random weights so that nothing has to be downloaded."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from ..errors import UserError
from ..models.config import ModelConfig
from ..models.load import load_config

LINEARS = "linears-1024"
"""Name of the shape that is only a decoder layer's seven linears, 1024 wide, to measure an adapter's cost alone."""

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-42m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "llama-small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}
"""Llama shapes by name; llama-small and llama-42m keep the widths' proportions of the 8B model and are small enough for
a CPU."""


def architecture(shape: str) -> PretrainedConfig:
    """Return the architecture of a named shape, a model directory, or a config.json.

    Raises:
        UserError: ``shape`` is none of these.
    """
    if shape in SHAPES:
        # Embeddings are untied, as in Llama-3.1-8B, and the context is longer than any workload.
        return LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, max_position_embeddings=131072)
    path = Path(shape)
    path = path.parent if path.name == "config.json" else path
    if not (path / "config.json").is_file():
        names = ", ".join([LINEARS, *SHAPES])
        raise UserError(f"--shape must be {names}, a model directory or a config.json, got {shape!r}", key="--shape")
    return load_config(ModelConfig(name=str(path.resolve())))


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, *, to_embedding: bool = True
) -> PreTrainedModel:
    """Return a causal language model with random weights, the same each time on one kind of device.

    Args:
        to_embedding: whether the output of its embedding requires a gradient, so that the frozen base of a comparison,
            like all other engines, runs its backward pass down to the first layer.
    """
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    if to_embedding:
        model.get_input_embeddings().register_forward_hook(_ask_for_gradient)
    return model


def _ask_for_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


class LinearStack(nn.Module):
    """Decoder layers that consist only of the seven linears, all ``width`` wide. Only the first layer is run.

    The other layers, which share its weights and take no memory, are only adapted: RaSA's pool then has the size that
    it has in a model of ``layers`` layers, at the cost of running one.
    """

    def __init__(self, width: int, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.width = width
        torch.manual_seed(0)
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        weights = {
            name: nn.Parameter(torch.randn(width, width, dtype=dtype, device=device) / math.sqrt(width), False)
            for name in names
        }
        self.layers = nn.ModuleList(LinearLayer(weights) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Run the first layer: (tokens, width) -> (tokens, width)."""
        y: Tensor = self.layers[0](x)
        return y


class LinearLayer(nn.Module):
    """The seven linears of a decoder layer, without attention, norms and activations."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        linears = {name: _linear(weight) for name, weight in weights.items()}
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.self_attn = nn.ModuleDict({name: linears[name] for name in attention})
        self.mlp = nn.ModuleDict({name: linear for name, linear in linears.items() if name not in attention})

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        h = attention["o_proj"](attention["q_proj"](x) + attention["k_proj"](x) + attention["v_proj"](x))
        y: Tensor = mlp["down_proj"](mlp["gate_proj"](h) + mlp["up_proj"](h))
        return y


def _linear(weight: nn.Parameter) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = weight
    return linear


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the modules on the same parameters and buffers, so that engines share one frozen base."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
