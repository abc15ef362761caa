"""Low-rank approximation of updates."""
