"""Analyse weight updates: reconstruction, spectra and subspaces. The functions work on tensors; ``plots`` draws."""
