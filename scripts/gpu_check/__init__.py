"""Prove and measure everything on the GPU of this machine, with one command (docs/GPU.md)."""
