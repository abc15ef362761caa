"""Training data: from a dataset's name to padded batches of tokens.

The path of the data: ``config.DataConfig`` -> ``sources`` (rows) -> ``columns`` (what a row means) -> ``encode``
(text and loss mask) -> ``prepare`` (tokenised once, ``cache``) -> ``batching`` (which examples form a step,
padded tensors).

Only the configuration is imported here, which is all that a recipe needs. Of the other files only ``batching`` loads
torch.
"""

from .config import DataConfig, ValidationConfig

__all__ = ["DataConfig", "ValidationConfig"]
