"""Runs compared: tables, curves, and one HTML page that needs nothing else."""
