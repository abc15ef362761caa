"""Task accuracy: MATH, GSM8K, HumanEval+ and forgetting, from a model or a run directory to the paper's table.

The path of an evaluation: ``cli/eval`` -> ``load`` (a model, or a base with an adapter merged in memory) -> ``suites``
(questions and prompts, from the YAML in ``tasks/``) -> ``generate`` (answers, resumable) -> ``score`` (``answers`` for
mathematics, ``sandbox`` and ``passk`` for code) -> ``results`` (one JSON file per suite and checkpoint, BEST and LAST).

This file imports nothing, so that the sandbox and the scores can be used without torch.
"""
