"""Export LoRA, VeRA, DoRA and PEFT's own methods in the format that PEFT has for the method, so that PEFT can train
them further."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ..adapters.contract import Method, PeftConfig
from ..adapters.saved import CONFIG, PEFT_TENSORS, SavedAdapter, read_adapter, tokenizer_files
from ..errors import UserError
from ..io.atomic_dir import new_directory
from ..io.checksums import write_checksums
from ..io.json_file import read_object
from ..methods.dora import DoRA
from ..methods.from_peft import Peft
from ..methods.lora import LoRA
from ..methods.vera import VeRA
from ..models.config import ModelConfig
from ..models.load import load_model
from ..models.words import rows_after
from . import peft_load
from .head import for_peft
from .lora import ExportReport, target_modules
from .options import Base
from .source import Source, check_identity, find_adapter, find_base, find_tokenizer, open_source


def export_peft(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Base | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the adapter as PEFT would have saved it. Only the base's configuration is read, not its weights.

    Raises:
        UserError: PEFT does not have this method, the adapter does not fit, or ``output`` cannot be written.
    """
    start = time.perf_counter()
    saved = read_adapter(find_adapter(Path(adapter)))
    if isinstance(saved.method, Peft):
        return _save(saved, saved.method, output, Base.of(base), overwrite)
    source = open_source(adapter, base, weights=False)
    config, names = _format(saved.method)
    if fused := [site for site in source.sites if site.num_experts is not None or site.rows is not None]:
        raise UserError(
            f"{fused[0].path} is held in a fused weight, which --format peft does not support: use --format lora, "
            "which PEFT reads as exactly the same update (for lora and vera), or --format merged"
        )
    head, of_head = for_peft(source)
    tensors = _tensors(source, names) | head
    config |= {
        **of_head,
        "base_model_name_or_path": source.base,
        "fan_in_fan_out": any(site.transposed for site in source.sites),
        "target_modules": target_modules(source.model, source.sites),
    }
    written, tried = _write(source, config, tensors, Path(output), overwrite)
    return ExportReport(
        output=str(output),
        format="peft",
        method=source.label,
        base_model=source.base,
        tensors=len(tensors),
        adapted=len(source.sites),
        bytes=written,
        seconds=round(time.perf_counter() - start, 3),
        rounding=0.0,
        base_checked=source.checked,
        rank=max(source.adapters[site.path].effective_rank for site in source.sites),
        error=0.0,
        max_lora_rank=None,
        peft_loads=tried or None,
        vocabulary=rows_after(source.model),
    )


def _write(
    source: Source, config: PeftConfig, tensors: dict[str, Tensor], output: Path, overwrite: bool
) -> tuple[int, bool]:
    """Write the adapter. Return the bytes of its tensors, and whether PEFT has loaded it, which needs PEFT."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    inputs = [*source.origins, *([source.directory] if Path(source.base).is_dir() else [])]
    with new_directory(output, overwrite=overwrite, inputs=inputs, nbytes=nbytes) as partial:
        # write_bytes follows the umask, so others may be able to read the file
        (partial / PEFT_TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
        _complete(partial, config, find_tokenizer(source))
        if (tried := peft_load.is_installed()) and (why := peft_load.refusal(partial, source, scale=None)):
            raise UserError(
                f"PEFT does not load this adapter into {type(source.model).__name__}: {why}. Nothing is written: use "
                "--format lora (for lora and vera), or --format merged"
            )
        return (partial / PEFT_TENSORS).stat().st_size, tried


def _save(saved: SavedAdapter, method: Peft, output: str | Path, base: Base, overwrite: bool) -> ExportReport:
    """Let PEFT write one of its own methods, which needs the whole base in memory."""
    start = time.perf_counter()
    name, directory = find_base(saved, base.name, base.revision, weights=True)
    checked = base.any_base or check_identity(saved, directory)
    model = load_model(ModelConfig(name=str(directory), dtype="float32"), saved.head)
    inputs = [saved.directory, *([directory] if Path(name).is_dir() else [])]
    nbytes = sum(tensor.nbytes for tensor in saved.tensors.values())
    with new_directory(Path(output), overwrite=overwrite, inputs=inputs, nbytes=nbytes) as partial:
        method.save(model, saved.tensors, partial)
        config = read_object(partial / CONFIG)
        _complete(partial, {**config, "base_model_name_or_path": name}, tokenizer_files(saved.directory))
        written = (partial / PEFT_TENSORS).stat().st_size
    return ExportReport(
        output=str(output),
        format="peft",
        method=method.peft_type,
        base_model=name,
        tensors=len(saved.tensors),
        adapted=0,
        bytes=written,
        seconds=round(time.perf_counter() - start, 3),
        rounding=0.0,
        base_checked=checked,
        rank=0,
        error=0.0,
        max_lora_rank=None,
        peft_loads=True,
    )


def _complete(directory: Path, config: Mapping[str, object], tokenizer: Sequence[Path]) -> None:
    """Write the configuration and the tokenizer beside the tensors, and the checksums of the first two."""
    for path in tokenizer:
        shutil.copyfile(path, directory / path.name)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    write_checksums(directory, [directory / CONFIG, directory / PEFT_TENSORS])


def _format(method: Method) -> tuple[PeftConfig, dict[str, str]]:
    """Return PEFT's configuration, and PEFT's name of each of the adapter's tensors by our name."""
    config: PeftConfig
    if isinstance(method, LoRA | DoRA):
        config = {"peft_type": "LORA", "r": method.r, "lora_alpha": method.alpha, "lora_dropout": method.dropout}
        names = {"A": "lora_A.weight", "B": "lora_B.weight"}
        if isinstance(method, DoRA):
            return {**config, "use_dora": True}, {**names, "m": "lora_magnitude_vector"}
        return {**config, "use_rslora": method.rslora}, names
    if isinstance(method, VeRA):
        config = {
            "peft_type": "VERA",
            "r": method.r,
            "d_initial": method.d_initial,
            "vera_dropout": method.dropout,
            "projection_prng_key": method.projection_seed,
            "save_projection": True,  # so that the result does not depend on what torch draws from the seed
        }
        return config, {"b": "vera_lambda_b", "d": "vera_lambda_d"}
    raise UserError(
        f"adapter.method: --format peft is for lora, dora, vera and peft, got {method.method}: use --format lora, "
        "which writes any other factor method as an equivalent LoRA"
    )


def _tensors(source: Source, names: dict[str, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site in source.sites:
        adapter = source.adapters[site.path]
        own = dict(adapter.named_parameters())
        for ours, theirs in names.items():
            tensors[f"base_model.model.{site.path}.{theirs}"] = own[ours].detach().contiguous()
    if "b" in names:
        pool = source.adapters[source.sites[0].path].pool  # type: ignore[attr-defined]
        tensors |= {f"base_model.vera_{side}": getattr(pool, side).contiguous() for side in "AB"}
    return tensors
