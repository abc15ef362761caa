"""Low-rank approximations of weight updates."""
