"""Write a model card for an output directory, and upload the directory if the user asks for the upload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..errors import UserError
from ..io.atomic_dir import size
from ..io.json_file import field
from ..io.run_dir import RunDirectory

CITATION = """@inproceedings{he2025rasa,
  title     = {RaSA: Rank-Sharing Low-Rank Adaptation},
  author    = {He, Zhiwei and others},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2503.12576}
}"""


def write_card(directory: Path, run: Path, report: Mapping[str, Any]) -> str:
    """Write ``README.md`` into an output directory, replacing the base's model card. Returns the text.

    Args:
        run: a run directory, whose recipe and summary are quoted, or an adapter directory, which has neither.
        report: the report of the merge, export or extraction. Its ``verify`` entry, if any, is quoted too.
    """
    merged = report.get("format") == "merged"
    head = {
        "base_model": report["base_model"],
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["rasa_train", *sorted(set(str(report["method"]).replace("+", " ").split()) - {"1"})],
    }
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {directory.name}"]
    what = "merged into" if merged else "an adapter for"
    parts.append(f"{report['method']} {what} `{report['base_model']}`, made with rasa_train.")
    made = RunDirectory(run)
    if made.recipe.is_file():
        recipe = made.stored_recipe()
        data = field(recipe, "data", dict, made.recipe, {})
        parts.append(f"## Data\n\n{_datasets(data)}, template `{data.get('template')}`.")
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        parts.append(f"## Recipe\n\n```yaml\n{text.strip()}\n```")
    if made.summary.is_file():
        summary = made.read_summary()
        rows = [f"| {key} | {value} |" for key, value in summary.items() if not isinstance(value, dict)]
        if isinstance(best := summary.get("best"), dict):
            rows.append(f"| best | step {best.get('step')}, {best.get('measure')} {best.get('value')} |")
        parts.append("## Training\n\n| | |\n|---|---|\n" + "\n".join(rows))
    facts = {**report, **report.get("verify", {})}
    facts = {key: value for key, value in facts.items() if isinstance(value, int | float) and key != "seconds"}
    parts.append(
        "## Conversion\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    )
    parts.append(f"## Citation\n\n```bibtex\n{CITATION}\n```")
    text = "\n\n".join(parts) + "\n"
    (directory / "README.md").write_text(text)
    return text


def _datasets(data: Mapping[str, Any]) -> str:
    """Return the names of the sets of a recipe's section ``data``, with their weights."""
    mix = data.get("mix")
    if not isinstance(mix, list):
        return f"`{data.get('dataset')}`"
    sets = [one for one in mix if isinstance(one, dict)]
    return ", ".join(
        f"`{one.get('dataset')}`" + (f" (weight {one['weight']})" if one.get("weight") is not None else "")
        for one in sets
    )


def push(directory: Path, repository: str, *, upload: bool) -> str:
    """Upload a directory to a private repository on the hub. Returns a description of what was uploaded, or, without
    ``upload``, of what would be.

    Raises:
        UserError: the hub refuses the upload, or there is no network or no login.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    total = size(sum(path.stat().st_size for path in files))
    listed = "\n".join(f"  {path.relative_to(directory)}  {size(path.stat().st_size)}" for path in files)
    if not upload:
        return f"not uploaded (add --upload to upload): {len(files)} files, {total}, to {repository}\n{listed}"
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        address = api.upload_folder(repo_id=repository, folder_path=directory)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"--push {repository}: {' '.join(str(error).split())[:400]}") from None
    return f"uploaded {len(files)} files, {total}: {address}"
