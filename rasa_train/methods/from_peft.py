"""Any method of the PEFT library, under PEFT's own names: prefix and prompt tuning, IA3, LoHa, OFT, ...

    adapter: {method: peft, config: {peft_type: PREFIX_TUNING, num_virtual_tokens: 8}}

PEFT wraps the model, computes and merges; the update does not belong to sites, so nothing else in this package that
works on sites applies to it. PEFT does not have bottleneck adapters, which are ``method: bottleneck``.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapters.contract import Built, Method, PeftConfig
from ..adapters.patterns import path_pattern
from ..adapters.site import Site
from ..errors import UserError

if TYPE_CHECKING:
    import peft

ADAPTER = "default"
"""Name of the adapter in PEFT, which is part of the names of its tensors."""
NEEDS_MORE = {
    "ADALORA": "a rule after each step: use `method: adalora`",
    "XLORA": "several trained LoRA adapters",
    "POLY": "task ids with each batch",
    "MULTITASK_PROMPT_TUNING": "task ids with each batch",
    "CPT": "a loss and labels of its own",
}
"""Methods of PEFT that need something that this package's training loop does not provide."""
RECORDS = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "peft_type",
        "task_type",
    ),
    "runtime_config",
}
"""Keys of a saved configuration that do not say what the adapter is."""


