"""rasa_train: fine-tune language models with RaSA, LoRA and their relatives, from one YAML recipe."""

__version__ = "0.1.0"
