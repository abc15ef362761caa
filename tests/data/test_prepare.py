import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_data import rows_of, write_lines

from rasa_train.data import encode_pool
from rasa_train.data.cache import TokenDataset
from rasa_train.data.config import DataConfig
from rasa_train.data.encode import Encoder
from rasa_train.data.prepare import prepare
from rasa_train.errors import UserError

Jsonl = Callable[[list[Any]], str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RASA_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def content(dataset: TokenDataset) -> list[tuple[list[int], list[int]]]:
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in dataset]


def environment() -> dict[str, str]:
    """Return the environment of a process that imports what this one can."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def sets(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def test_dataset_holds_what_the_encoder_gives(jsonl: Jsonl, bpe: Any) -> None:
    rows = rows_of(600)
    config = DataConfig(dataset=jsonl(rows))
    prepared = prepare(config, bpe)
    expected = Encoder(config, bpe, "pair").encode([("", (row["query"], row["response"]), {}) for row in rows]).examples
    assert content(prepared.train) == [(e.input_ids.tolist(), e.labels.tolist()) for e in expected]
    assert prepared.train.lengths.tolist() == [len(e.input_ids) for e in expected]
    assert prepared.train.supervised.tolist() == [int((e.labels[1:] != -100).sum()) for e in expected]
    stats = prepared.stats
    assert (stats.rows, stats.examples, stats.longest) == (600, 600, max(prepared.train.lengths))
    assert stats.tokens == sum(len(e.input_ids) for e in expected)
    assert stats.supervised_tokens == prepared.train.supervised.sum()
    assert prepared.validation is None
    part = prepared.train.select([5, 3])
    assert content(part) == [content(prepared.train)[5], content(prepared.train)[3]]
    assert content(part.select([1])) == [content(prepared.train)[3]]
    with pytest.raises(IndexError):
        part[2]


def test_second_time_reads_the_cache(jsonl: Jsonl, bpe: Any, encoded: list[int]) -> None:
    config = DataConfig(dataset=jsonl(rows_of(300)))
    first = prepare(config, bpe)
    assert encoded == [256, 44]
    second = prepare(config, bpe)
    assert encoded == [256, 44]
    assert (content(second.train), second.stats) == (content(first.train), first.stats)


def test_cache_follows_the_content(jsonl: Jsonl, characters: Any, encoded: list[int], cache: Path) -> None:
    path = jsonl(rows_of(3))
    base = DataConfig(dataset=path)
    prepare(base, characters)
    for change in ({"max_length": 200}, {"supervise": "all"}, {"template": "plain"}, {"over_length": "drop"}):
        prepare(base.model_copy(update=change), characters)
    characters.chat_template = "x"
    prepare(base, characters)
    jsonl(rows_of(4))
    assert prepare(base, characters).stats.examples == 4
    assert len(sets(cache)) == len(encoded) == 7
    for change in ({"fraction": 0.5}, {"validation": {"size": 1}}, {"num_workers": 1}):  # views: nothing new
        prepare(DataConfig(dataset=path, **change), characters)  # type: ignore[arg-type]
    assert len(sets(cache)) == len(encoded) == 7


@pytest.mark.parametrize("name", ["tokens", "labels", "offsets", "supervised", "meta.json"])
@pytest.mark.parametrize("damage", ["missing", "torn", "flipped"])
def test_damaged_cache_is_made_again(
    jsonl: Jsonl, bpe: Any, cache: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(dataset=jsonl(rows_of(20)))
    expected = content(prepare(config, bpe).train)
    file = sets(cache)[0] / name
    data = file.read_bytes()
    file.unlink()
    if damage == "torn":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        file.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    with caplog.at_level(logging.WARNING):
        assert content(prepare(config, bpe).train) == expected
    assert "made again" in caplog.text
    assert len(sets(cache)) == 1
    caplog.clear()
    assert content(prepare(config, bpe).train) == expected
    assert not caplog.text


def test_nothing_is_left_behind_by_an_error(jsonl: Jsonl, bpe: Any, cache: Path) -> None:
    config = DataConfig(dataset=jsonl([*rows_of(300), {"query": "q", "response": None}]))
    with pytest.raises(UserError, match=r"train\.jsonl:301: column 'response' must be text, got null"):
        prepare(config, bpe)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_processes_that_prepare_at_once_all_succeed(tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [{"input_ids": [i % 50 + 1] * 40} for i in range(3000)])
    code = textwrap.dedent(f"""
        import pathlib, sys, time
        from rasa_train.data import DataConfig
        from rasa_train.data.prepare import prepare
        pathlib.Path(r"{tmp_path}", "ready" + sys.argv[1]).touch()
        while len(list(pathlib.Path(r"{tmp_path}").glob("ready*"))) < 3:
            time.sleep(0.001)
        train = prepare(DataConfig(dataset=r"{path}"), None).train
        print(len(train), int(train[2999].input_ids.sum()), train.lengths.sum())
    """)
    for damaged in (False, True):
        for ready in tmp_path.glob("ready*"):
            ready.unlink()
        processes = [
            subprocess.Popen([sys.executable, "-c", code, str(i)], env=environment(), stdout=subprocess.PIPE, text=True)
            for i in range(3)
        ]
        answers = {process.communicate(timeout=600)[0] for process in processes}
        assert answers == {"3000 2000 120000\n"}, damaged
        assert len(sets(cache)) == 1
        assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == [".lock"]
        (sets(cache)[0] / "tokens").write_bytes(b"")


def test_result_does_not_depend_on_the_workers(tmp_path: Path, bpe: Any) -> None:
    path = write_lines(tmp_path / "t.jsonl", rows_of(1500))
    prepared = [
        prepare(
            DataConfig(dataset=str(path), num_workers=workers, cache_dir=str(tmp_path / str(workers))),
            bpe,
            pool_threshold=threshold,
        )
        for workers, threshold in ((1, 0), (2, 0), (3, 400))
    ]
    files = [
        {file.name: file.read_bytes() for file in sets(tmp_path / str(workers) / "tokens")[0].iterdir()}
        for workers in (1, 2, 3)
    ]
    assert files[0] == files[1] == files[2]
    assert prepared[0].stats == prepared[1].stats == prepared[2].stats


def test_error_of_a_worker_is_the_same_error(jsonl: Jsonl, bpe: Any) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    config = DataConfig(dataset=jsonl([*[{"messages": turns}] * 500, {"messages": turns * 2}]), num_workers=2)
    errors = []
    for threshold in (0, 10_000):
        with pytest.raises(UserError, match=r"train\.jsonl:501: .*use data.template: chat") as caught:
            prepare(config, bpe, pool_threshold=threshold)
        errors.append((str(caught.value), caught.value.key))
    assert errors[0] == errors[1]


def test_pool_is_used_only_past_the_threshold(jsonl: Jsonl, bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a pool was started")

    monkeypatch.setattr(encode_pool, "_encode_in_pool", refuse)
    config = DataConfig(dataset=jsonl(rows_of(512)), num_workers=2)
    assert prepare(config, bpe, pool_threshold=512).stats.examples == 512
    with pytest.raises(AssertionError, match="a pool"):
        prepare(config.model_copy(update={"max_length": 99}), bpe, pool_threshold=256)


def test_fraction_is_the_first_share_of_a_shuffle(jsonl: Jsonl, bpe: Any) -> None:
    path = jsonl(rows_of(40))
    whole = content(prepare(DataConfig(dataset=path), bpe).train)
    halves = [prepare(DataConfig(dataset=path, fraction=0.5), bpe) for _ in range(2)]
    first = np.random.default_rng(42).permutation(40)[:20]  # what datasets.Dataset.shuffle(seed=42) does
    assert content(halves[0].train) == content(halves[1].train) == [whole[i] for i in sorted(first)]
    assert halves[0].stats.examples == 20
    assert halves[0].stats.rows == 40
    assert halves[0].stats.tokens == sum(len(ids) for ids, _ in content(halves[0].train))
    quarter = content(prepare(DataConfig(dataset=path, fraction=0.25), bpe).train)
    assert all(example in content(halves[0].train) for example in quarter)


def test_shuffle_is_that_of_datasets(jsonl: Jsonl) -> None:
    import datasets

    shuffled = datasets.Dataset.from_dict({"i": list(range(97))}).shuffle(seed=42)["i"]
    assert list(shuffled) == np.random.default_rng(42).permutation(97).tolist()


@pytest.mark.parametrize(("size", "held_out"), [(7, 7), (0.25, 10)])
def test_validation_share_is_held_out(jsonl: Jsonl, bpe: Any, size: float, held_out: int) -> None:
    path = jsonl(rows_of(40))
    whole = content(prepare(DataConfig(dataset=path), bpe).train)
    split = prepare(DataConfig.model_validate({"dataset": path, "validation": {"size": size}}), bpe)
    assert split.validation is not None
    assert len(split.validation) == held_out
    assert sorted(content(split.train) + content(split.validation)) == sorted(whole)
    half = prepare(DataConfig.model_validate({"dataset": path, "validation": {"size": size}, "fraction": 0.5}), bpe)
    assert half.validation is not None
    assert content(half.validation) == content(split.validation)
    assert half.stats.examples == len(split.train) // 2
    with pytest.raises(UserError, match=r"validation\.size: 40 leaves nothing"):
        prepare(DataConfig.model_validate({"dataset": path, "validation": {"size": 40}}), bpe)


def test_validation_set_of_its_own(jsonl: Jsonl, tmp_path: Path, bpe: Any) -> None:
    other = write_lines(tmp_path / "dev.jsonl", rows_of(3))
    config = DataConfig.model_validate({"dataset": jsonl(rows_of(9)), "validation": {"dataset": str(other)}})
    prepared = prepare(config, bpe)
    assert prepared.validation is not None
    assert (len(prepared.train), len(prepared.validation)) == (9, 3)
    assert content(prepared.validation) == content(prepared.train)[:3]


def test_ready_tokens_need_no_tokenizer(jsonl: Jsonl) -> None:
    plain = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
    labelled = [{"input_ids": [1, 2, 3], "labels": [1, 2, -100]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    train = prepare(DataConfig(dataset=jsonl(plain)), None).train
    assert content(train) == [([1, 2, 3], [1, 2, 3]), ([4, 5], [4, 5])]
    train = prepare(DataConfig(dataset=jsonl(labelled)), None).train
    assert content(train) == [([1, 2, 3], [1, 2, -100]), ([4, 5], [-100, 5])]
    assert train.supervised.tolist() == [1, 1]
    for mixed, message in (
        ([plain[0], labelled[1]], "train.jsonl:2: this row has `labels`, but the first row has none"),
        ([labelled[0], plain[1]], "train.jsonl:2: there is no column 'labels'"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(DataConfig(dataset=jsonl(mixed)), None)


def test_no_row_and_no_example_are_errors(jsonl: Jsonl, bpe: Any) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl has no rows"):
        prepare(DataConfig(dataset=jsonl([])), bpe)
    path = jsonl(rows_of(6))
    with pytest.raises(UserError, match=r"no example is left of the 6 rows.*: 6 dropped as longer than max_length=9"):
        prepare(DataConfig(dataset=path, max_length=9, over_length="drop"), bpe)
    with pytest.raises(UserError, match=r"6 because no token carries loss .*6 were cut"):
        prepare(DataConfig(dataset=path, max_length=9), bpe)


def test_progress_and_cache_directory(jsonl: Jsonl, bpe: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    config = DataConfig(dataset=jsonl(rows_of(300)), cache_dir=str(tmp_path / "mine"))
    prepare(config, bpe, progress=seen.append)
    assert seen == [256, 300]
    assert len(sets(tmp_path / "mine" / "tokens")) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"set data\.cache_dir"):
        prepare(config.model_copy(update={"cache_dir": str(tmp_path / "file")}), bpe)


def test_other_tokenizer_options_of_the_key(jsonl: Jsonl, bpe: Any, encoded: list[int]) -> None:
    """A known fingerprint is taken at its word; a truncation left on the tokenizer is none of its content."""
    config = DataConfig(dataset=jsonl(rows_of(3)))
    for name in ("a", "b", "a"):
        prepare(config, bpe, tokenizer_fingerprint=name)
    assert len(encoded) == 2
    prepare(config, bpe)
    bpe("some text of many words", truncation=True, max_length=3)
    prepare(config, bpe)
    assert len(encoded) == 3


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: Path, bpe: Any) -> None:
    """Preparing 100,000 rows takes less memory than the result, so neither rows nor tokens pile up."""
    bpe.save_pretrained(tmp_path / "tokenizer")
    filler = "one more and " * 30
    rows = ({"query": f"{i} {filler}", "response": f"{i} x"} for i in range(100_000))
    path = write_lines(tmp_path / "t.jsonl", rows)
    code = textwrap.dedent(f"""
        import pathlib, re
        from transformers import AutoTokenizer
        from rasa_train.data import DataConfig
        from rasa_train.data.prepare import prepare
        def peak():
            return re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
        if __name__ == "__main__":
            tokenizer = AutoTokenizer.from_pretrained(r"{tmp_path / "tokenizer"}")
            before = peak()
            stats = prepare(DataConfig(dataset=r"{path}"), tokenizer).stats
            print(stats.tokens, before, peak())
    """)
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, tmp_path / "script.py"]
    out = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True).stdout
    tokens, before, after = map(int, out.split())
    assert after < 2_000_000  # kilobytes
    assert (after - before) * 1024 < 8 * tokens


shared = pytest.mark.skipif("RASA_TRAIN_SHARED" not in os.environ, reason="RASA_TRAIN_SHARED names no directory")


@shared
@pytest.mark.parametrize("supervise", ["response", "paper"])
def test_real_rows_with_a_real_tokenizer(supervise: Any) -> None:
    from transformers import AutoTokenizer

    root = Path(os.environ["RASA_TRAIN_SHARED"])
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizers" / "mistral-v3")
    path = root / "data" / "metamathqa" / "metamathqa_13_real_rows.json"
    train = prepare(DataConfig(dataset=str(path), supervise=supervise), tokenizer).train
    for example, row in zip(train, json.loads(path.read_text()), strict=True):
        kept = tokenizer.decode(example.labels[example.labels != -100])
        masked = tokenizer.decode(example.input_ids[example.labels == -100])
        assert kept.endswith(f"{row['response'].strip()} </s>")
        assert row["query"].strip() in masked
        assert ("Below is" in kept) == (supervise == "paper")