class Peft(Method):
    """A method of the PEFT library. ``targets``, ``exclude``, ``dropout`` and ``compute`` cannot be set: use the
    corresponding keys of ``config``."""

    method: Literal["peft"] = "peft"
    config: dict[str, object]
    """PEFT's configuration: ``peft_type`` and the keys of that type, as in PEFT's documentation. ``task_type`` is
    always CAUSAL_LM."""

    never_used: ClassVar[frozenset[str]] = frozenset({"targets", "exclude", "dropout", "compute"})

    @classmethod
    def from_peft(cls, config: PeftConfig) -> dict[str, object] | None:
        kind = str(config.get("peft_type", "")).upper()
        if config.get("task_type") not in (None, "CAUSAL_LM") or kind in NEEDS_MORE or kind not in _known():
            return None
        own = inspect.signature(_known()[kind]).parameters
        given = {key: value for key, value in config.items() if key not in RECORDS and (key in own or value)}
        return {"config": {"peft_type": kind, **given}}

    def build(self, sites: list[Site]) -> Built:
        return Built({}, {})

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model wrapped by PEFT: only PEFT's parameters are trained, in fp32.

        The base's parameters get the names that PEFT gives them, with the prefix ``base_model.model.``.

        Raises:
            UserError: PEFT is not installed or does not know the method or a key, or the method does not fit the model.
        """
        config = self._config()
        _bound_patterns(config, model)
        self._check_tokens(config, model)
        import peft

        try:
            wrapped: nn.Module = peft.get_peft_model(model, config, adapter_name=ADAPTER)
        except (ValueError, TypeError, KeyError, NotImplementedError, ImportError) as error:
            raise self._error(f"PEFT cannot use it with {type(model).__name__}: {error}") from None
        if config.is_prompt_learning:
            model.gradient_checkpointing_enable = _no_checkpointing  # type: ignore[assignment]
            wrapped.register_forward_hook(_without_prompt, with_kwargs=True)
            wrapped.generate = partial(_generate, wrapped)  # type: ignore[assignment]
        else:
            saved = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
            if sum(t.numel() for t in saved.values()) > trained:
                raise self._error(
                    "it has frozen tensors of its own, which would not be saved; try save_projection: false"
                )
        narrow = [n for n, p in wrapped.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if narrow:  # copies of the base's own weights: PEFT leaves them in the model's dtype
            raise UserError(
                f"model.dtype must be float32 for this adapter.config: PEFT trains {narrow[0]} in the dtype of the "
                "model, and small steps would be lost in a narrower dtype",
                key="model.dtype",
            )
        return wrapped

    def merged(self, load_base: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._config().is_prompt_learning:
            raise UserError(
                f"adapter.config: {self.peft_type} cannot be merged: it does not change the base's weights; --format "
                "peft writes it for PEFT"
            )
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        from ..adapters.saved import load_tensors

        wrapped = self.wrap(load_base())
        if any(ADAPTER in name.split(".") for name in tensors):
            load_tensors(wrapped, tensors, origin="the adapter's file")
            whole = set[str]()
        else:
            whole = self._load_file(wrapped, tensors)
        layers = {n: m for n, m in wrapped.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}
        for module in layers.values():
            if isinstance(module, BaseTunerLayer):  # PEFT merges in place, which would change a tied weight elsewhere
                for name, weight in module.get_base_layer().named_parameters(recurse=False):
                    own = nn.Parameter(weight.detach().clone(), requires_grad=False)
                    setattr(module.get_base_layer(), name, own)
        # a layer can be wrapped twice
        changed = whole | {_inner(name.removeprefix("base_model.model.")) for name in layers}
        try:
            result: nn.Module = wrapped.merge_and_unload()  # type: ignore[operator]
        except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
            raise UserError(f"adapter.config: {self.peft_type} cannot be merged: {error}") from None
        return {
            f"{path}.{name}": parameter.detach()
            for path in changed
            for name, parameter in result.get_submodule(path).named_parameters(recurse=False)
        }

    @property
    def unmerged(self) -> str | None:
        prompt = self._config().is_prompt_learning
        return f"{self.peft_type} adds to the prompt, not to weights" if prompt else None

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
        if any(ADAPTER in name.split(".") for name in tensors):
            super().load(model, tensors, origin)
        elif self._config().is_prompt_learning:
            self._load_prompt(model, tensors)
        else:
            self._load_file(model, tensors)

    def save(self, base: nn.Module, tensors: Mapping[str, Tensor], directory: Path) -> None:
        """Write the saved tensors of an adapter as PEFT writes them."""
        from ..adapters.saved import load_tensors

        wrapped = self.wrap(base)
        load_tensors(wrapped, tensors, origin="the adapter's file")
        wrapped.save_pretrained(str(directory))  # type: ignore[operator]

    def _load_prompt(self, wrapped: Any, tensors: Mapping[str, Tensor]) -> None:
        """Load PEFT's file of a prompt or prefix, which holds what the encoder of the prompt made."""
        config, prompt = wrapped.active_peft_config, tensors.get("prompt_embeddings")
        if prompt is None or len(tensors) > 1 or len(prompt) != config.num_virtual_tokens:
            raise UserError(
                f"the adapter does not fit its config: {self.peft_type} with num_virtual_tokens "
                f"{config.num_virtual_tokens} has one tensor, prompt_embeddings, with as many rows"
            )
        place = wrapped.prompt_encoder[ADAPTER].embedding
        place.weight = nn.Parameter(prompt.to(place.weight.device), requires_grad=place.weight.requires_grad)
        config.inference_mode = True  # the encoder is not needed, and its values are not in the file

    def _load_file(self, wrapped: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
        """Load tensors with the names of PEFT's files. Returns the paths of the base's modules that they replace."""
        import peft

        base = {n.removeprefix("base_model.model."): p for n, p in wrapped.named_parameters(remove_duplicate=False)}
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        for name, shape in shapes.items():
            path = name.removeprefix("base_model.model.")
            module, _, leaf = path.rpartition(".")
            places = (f"{module}{inner}.{leaf}" for inner in ("", ".base_layer", ".original_module"))
            place = next((base[name] for name in places if name in base), None)
            if place is not None and tuple(place.shape) != shape:
                raise UserError(
                    f"the adapter's {path} has shape {shape}, the base's {tuple(place.shape)}: it was trained with "
                    f"other tokens. Load the base, call model.resize_token_embeddings({shape[0]}), save it with the "
                    "adapter's tokenizer, and give it with --base"
                )
        try:
            found = peft.set_peft_model_state_dict(wrapped, dict(tensors), adapter_name=ADAPTER)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"PEFT cannot load the adapter: {' '.join(str(error).split())[:300]}") from None
        own = {name for name, p in wrapped.named_parameters() if p.requires_grad}
        if wrong := sorted(set(found.unexpected_keys)) or sorted(own.intersection(found.missing_keys)):
            what = "left over" if found.unexpected_keys else "missing"
            raise UserError(f"the adapter does not fit this model and config; {what}: {wrong[0]} ({len(wrong)} in all)")
        whole = {id(base[path]) for name in tensors if (path := name.removeprefix("base_model.model.")) in base}
        return {_inner(path.rpartition(".")[0]) for path, parameter in base.items() if id(parameter) in whole}

    @property
    def peft_type(self) -> str:
        return str(self.config.get("peft_type", "")).upper()

    def _config(self) -> peft.PeftConfig:
        known = _known()
        if self.peft_type not in known:
            usable = ", ".join(sorted(known.keys() - NEEDS_MORE.keys()))
            raise UserError(
                f"adapter.config.peft_type must be a method of PEFT, got {self.config.get('peft_type')!r}; PEFT has "
                f"{usable} (for Houlsby's or Pfeiffer's adapters use adapter.method: bottleneck)",
                key="adapter.config",
            )
        if self.peft_type in NEEDS_MORE:
            raise self._error(f"it needs {NEEDS_MORE[self.peft_type]}")
        keys = {key: value for key, value in self.config.items() if key not in ("peft_type", "task_type")}
        try:
            return known[self.peft_type](task_type="CAUSAL_LM", **keys)
        except (ValueError, TypeError, KeyError) as error:
            raise self._error(
                f"PEFT says: {str(error).removeprefix(known[self.peft_type].__name__ + '.__init__() ')}"
            ) from None

    def _check_tokens(self, config: Any, model: nn.Module) -> None:
        """Raise ``UserError`` if the base has no rows for tokens that the configuration names."""
        given = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
        lists = given.values() if isinstance(given, dict) else [given]
        wanted = max((id for ids in lists for id in ids if isinstance(id, int)), default=-1) + 1
        if wanted > (rows := len(model.get_input_embeddings().weight)):  # type: ignore[operator, union-attr, arg-type]
            raise self._error(
                f"it has a row for the token {wanted - 1}, and the base has {rows} rows. Load the base, call "
                f"model.resize_token_embeddings({wanted}), save it with the adapter's tokenizer, and give it with "
                "--base (or model.name)"
            )

    def _error(self, why: str) -> UserError:
        return UserError(f"adapter.config: {self.peft_type}: {why}", key="adapter.config")


