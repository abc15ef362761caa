"""Adapter + base -> an ordinary checkpoint (``merge``), or an exactly equal LoRA (``export_lora``)."""

from .lora import ExportReport, export_lora
from .merged import MergeReport, merge
from .source import find_adapter

__all__ = ["ExportReport", "MergeReport", "export_lora", "find_adapter", "merge"]
