"""One file a command. Heavy imports stay inside the functions, so that ``--help`` answers at once."""

import os

# Before torch starts CUDA, and for the worker processes too: blocks of memory that grow in place. Batches have many
# shapes, and with blocks of fixed sizes a GPU runs out of memory while much of it lies free in pieces.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
