"""pass@k against counting: every choice of k samples, one by one."""

from __future__ import annotations

from itertools import combinations

import pytest

from rasa_train.evaluate.passk import mean_pass_at_k, pass_at_k, without_pass_at_k


@pytest.mark.parametrize("n", [1, 4, 7])
def test_equals_the_share_of_choices_with_a_pass(n: int) -> None:
    for passed in range(n + 1):
        samples = [i < passed for i in range(n)]
        for k in range(1, n + 1):
            choices = list(combinations(samples, k))
            assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_hand_made_counts() -> None:
    # 50 samples, 5 pass: 1 - 45/50, and 1 - C(45,10)/C(50,10) computed factor by factor
    product = 1.0
    for i in range(10):
        product *= (45 - i) / (50 - i)
    assert mean_pass_at_k([(50, 5)]) == pytest.approx({"pass@1": 0.1, "pass@10": 1 - product})
    assert mean_pass_at_k([(10, 10), (10, 0)]) == {"pass@1": 0.5, "pass@10": 0.5}
    assert mean_pass_at_k([(10, 1), (9, 0)]).keys() == {"pass@1"}, "one problem has too few samples for pass@10"
    assert without_pass_at_k([(10, 1), (9, 0)]) == {
        "pass@10": "needs 10 samples of every problem; 1 of 2 have fewer, the fewest 9"
    }
    assert without_pass_at_k([(10, 1), (10, 0)]) == {}


@pytest.mark.parametrize(("samples", "passed", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0)])
def test_impossible_counts_are_refused(samples: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(samples, passed, k)
