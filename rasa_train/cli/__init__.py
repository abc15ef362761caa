"""The commands, one file each. Heavy imports stay inside the functions, so that ``--help`` answers at once."""

import os

# Set before torch starts CUDA, and for the worker processes too: blocks of memory grow in place. Batches have many
# shapes, and with blocks of fixed sizes a GPU runs out of memory while much of its memory is free in small pieces.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
