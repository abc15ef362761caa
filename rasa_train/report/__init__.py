"""Compare runs: tables, curves, and one self-contained HTML page."""
