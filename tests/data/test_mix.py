"""``data.mix``: shares, which examples an epoch shows, what is held out, reports by set, and resuming."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_data import rows_of, write_lines
from transformers import PreTrainedTokenizerFast

from rasa_train.data.batching import Limit, plan_epoch
from rasa_train.data.config import DataConfig
from rasa_train.data.mixture import apportioned
from rasa_train.data.prepare import PreparedData, prepare, prepare_texts
from rasa_train.errors import UserError
from rasa_train.models.task import TaskConfig
from rasa_train.recipe.load import load_recipe
from rasa_train.recipe.sweep import grid


def token_rows(first: int, count: int) -> list[dict[str, list[int]]]:
    """Rows of tokens, each another one by its second token; the first third is not trained on."""
    rows = []
    for i in range(first, first + count):
        ids = [1, 3 + i, *[3 + (i * 7 + j) % 60 for j in range(2 + i % 11)], 2]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]})
    return rows


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.jsonl with 12 rows and b.jsonl with 36 others."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", token_rows(0, 12))
    write_lines(tmp_path / "b.jsonl", token_rows(12, 36))
    return tmp_path


def mixed(*sets: dict[str, Any], tokenizer: Any = None, **options: Any) -> PreparedData:
    task = options.pop("task", TaskConfig())
    return prepare(DataConfig(mix=list(sets), num_workers=1, **options), tokenizer, task=task)


A3, B1 = {"dataset": "a.jsonl", "weight": 3}, {"dataset": "b.jsonl", "weight": 1}


def shown(data: PreparedData, epoch: int, seed: int = 7) -> np.ndarray:
    found = data.train.epoch(seed, epoch)
    assert found is not None and len(found) == len(data.train)
    return found


def marks(dataset: Any) -> list[int]:
    """Identities of examples: their second token."""
    return [int(dataset[i].input_ids[1]) for i in range(len(dataset))]


def test_shares_are_within_one_example() -> None:
    for total, weights in itertools.product((1, 7, 100, 395_001), ([3, 1], [1, 1, 1], [0.1, 0.2, 0.7], [1e-9, 5, 1e9])):
        parts = apportioned(total, weights)
        assert sum(parts) == total
        assert all(abs(n - total * w / sum(weights)) < 1 for n, w in zip(parts, weights, strict=True))


def test_three_to_one(files: Path) -> None:
    data = mixed(A3, B1)
    assert len(data.train) == 48 and data.datasets == ("a.jsonl", "b.jsonl")
    assert data.examples_by_dataset == {"a.jsonl": 36, "b.jsonl": 12}
    assert data.notes == [
        "a.jsonl: 36 of 12 examples, each 3 times",
        "b.jsonl: 12 of 36 examples, the next epoch goes on with the others",
    ]
    seen: Counter[int] = Counter()
    for epoch in range(3):
        chosen = shown(data, epoch)
        assert np.bincount(data.train.origins[chosen]).tolist() == [36, 12]
        now = Counter(chosen.tolist())
        assert all(now[i] == 3 for i in range(12)) and max(now[i] for i in range(12, 48)) == 1
        seen += now
    assert all(seen[i] == 1 for i in range(12, 48))  # three epochs of a third: each row of b once
    # The tokens of an epoch, on average: what three epochs that show each row of b once have.
    lengths = data.train.lengths
    by_set = [int(sum(lengths[i] * seen[i] for i in part) / 3) for part in (range(12), range(12, 48))]
    assert list(data.tokens_by_dataset.values()) == by_set and data.stats.tokens == sum(by_set)
    again, other = mixed(A3, B1), mixed({**A3, "weight": 2}, B1)
    assert again.key == data.key != other.key
    assert [shown(again, e).tolist() for e in (0, 5)] == [shown(data, e).tolist() for e in (0, 5)]
    assert not np.array_equal(shown(data, 0), shown(data, 0, seed=8))
    copy = pickle.loads(pickle.dumps(data.train))
    assert marks(copy) == marks(data.train) and np.array_equal(copy.epoch(7, 2), shown(data, 2))
    some = data.train.select([40, 2, 13])
    assert some.origins.tolist() == [1, 0, 1] and marks(some) == [marks(data.train)[i] for i in (40, 2, 13)]
    assert np.array_equal(some.select([1]).supervised, data.train.supervised[[2]])


@pytest.mark.parametrize("weights", [(5, 2), (1, 30), (0.37, 0.63)])
def test_no_example_is_shown_twice_more_often_than_another(files: Path, weights: tuple[float, float]) -> None:
    data = mixed(*({"dataset": f"{n}.jsonl", "weight": w} for n, w in zip("ab", weights, strict=True)))
    together: Counter[int] = Counter()
    for epoch in range(7):
        now = Counter(shown(data, epoch).tolist())
        together += now
        for counts in (now, together):
            for part in (range(12), range(12, 48)):
                numbers = [counts[i] for i in part]
                assert max(numbers) - min(numbers) <= 1


def test_without_weights_a_mixture_is_the_files_one_after_another(files: Path) -> None:
    """The same examples, the same batches, and the same held-out number as of one file with the rows of both."""
    write_lines(files / "both.jsonl", token_rows(0, 48))
    data, whole = mixed({"dataset": "a.jsonl"}, {"dataset": "b.jsonl"}), prepare(DataConfig(dataset="both.jsonl"), None)
    assert marks(data.train) == marks(whole.train) and data.train.epoch(1, 1) is None and data.notes == []
    assert data.stats == whole.stats
    assert np.array_equal(data.train.lengths, whole.train.lengths)
    assert np.array_equal(data.train.supervised, whole.train.supervised)
    assert whole.datasets == ("both.jsonl",) and set(whole.train.origins) == {0}
    assert whole.examples_by_dataset == {"both.jsonl": 48}


@pytest.mark.parametrize("batching", ["length-grouped", "shuffled", "sequential", "packed"])
def test_every_batching_divides_what_an_epoch_shows(files: Path, batching: Any) -> None:
    data = mixed(A3, B1)
    lengths, chosen = data.train.lengths, shown(data, 1)
    plan = plan_epoch(lengths, batching=batching, batch_size=10, seed=7, epoch=1, shown=chosen)
    assert [len(batch) for batch in plan] == [10, 10, 10, 10, 8]
    assert Counter(np.concatenate(plan).tolist()) == Counter(chosen.tolist())
    limit = Limit(tokens=60) if batching == "packed" else Limit(examples=3)
    for batch in plan:  # repeated examples stay in the batch as often as they are in it, for any number of workers
        for workers in (1, 3):
            parts = [part for worker in limit.split(batch, lengths, workers) for part in worker]
            assert Counter(np.concatenate(parts).tolist()) == Counter(batch.tolist())
    if batching == "sequential":
        assert np.array_equal(np.concatenate(plan), chosen)
        assert data.train.origins[chosen].tolist() == [0] * 36 + [1] * 12


def test_held_out_examples_are_never_trained_on(files: Path) -> None:
    data = mixed(A3, B1, validation={"size": 4}, fraction=0.5)
    assert data.validation is not None and data.held_out == data.datasets
    assert np.bincount(data.validation.origins).tolist() == [1, 3]  # in proportion to 12 and 36
    assert len(data.train) == 5 + 16  # half of 11, and of 33
    held = set(marks(data.validation))
    names = marks(data.train)
    for epoch in range(6):
        assert held.isdisjoint({names[i] for i in shown(data, epoch)})
    share = mixed(A3, B1, validation={"size": 0.25})
    assert share.validation is not None and np.bincount(share.validation.origins).tolist() == [3, 9]


def test_the_same_rows_in_two_entries(files: Path, characters: PreTrainedTokenizerFast) -> None:
    twice = mixed(A3, B1, {**A3, "weight": 1}, validation={"size": 5})
    assert twice.datasets == ("a.jsonl #1", "b.jsonl", "a.jsonl #3")
    assert twice.validation is not None
    held, trained = marks(twice.validation), marks(twice.train)
    assert len(held) == len(set(held)) == 5 and not set(held) & set(trained)
    # an epoch of 11 + 32 + 11, since the rows that a holds out are trained on in neither entry
    assert list(twice.examples_by_dataset.items()) == list(zip(twice.datasets, (32, 11, 11), strict=True))
    # the same rows, but other examples of them
    write_lines(files / "c.jsonl", [{"query": f"q{i}", "response": f"r{i}"} for i in range(8)])
    ways = [{"dataset": "c.jsonl"}, {"dataset": "c.jsonl", "columns": {"query": "response", "response": "query"}}]
    assert len(mixed(*ways, tokenizer=characters, template="plain").train) == 16
    with pytest.raises(UserError, match=r"data\.mix\[0\] and data\.mix\[1\] read the same rows of c\.jsonl in two"):
        mixed(*ways, tokenizer=characters, template="plain", validation={"size": 2})


def test_validation_of_its_own_is_compared_with_every_set(files: Path) -> None:
    write_lines(files / "dev.jsonl", token_rows(48, 6))
    data = mixed(A3, B1, validation={"dataset": "dev.jsonl"})
    assert data.validation is not None and len(data.validation) == 6 and data.held_out == ("dev.jsonl",)
    (files / "copy.jsonl").write_bytes((files / "b.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"copy\.jsonl .* has the rows that are trained on \(b\.jsonl"):
        mixed(A3, B1, validation={"dataset": "copy.jsonl"})


def test_tokens_and_texts_together(files: Path, bpe: PreTrainedTokenizerFast) -> None:
    write_lines(files / "texts.jsonl", [{**row, "note": "x"} for row in rows_of(20)])
    write_lines(files / "other.jsonl", [{"frage": row["query"], "antwort": row["response"]} for row in rows_of(9)])
    other = {"dataset": "other.jsonl", "columns": {"query": "frage", "response": "antwort"}, "weight": 2}
    data = mixed(A3, {"dataset": "texts.jsonl", "weight": 1}, other, tokenizer=bpe)
    alone = prepare(DataConfig(dataset="other.jsonl", columns=other["columns"]), bpe).train
    last = [data.train[i].input_ids.tolist() for i in range(32, 41)]
    assert last == [alone[i].input_ids.tolist() for i in range(9)]
    assert "columns of texts.jsonl that are not used: note" in data.notes
    assert data.stats.rows == 41
    assert data.largest_id == max(int(data.train[i].input_ids.max()) for i in range(41))


def test_texts_to_classify(files: Path, bpe: PreTrainedTokenizerFast) -> None:
    """The sets have the same labels in the same order, also those that lack one of them."""
    write_lines(files / "one.jsonl", [{"text": f"good {i}", "label": "pos"} for i in range(6)])
    write_lines(files / "two.jsonl", [{"text": f"bad {i}", "label": "neg"} for i in range(3)])
    sets = [{"dataset": "one.jsonl", "weight": 1}, {"dataset": "two.jsonl", "weight": 2}]
    with pytest.raises(UserError, match=r"task\.labels: the labels of several sets must be named"):
        mixed(*sets, tokenizer=bpe, task=TaskConfig(name="classification"))
    data = mixed(*sets, tokenizer=bpe, task=TaskConfig(name="classification", labels=["neg", "pos"]))
    assert data.head and data.head.labels == ("neg", "pos")
    assert data.train.answers[:, 0].tolist() == [1.0] * 6 + [0.0] * 3
    assert list(data.examples_by_dataset.values()) == [3, 6]
    texts = prepare_texts(DataConfig(mix=sets), bpe, data.head)
    assert np.array_equal(texts.answers, data.train.answers)
    with pytest.raises(
        UserError, match=r"data\.mix: all rows have the label 'pos' in the 12 training rows of one\.jsonl #1"
    ) as error:
        mixed(
            *[{"dataset": "one.jsonl"}] * 2,
            tokenizer=bpe,
            task=TaskConfig(name="classification", labels=["neg", "pos"]),
        )
    assert error.value.key == "data.mix"
    with pytest.raises(UserError, match=r"glue/sst2 and glue/mnli have other labels"):
        mixed({"dataset": "glue/sst2"}, {"dataset": "glue/mnli"}, task=TaskConfig(name="classification"))


RECIPE = """\
model: {{name: {model}, dtype: float32}}
adapter: {{method: rasa, r: 4, k: 1, alpha: 8, dropout: 0.1}}
data:
  validation: {{size: 4}}
  mix:
    - dataset: a.jsonl
      weight: 3
    - {{dataset: b.jsonl, weight: 1}}
