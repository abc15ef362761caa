"""One training run: its state, its steps, its checkpoints."""
