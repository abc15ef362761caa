"""Base models: loading them, and all that is known of model families by name."""
