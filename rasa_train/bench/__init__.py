"""``rasa-bench``: engines side by side, counters that are the same on every machine, and data preparation."""
