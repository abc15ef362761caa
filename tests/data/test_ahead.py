from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from rasa_train.data.ahead import ahead


def test_the_same_items_in_the_same_order_by_another_thread() -> None:
    threads = set()

    def items() -> Iterator[int]:
        for i in range(20):
            threads.add(threading.current_thread())
            yield i

    assert list(ahead(items(), depth=3)) == list(range(20))
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_items_are_made_before_they_are_asked_for_and_no_more_than_depth() -> None:
    made = [threading.Event() for _ in range(10)]

    def items() -> Iterator[int]:
        for i in range(10):
            made[i].set()
            yield i

    with closing(ahead(items(), depth=2)) as some:
        assert next(some) == 0
        assert made[2].wait(120), "two are made while the first is used"
        assert not made[3].is_set()


def test_an_error_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    some = ahead(items())
    assert next(some) == 1
    with pytest.raises(ValueError, match="broken"):
        next(some)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    some = ahead(iter(range(100)))
    next(some)
    some.close()
    assert threading.active_count() == before
