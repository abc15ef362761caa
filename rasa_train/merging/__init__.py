"""Adapter + base -> an ordinary checkpoint (``merge``), or an adapter for other programs (``export_lora``,
``export_peft``); and back from a fine-tuned checkpoint to an adapter (``extract``)."""

from .extract import ExtractReport, extract
from .lora import ExportReport, export_lora
from .merged import MergeReport, merge
from .peft_format import export_peft
from .source import find_adapter
from .verify import VerifyReport, verify

__all__ = [
    "ExportReport",
    "ExtractReport",
    "MergeReport",
    "VerifyReport",
    "export_lora",
    "export_peft",
    "extract",
    "find_adapter",
    "merge",
    "verify",
]
