from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq
from transformers.trainer_pt_utils import get_length_grouped_indices

from rasa_train.data.batching import Limit, collate, flatten, pack_batch, plan_epoch, split_batch, with_targets
from rasa_train.data.encode import Example

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=400).map(np.array)
BATCHINGS = st.sampled_from(["length-grouped", "shuffled", "sequential", "packed"])


@given(LENGTHS, BATCHINGS, st.integers(1, 64), st.integers(0, 9), st.integers(0, 9))
def test_plan_covers_every_example_once(lengths: Any, batching: Any, size: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(lengths, batching=batching, batch_size=size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(plan)) == list(range(len(lengths)))
    assert [len(batch) for batch in plan[:-1]] == [size] * (len(plan) - 1)
    assert 0 < len(plan[-1]) <= size
    again = plan_epoch(lengths, batching=batching, batch_size=size, seed=seed, epoch=epoch)
    assert all((a == b).all() for a, b in zip(plan, again, strict=True))
    if batching == "length-grouped":
        assert lengths[plan[0][0]] == lengths.max()
    if batching == "sequential":
        assert list(np.concatenate(plan)) == list(range(len(lengths)))


@pytest.mark.parametrize("batching", ["length-grouped", "shuffled"])
def test_plan_changes_with_seed_and_epoch(batching: Any) -> None:
    lengths = np.arange(500) % 37
    plans = {
        tuple(np.concatenate(plan_epoch(lengths, batching=batching, batch_size=8, seed=seed, epoch=epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(plans) == 9


def test_length_groups_are_those_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same permutation, transformers' sampler gives the same order."""
    lengths = np.random.default_rng(0).permutation(30_000)  # all different: nothing hangs on how ties are broken
    order = np.random.default_rng([7, 3]).permutation(len(lengths))
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.from_numpy(order))
    expected = get_length_grouped_indices(lengths.tolist(), batch_size=192)
    plan = plan_epoch(lengths, batching="length-grouped", batch_size=192, seed=7, epoch=3)
    assert list(np.concatenate(plan)) == expected


def padded(micro: list[np.ndarray], lengths: np.ndarray) -> int:
    return sum(int(lengths[part].max()) * len(part) for part in micro if len(part))


@given(LENGTHS, st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_split_is_exact_equal_and_deterministic(lengths: Any, micro: int, workers: int, random: Any) -> None:
    batch = np.array(random.sample(range(len(lengths)), random.randint(1, len(lengths))))
    parts = split_batch(batch, lengths, micro_batch_size=micro, num_workers=workers)
    assert len(parts) == workers
    assert {len(worker) for worker in parts} == {-(-len(batch) // (micro * workers))}
    alone = split_batch(batch, lengths, micro_batch_size=micro, num_workers=1)[0]
    together = [part for worker in parts for part in worker if len(part)]
    assert sorted(map(tuple, together)) == sorted(map(tuple, alone))  # whoever computes them
    flat = [index for worker in parts for part in worker for index in part]
    assert sorted(flat) == sorted(batch)
    assert max(len(part) for worker in parts for part in worker) <= micro
    again = split_batch(batch, lengths, micro_batch_size=micro, num_workers=workers)
    assert all((a == b).all() for w, v in zip(parts, again, strict=True) for a, b in zip(w, v, strict=True))


def test_split_of_a_paper_batch_is_balanced_and_tight() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.5, 0.6, 192).astype(int).clip(20, 4096)
    parts = split_batch(rng.permutation(192), lengths, micro_batch_size=3, num_workers=8)
    work = [padded(worker, lengths) for worker in parts]
    assert {len(part) for worker in parts for part in worker} == {3}
    assert max(work) < 1.05 * min(work)
    assert sum(work) < 1.2 * lengths.sum()  # a fifth of padding; 8 workers cut from a random order need far more


def test_one_worker_with_room_keeps_the_order_of_the_file() -> None:
    parts = split_batch(np.arange(4), np.array([3, 9, 1, 7]), micro_batch_size=4, num_workers=1)
    assert [[list(part) for part in worker] for worker in parts] == [[[0, 1, 2, 3]]]


def test_more_workers_than_examples_gives_empty_micro_batches() -> None:
    parts = split_batch(np.array([4]), np.arange(9), micro_batch_size=2, num_workers=3)
    assert [[list(part) for part in worker] for worker in parts] == [[[4]], [[]], [[]]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_as_hugging_face_does(characters: Any, side: Any) -> None:
    rng = np.random.default_rng(0)
    examples = [
        Example(ids, np.where(rng.random(n) < 0.5, ids, -100).astype(np.int32))
        for n in (3, 9, 17)
        for ids in [rng.integers(3, 90, n).astype(np.int32)]
    ]
    for example in examples:
        example.labels[0] = -100
    characters.pad_token = "</s>"
    characters.padding_side = side
    reference = DataCollatorForSeq2Seq(characters, pad_to_multiple_of=8, return_tensors="pt")
    expected = reference([{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples])
    found = collate(examples, pad_token_id=characters.pad_token_id, side=side)
    assert found is not None
    assert found["input_ids"].shape == (3, 24)
    for name, tensor in found.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, expected[name]), name


def test_collate_never_asks_for_the_first_token() -> None:
    ids = np.array([5, 6, 7], np.int32)
    for side in ("left", "right"):
        batch = collate([Example(ids, ids)], pad_token_id=0, pad_to_multiple_of=4, side=side)  # type: ignore[arg-type]
        assert batch is not None
        assert (batch["labels"] != -100).sum() == (batch["labels"][:, 1:] != -100).sum() == 2


def test_collate_of_nothing_is_none() -> None:
    assert collate([], pad_token_id=0) is None


@given(LENGTHS, st.integers(1, 3000), st.integers(1, 5), st.booleans(), st.randoms(use_true_random=False))
def test_packs_are_exact_and_within_the_budget(
    lengths: Any, tokens: int, workers: int, busy: bool, random: Any
) -> None:
    batch = np.array(random.sample(range(len(lengths)), random.randint(1, len(lengths))))
    multiple = workers if busy else 1
    parts = pack_batch(batch, lengths, max_tokens=tokens, num_workers=workers, multiple_of=multiple)
    assert len(parts) == workers and len({len(worker) for worker in parts}) == 1
    together = [part for worker in parts for part in worker if len(part)]
    assert sorted(index for part in together for index in part) == sorted(batch)
    limit = max(tokens, lengths[batch].max())
    sums = [lengths[part].sum() for part in together]
    assert max(sums) <= limit
    # Any two of the fullest packing would overflow together: at most twice as many as there must be, and one.
    assert len(together) <= 2 * -(-lengths[batch].sum() // limit) + multiple
    if busy:
        assert len(together) % workers == 0 or len(together) == len(batch)
    else:
        alone = pack_batch(batch, lengths, max_tokens=tokens, num_workers=1)[0]
        assert sorted(map(tuple, together)) == sorted(map(tuple, alone))  # whoever computes them


def test_packs_of_a_paper_batch_are_full_and_equal() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.5, 0.6, 192).astype(int).clip(20, 4096)
    parts = pack_batch(rng.permutation(192), lengths, max_tokens=8192, num_workers=1)[0]
    sums = [int(lengths[part].sum()) for part in parts]
    assert len(sums) == -(-lengths.sum() // 8192) and max(sums) < 1.01 * min(sums)


def test_a_limit_is_of_examples_or_of_tokens() -> None:
    lengths, batch = np.array([5, 4, 3, 2]), np.arange(4)
    assert [len(part) for part in Limit(examples=3).split(batch, lengths, 1)[0]] == [2, 2]
    assert [lengths[part].sum() for part in Limit(tokens=9).split(batch, lengths, 1)[0]] == [7, 7]


def test_flatten_puts_examples_one_after_the_other() -> None:
    a = Example(np.array([5, 6, 7], np.int32), np.array([5, 6, 7], np.int32))
    b = Example(np.array([8, 9], np.int32), np.array([-100, 9], np.int32))
    row = flatten([a, b], pad_to_multiple_of=4)
    assert row is not None and flatten([]) is None
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert row["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, -100]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert row["cu_seq_lens_q"].tolist() == row["cu_seq_lens_k"].tolist() == [0, 3, 5, 8]
    assert row["cu_seq_lens_q"].dtype == torch.int32 and row["max_length_q"] == row["max_length_k"] == 3


@pytest.mark.parametrize("flat", [False, True])
def test_targets_follow_their_positions(flat: bool) -> None:
    a = Example(np.array([5, 6, 7], np.int32), np.array([5, -100, 7], np.int32))
    b = Example(np.array([8, 9], np.int32), np.array([-100, 9], np.int32))
    rows = flatten([a, b]) if flat else collate([a, b], pad_token_id=0)
    batch = with_targets(rows or {})
    assert "labels" not in batch and batch["targets"].tolist() == [7, 9]
    flat_ids = batch["input_ids"].flatten()
    assert flat_ids[batch["positions"]].tolist() == [6, 8] and flat_ids[batch["positions"] + 1].tolist() == [7, 9]