training:
  epochs: 3
  batch_size: 8
  micro_batch_size: 3
  optimizer: {{lr: 2e-2}}
  checkpoint_every: 4
output_dir: run
"""


@pytest.fixture
def recipe(files: Path, tiny_llama: Path) -> Path:
    path = files / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_llama))
    return path


@pytest.mark.parametrize(
    ("change", "message", "line"),
    [
        (("weight: 3", "weight: 0"), "data.mix[0].weight must be > 0", 7),
        (("weight: 3", "weight: -1"), "data.mix[0].weight must be > 0", 7),
        (("weight: 3", "weight: .nan"), "data.mix[0].weight: Input should be a finite number, got nan", 7),
        (("weight: 3", "weight: '3'"), "data.mix[0].weight must be a number, got '3'", 7),
        (("weight: 3", "weigth: 3"), "unknown key data.mix[0].weigth; did you mean 'weight'?", 7),
        (("      weight: 3\n", ""), "data.mix[0] has no weight, and data.mix[1] has weight: 1; give each", 6),
        (("  mix:", "  dataset: a.jsonl\n  mix:"), "data.dataset: a.jsonl and data.mix cannot be given together", 5),
        (("  mix:", "  columns: {query: q, response: r}\n  mix:"), "write columns into the sets of data.mix", 5),
        (("  mix:", "  split: test\n  mix:"), "data.split: test and data.mix cannot be given together", 5),
        (("dataset: b.jsonl, ", ""), "data.mix[1].dataset is required but missing", 8),
        (("{dataset: b.jsonl", "{columns: {query: a}, dataset: b.jsonl"), "data.mix[1].columns must name", 8),
        (("{dataset: b.jsonl, weight: 1}", "b.jsonl"), "data.mix[1] must be a section with keys, got 'b.jsonl'", 8),
        (("dataset: b.jsonl", "dataset: glue/sst2"), "data.mix[1].dataset: glue/sst2 holds texts and labels", 8),
    ],
)
def test_wrong_mixtures_name_key_and_line(recipe: Path, change: tuple[str, str], message: str, line: int) -> None:
    assert change[0] in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(*change))
    with pytest.raises(UserError) as error:
        load_recipe(recipe)
    assert message in str(error.value) and f"{recipe}:{line}:" in str(error.value)


def test_a_mixture_on_the_command_line(recipe: Path) -> None:
    def sets(*overrides: str) -> list[tuple[str, float | None]]:
        data = load_recipe(recipe, overrides).recipe.data
        return [(one.dataset, one.weight) for one in data.sets]

    assert sets("data.mix[1].weight=0.5") == sets("data.mix.1.weight=0.5") == [("a.jsonl", 3), ("b.jsonl", 0.5)]
    assert sets("data.mix=[{dataset: c}]", "data.mix[0].dataset=d") == [("d", None)]
    assert sets("data.dataset=e.jsonl") == [("e.jsonl", None)]
    points = grid(str(recipe), [], ["data.mix[0].weight=1,2"])
    assert [sets(*point.arguments[1:]) for point in points] == [[("a.jsonl", w), ("b.jsonl", 1)] for w in (1, 2)]
    recipe.write_text(recipe.read_text().replace("mix:", "dataset: x.jsonl\n  split: test\n  unused:"))
    recipe.write_text(recipe.read_text().partition("  unused:")[0] + "output_dir: run\n")
    assert sets("data.mix=[{dataset: a.jsonl}]") == [("a.jsonl", None)]
    for override, message in {
        "data.mix=[]": "data.mix is an empty list",
        "data.mix=[{dataset: a, weight: -1}]": "data.mix[0].weight must be > 0",
        "data.mix=[{dataset: a, wait: 1}]": "unknown key data.mix[0].wait",
        "data.dataset=null": "or name several sets to train on together in data.mix",
    }.items():
        with pytest.raises(UserError) as error:
            load_recipe(recipe, [override])
        assert message in str(error.value) and f"at command line: {override}" in str(error.value)
    with pytest.raises(UserError, match="no place 3 in a list of 1"):
        load_recipe(recipe, ["data.mix=[{dataset: a}]", "data.mix[3].weight=1"])


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def test_wrong_sets_end_the_command_with_their_line(recipe: Path, cli: Cli) -> None:
    """Missing, empty, damaged, and too small a share: exit 2, and the line of the entry."""
    (recipe.parent / "empty.jsonl").write_text("")
    (recipe.parent / "odd.jsonl").write_text('{"input_ids": [1, 4, 2]}\n{"input_ids": [1, "x"]}\n')
    text = recipe.read_text()
    for new, message, line in (
        ("{dataset: c.jsonl, weight: 1}", "data.mix[1].dataset: no file c.jsonl", 8),
        ("{dataset: empty.jsonl, weight: 1}", "data.mix[1].dataset: empty.jsonl has no rows", 8),
        ("{dataset: odd.jsonl, weight: 1}", "odd.jsonl:2: input_ids must be a list of integers", 8),
        ("{dataset: b.jsonl, subset: x, weight: 1}", "data.mix[1].subset is for sets of the hub", 8),
        ("{dataset: b.jsonl, weight: 1e-6}", "data.mix[1].weight: 1e-06 of 3 gives b.jsonl no example of the 44", 8),
    ):
        recipe.write_text(text.replace("{dataset: b.jsonl, weight: 1}", new))
        done = cli("train", recipe)
        assert done.returncode == 2 and message in done.stderr and f"recipe.yaml:{line}: " in done.stderr, done.stderr
    assert not (recipe.parent / "run").exists() or not list((recipe.parent / "run").glob("metrics*"))


TIMING = {"seconds", "tokens_per_second", "peak_memory_bytes"}


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in found]


def test_a_run_stopped_within_an_epoch_goes_on_with_the_same_examples(
    recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    """Losses and batches are those of the undisturbed run, bit for bit; and the reports by set are right."""
    from rasa_train.training.trainer import Trainer

    batches: dict[int, list[int]] = {}
    step, end = Trainer.step, 99

    def recorded(self: Trainer, number: int, work: Any) -> Any:
        if number == end:
            raise ZeroDivisionError
        batches[number] = work.batch.tolist()
        return step(self, number, work)

    monkeypatch.setattr(Trainer, "step", recorded)
    whole = cli("train", recipe, "output_dir=whole", "training.validate_every=1", check=True)
    undisturbed = batches.copy()
    batches.clear()
    end = 10  # in the second epoch of 6 steps, two steps after a checkpoint
    with pytest.raises(ZeroDivisionError):
        cli("train", recipe, "training.validate_every=1")
    assert max(batches) == 9
    before = batches.copy()
    batches.clear()
    end = 99
    cli("train", recipe, "training.validate_every=1", check=True)
    assert min(batches) == 8 and before | batches == undisturbed and len(undisturbed) == 18
    for number in (8, 9):
        assert before[number] == batches[number]
    run, other = recipe.parent / "run", recipe.parent / "whole"
    assert rows(run) == rows(other)
    assert (run / "adapter/adapter.safetensors").read_bytes() == (other / "adapter/adapter.safetensors").read_bytes()
    assert "an epoch has 33 of a.jsonl, 11 of b.jsonl" in whole.stderr
    assert "note: a.jsonl: 33 of 11 examples, each 3 times" in whole.stderr
    _the_losses_by_set_are_those_of_transformers(recipe, tiny_llama, rows(run), whole.stderr)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["examples_by_dataset"] == {"a.jsonl": 33, "b.jsonl": 11}
    assert summary["validation_loss_by_dataset"] == rows(run)[-1]["validation_loss_by_dataset"]
    from rasa_train.merging.hub import write_card

    report = {"method": "rasa", "base_model": "x"}
    assert "`a.jsonl` (weight 3.0), `b.jsonl` (weight 1.0), template" in write_card(run / "adapter", run, report)


def _the_losses_by_set_are_those_of_transformers(
    recipe: Path, model: Path, found: list[dict[str, Any]], said: str
) -> None:
    """The first step has learning rate 0 and B = 0, so its validation is that of the base."""
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    held = prepare(load_recipe(recipe).recipe.data, None).validation
    assert held is not None
    sums, targets = [0.0, 0.0], [0, 0]
    for i, place in enumerate(held.origins):
        ids, labels = (torch.from_numpy(part).long() for part in held[i][:2])
        with torch.no_grad():
            logits = base(ids[None]).logits[0, :-1]
        sums[place] += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        targets[place] += int((labels[1:] != -100).sum())
    first = found[0]
    wanted = {name: s / n for name, s, n in zip(("a.jsonl", "b.jsonl"), sums, targets, strict=True)}
    assert first["validation_loss_by_dataset"] == pytest.approx(wanted, rel=1e-5)
    assert first["validation_loss"] == pytest.approx(sum(sums) / sum(targets), rel=1e-5)
    words = ", ".join(f"{name} {loss:.4f}" for name, loss in first["validation_loss_by_dataset"].items())
    assert f"step 1: validation loss {first['validation_loss']:.4f} ({words})" in said


def test_the_check_shows_every_set(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rasa_train.check.check import check

    result = check(load_recipe(recipe).recipe)
    facts: dict[str, Any] = result.as_json()
    assert facts["examples_by_dataset"] == {"a.jsonl": 33, "b.jsonl": 11} and facts["examples"] == 44
    assert sum(facts["tokens_by_dataset"].values()) == facts["tokens"] and facts["optimizer_steps"] == 18
    assert "a.jsonl: 33 of 11 examples, each 3 times" in facts["notes"]
    result.show()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "a.jsonl " in line and "tokens" in line]
    assert line.split() == ["a.jsonl", "33", "75.0%", str(facts["tokens_by_dataset"]["a.jsonl"]), "tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["length-grouped", "packed"])
def test_a_killed_run_ends_bit_identical(recipe: Path, cli: Cli, batching: str) -> None:
    options = [f"training.batching={batching}"]
    if batching == "packed":
        options += ["training.micro_batch_size=auto", "training.micro_batch_tokens=40"]
    cli("train", recipe, "output_dir=whole", *options, check=True)
    command = [sys.executable, "-m", "rasa_train.cli.train", str(recipe), *options]
    run = recipe.parent / "run"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (run / "metrics.jsonl").exists() or len(rows(run)) < 10:
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert not (run / "summary.json").exists()
    cli("train", recipe, *options, check=True)
    assert rows(run) == rows(recipe.parent / "whole")
