"""Turn an adapter and its base into an ordinary checkpoint (``merge``) or into an adapter for other programs
(``export_lora``, ``export_peft``), and a fine-tuned checkpoint back into an adapter (``extract``)."""

from .extract import ExtractReport, Fit, extract
from .lora import ExportReport, export_lora
from .merged import MergeReport, merge
from .options import Base, Rounding, Writing
from .peft_format import export_peft
from .source import find_adapter
from .verify import VerifyReport, verify

__all__ = [
    "Base",
    "ExportReport",
    "ExtractReport",
    "Fit",
    "MergeReport",
    "Rounding",
    "VerifyReport",
    "Writing",
    "export_lora",
    "export_peft",
    "extract",
    "find_adapter",
    "merge",
    "verify",
]
