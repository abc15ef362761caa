"""Task accuracy: MATH, GSM8K, HumanEval+ and forgetting, from a model or a run directory to the paper's table.

The straight line: ``cli/eval`` -> ``load`` (a model, an adapter merged in memory) -> ``suites`` (questions and prompts,
from the YAML in ``tasks/``) -> ``generate`` (answers, resumable) -> ``score`` (``answers`` for mathematics, ``sandbox``
for code, ``passk``) -> ``results`` (one JSON a suite and checkpoint, BEST and LAST).

Only light things are imported here: the sandbox and the scores need no torch.
"""
