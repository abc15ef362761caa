"""Base models: loading them, and everything the package knows about model families by name."""