def _inner(path: str) -> str:
    """Return the path of a module in the base, without the parts that PEFT's wrappers insert."""
    return re.sub(r"\.(base_layer|token_adapter|original_module)\b", "", path)


def _known() -> dict[str, type[peft.PeftConfig]]:
    """Return the configurations of PEFT's own methods by the name of the method. Raises ``UserError`` without PEFT."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapter.method: peft needs the PEFT library: pip install peft", key="adapter.method")
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    own = PEFT_TYPE_TO_CONFIG_MAPPING.items()  # other packages (this one too) add their methods under plain names
    return {str(kind.value): cls for kind, cls in own if isinstance(kind, PeftType)}


def _no_checkpointing(*args: Any, **kwargs: Any) -> None:
    # With checkpointing, the layers of transformers drop the cache that carries the prefix.
    raise UserError(
        "training.activation_checkpointing must be false for the prompt and prefix methods of PEFT",
        key="training.activation_checkpointing",
    )


def _without_prompt(wrapped: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Cut the logits after forward to those of the sequence itself, without the virtual tokens before it."""
    given: Tensor = args[0] if args else kwargs["input_ids"]
    output.logits = output.logits[:, -given.shape[1] :]
    return output


def _generate(wrapped: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate with the virtual tokens before each text. PEFT's own ``generate`` does not fit the caches of
    transformers 5, and counts padding on the left as tokens between the virtual ones and the text."""
    base = wrapped.base_model
    own, before = base.forward, dict(vars(base))
    base.forward = partial(_with_prompt, wrapped, own)
    try:
        return base.generate(*args, **kwargs)
    finally:
        del base.forward
        if "forward" in before:
            base.forward = before["forward"]


def _with_prompt(
    wrapped: Any,
    forward: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **others: Any,
) -> Any:
    """Compute the base's outputs for the next tokens of texts that begin with the virtual tokens."""
    rows, length = input_ids.shape
    number = wrapped.active_peft_config.num_virtual_tokens
    others.pop("position_ids", None)
    if others.get("use_cache") is False:
        past_key_values = None
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    if attention_mask is None:
        attention_mask = input_ids.new_ones(rows, max(seen - number, 0) + length)
    mask = torch.cat([attention_mask.new_ones(rows, number), attention_mask], 1)
    given: dict[str, Any] = {"input_ids": input_ids}
    if not seen and wrapped.active_peft_config.peft_type == "PREFIX_TUNING":
        past_key_values = wrapped.get_prompt(batch_size=rows)
    elif not seen:
        tokens = wrapped.word_embeddings(input_ids)
        prompt = wrapped.get_prompt(batch_size=rows).to(tokens.dtype)
        given, length = {"inputs_embeds": torch.cat([prompt, tokens], 1)}, number + length
    if "position_ids" in inspect.signature(forward).parameters:
        given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    output = forward(attention_mask=mask, past_key_values=past_key_values, **given, **others)
    output.logits = output.logits[:, -input_ids.shape[1] :]
    return output


def _bound_patterns(config: Any, model: nn.Module) -> None:
    """Match the expressions of a configuration within a bound of time, which PEFT does not have: those that select
    modules become lists of names."""
    names = [name for name, _ in model.named_modules() if name]
    for key in ("target_modules", "exclude_modules"):
        text = getattr(config, key, None)
        if isinstance(text, str) and text.lower() != "all-linear":
            matches = path_pattern(text, f"adapter.config.{key}")
            found = {name for name in names if matches(name)}
            if key == "target_modules" and not found:
                raise UserError(
                    f"adapter.config.{key}: the pattern {text!r:.200} matches no module", key="adapter.config"
                )
            setattr(config, key, found or None)
    for key in ("rank_pattern", "alpha_pattern"):
        values = getattr(config, key, None) or {}
        found_values: dict[str, object] = {}
        for text, value in values.items():
            matches = path_pattern(rf"(.*\.)?({text})", f"adapter.config.{key}")
            for name in names:
                if matches(name):
                    found_values.setdefault(re.escape(name), value)
        if values:
            setattr(config, key, found_values)
