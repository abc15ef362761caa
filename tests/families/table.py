"""Run every model family and write what happened as the table of docs/MODELS.md: ``make test-families``.

    python -m tests.families.table [NAME ...]

With names only these run, and the page stays as it is. The exit code is 1 if anything went wrong without a word, or
ended in a traceback.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import transformers

from tests.doc_pages import ROOT

from .harness import Outcome, Record, examine
from .specs import FAMILIES, UNBUILT

PAGE = ROOT / "docs" / "MODELS.md"
COLUMNS = ("train", "packed", "merge", "export")
PACKAGES = ("transformers", "torch", "peft")

TEXT = """# Model families

What rasa_train does with the model families of transformers, measured on tiny random models: four layers of width 32 in
fp32, with the demo's tokenizer, on a CPU. The page is written by

    make test-families

which runs the real commands for every row. It was last made with {versions}.

{counts}

- **train**: two steps of RaSA (r 4, k 1) on all linears, of 8 rows each. ok: the loss of the first step is that of
  transformers, which ran the same rows one by one without padding; a gradient reached every adapter; no router and no
  vision or audio tower was adapted; every weight came from the files, and no token saw a later one.
- **packed**: the same with `batching: packed`, for one step. ok: the loss is that of transformers again.
- **merge**: the merged checkpoint, loaded by the class that the base names. ok: its logits are those of the base with
  the adapter, which changes them by 0.05 at least.
- **export**: the adapter as a LoRA, loaded by PEFT. ok: the same.

The number after ok is the difference that was measured: losses may differ by 1e-5, logits by 1e-4. A refusal is one
message, which the remark gives, instead of a wrong result; what needs the refused step is not tried (-).

{table}

## Configurations that were not built

The installed transformers does not build these as tiny models, so nothing is known of them.

| family | reason |
|---|---|
{unbuilt}
"""


def main() -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = sys.argv[1:] or [name for name in FAMILIES if name not in UNBUILT]
    records = []
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            directory = Path(root, name)
            directory.mkdir()
            records.append(examine(name, directory))
            print(row(records[-1]), flush=True)
            shutil.rmtree(directory)
            gc.collect()
    faults = [f"{record.family}: {fault}" for record in records for fault in record.faults]
    print("\n".join([counts(records), *faults]))
    if not sys.argv[1:]:
        PAGE.write_text(page(records))
    return int(bool(faults))


def counts(records: list[Record]) -> str:
    """Return one sentence of the numbers of each outcome."""
    parts = []
    for column in COLUMNS:
        found = Counter(getattr(record, column).kind for record in records)
        parts.append(f"{column}: " + ", ".join(f"{found[kind]} {kind}" for kind in _KINDS if found[kind]))
    return f"{len(records)} configurations. {'; '.join(parts)}."


_KINDS = ("ok", "refused", "SILENT", "TRACEBACK")


def page(records: list[Record]) -> str:
    heading = "| family | class | train | packed | merge | export | remark |\n|---|---|---|---|---|---|---|\n"
    return TEXT.format(
        versions=", ".join(f"{package} {version(package).partition('+')[0]}" for package in PACKAGES),
        counts=counts(records),
        table=heading + "\n".join(map(row, records)),
        unbuilt="\n".join(f"| {name} | {reason} |" for name, reason in UNBUILT.items()),
    )


def row(record: Record) -> str:
    cells = [_cell(outcome) for outcome in record.outcomes.values()]
    told = [f"{name}: {_short(o.text)}" for name, o in record.outcomes.items() if o.kind not in ("ok", "-")]
    return f"| {' | '.join([record.family, record.model_class, *cells, '; '.join([*told, *record.remarks])])} |"


def kinds_of(family: str) -> list[str] | None:
    """Return the kinds of outcome that the page has for a family: of training, packing, merging and exporting."""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == family and len(cells) == 7:
            return [cell.split()[0] for cell in cells[2:6]]
    return None


def _cell(outcome: Outcome) -> str:
    return f"ok {outcome.text}".strip() if outcome.kind == "ok" else outcome.kind


def _short(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[:limit].rpartition(" ")[0] + " ..."


if __name__ == "__main__":
    sys.exit(main())
