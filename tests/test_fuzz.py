"""Input that nobody meant: each is read, or refused by a ``UserError``; never a traceback, never without bound.

``RASA_FUZZ=10000`` sets how many recipes, rows and adapters hypothesis makes (the slow test does 10,000 recipes).
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import itertools
import json
import multiprocessing
import os
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rasa_train.adapters.saved import read_adapter
from rasa_train.data.columns import find_columns
from rasa_train.data.sources import find_source
from rasa_train.data.tokenise import chunks
from rasa_train.errors import UserError
from rasa_train.io.checkpoint_files import open_checkpoint
from rasa_train.recipe.load import _all_keys, load_recipe
from rasa_train.recipe.schema import Recipe

PACKAGE = Path(__file__).resolve().parents[1] / "rasa_train"
COUNT = int(os.environ.get("RASA_FUZZ", "200"))
few = settings(
    max_examples=COUNT,
    deadline=None,
    derandomize="RASA_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

KEYS = st.sampled_from([*_all_keys(Recipe, ""), "extends", "adapter.rr", "x.y", "", "."])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.dates(),
    st.sampled_from(
        ["rasa", "lora", "auto", "epoch", "demo", "1e400", "nul\0", "x" * 5000, "../../etc", -1, 0, 10**400]
    ),
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4), max_leaves=8
)


def good() -> dict[str, Any]:
    return {
        "model": {"name": "demo", "dtype": "float32"},
        "adapter": {"method": "rasa", "r": 8},
        "data": {"dataset": "demo"},
        "training": {"optimizer": {"lr": 5e-4}},
        "output_dir": "run",
    }


def put(recipe: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for name in above:
        recipe = recipe.setdefault(name, {})
        if not isinstance(recipe, dict):
            return
    recipe[last] = value


def read_or_refuse(read: Any) -> bool:
    """Whether it was read. Anything but a ``UserError`` with a message fails the test."""
    try:
        read()
    except UserError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        return False
    return True


def fuzz_recipe(path: Path, changes: dict[str, Any], overrides: list[str], raw: bytes | None) -> None:
    recipe = good()
    for key, value in changes.items():
        put(recipe, key, value)
    text = yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "surrogatepass")
    path.write_bytes(text if raw is None else text + raw)
    read_or_refuse(lambda: load_recipe(path, overrides))


PIECES = [
    *(
        "!!bool ",
        "!x ",
        "!!set ",
        "&a ",
        "*a",
        "<<",
        ": ",
        "? ",
        "- ",
        "|",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "\n",
        "\n  ",
        "#",
    ),
    *(
        "'",
        '"',
        "\\",
        "%TAG ",
        "---",
        "...",
        "1e4",
        "0x",
        "0b2",
        "2025-13-01",
        "=",
        "~",
        ".inf",
        "seed",
        "\t",
        "\ufeff",
    ),
]
RECIPES = {
    "changes": st.dictionaries(KEYS, VALUES, max_size=4),
    "overrides": st.lists(
        st.builds(lambda k, v: f"{k}={v}", KEYS, VALUES.map(str) | st.text(max_size=30)) | st.text(max_size=20),
        max_size=3,
    ),
    "raw": st.none()
    | st.binary(max_size=40)
    | st.lists(st.sampled_from(PIECES), max_size=12).map(lambda p: "".join(p).encode()),
}


@given(**RECIPES)
@few
def test_recipes_and_overrides(tmp_path: Path, **case: Any) -> None:
    fuzz_recipe(tmp_path / "r.yaml", **case)


@pytest.mark.slow
@given(**RECIPES)
@settings(few, max_examples=max(COUNT, 10_000), derandomize=False)
def test_ten_thousand_recipes(tmp_path: Path, **case: Any) -> None:
    fuzz_recipe(tmp_path / "r.yaml", **case)


def read_rows(path: Path) -> None:
    """Every row as training would read it, up to the tokenizer."""
    rows = find_source(str(path))[0].rows()
    if first := next(rows, None):
        for _ in chunks(itertools.chain([first], rows), find_columns(first[1], first[0], None)):
            pass


COLUMNS = [
    *("query", "response", "messages", "conversations", "chosen", "rejected", "system", "history"),
    *("input_ids", "labels", "z"),
]
ROW = st.dictionaries(
    st.sampled_from(COLUMNS),
    VALUES,
    max_size=4,
)
LINE = st.one_of(
    ROW.map(lambda row: json.dumps(row, default=str).encode()),
    st.binary(max_size=60),
    st.sampled_from(
        [b"\0", b'{"query": "a", "response": "\xff"}', b"[" * 3000, b'{"query": ' + b"9" * 5000 + b"}", b"NaN", b"{}"]
    ),
)


@given(lines=st.lists(LINE, max_size=5), name=st.sampled_from(["d.jsonl", "d.json", "d.json.gz", "d.parquet"]))
@few
def test_rows(tmp_path: Path, lines: list[bytes], name: str) -> None:
    body = b"\n".join(lines)
    (tmp_path / name).write_bytes(b"[" + b",".join(lines) + b"]" if name == "d.json" and len(lines) > 1 else body)
    read_or_refuse(lambda: read_rows(tmp_path / name))


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "BOOL", "F4", "U64", "nonsense"]) | st.integers(),
        "shape": st.lists(st.integers(-1, 2**63), max_size=3) | st.text(max_size=3),
        "data_offsets": st.lists(st.integers(0, 64) | st.integers(), max_size=3),
    }
)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@given(
    header=st.dictionaries(st.text(max_size=8), TENSOR | VALUES, max_size=3).map(lambda h: json.dumps(h, default=str))
    | st.text(max_size=40),
    length=st.none() | st.integers(0, 2**64 - 1),
    config=st.dictionaries(
        st.sampled_from(["method", "r", "k", "alpha", "targets", "format_version", "base_model", "base_tensors"]),
        VALUES,
    ),
    peft=st.none()
    | st.fixed_dictionaries(
        {"peft_type": st.sampled_from(["LORA", "VERA", "RASA", "ADALORA", "?", 3])},
        optional={"r": VALUES, "lora_alpha": VALUES, "target_modules": VALUES, "use_mora": VALUES},
    ),
)
@few
def test_adapters(tmp_path: Path, header: str, length: int | None, config: dict[str, Any], peft: Any) -> None:
    ours = {"format": "rasa_train", "format_version": 1, "method": "lora", **config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours if peft is None else peft, default=str))
    blob = safetensors(header.encode("utf-8", "surrogatepass"), b"\0" * 64, length)
    for name in ("adapter.safetensors", "adapter_model.safetensors", "model.safetensors"):
        (tmp_path / name).write_bytes(blob)
    read_or_refuse(lambda: read_adapter(tmp_path))
    read_or_refuse(lambda: open_checkpoint(tmp_path))


@given(index=VALUES | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), VALUES, max_size=3)}))
@few
def test_indices_of_a_base(tmp_path: Path, index: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index, default=str))
    assert not read_or_refuse(lambda: open_checkpoint(tmp_path))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "x.bin"])
def test_shard_names_stay_in_their_directory(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    good_file = safetensors(b'{"w.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4)
    (tmp_path / "x.safetensors").write_bytes(good_file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w.weight": name}}))
    with pytest.raises(UserError, match="weight_map"):
        open_checkpoint(base)
    from rasa_train.io.base_fingerprint import base_samples

    assert base_samples(str(base)) == {}, "nor are samples taken from outside"


def parquet(column: str, values: Any) -> bytes:
    """A file of 1 kB or less: equal values are written once."""
    file = io.BytesIO()
    pq.write_table(pa.table({column: values, "response": ["b"] * len(values)}), file, compression="zstd")
    return file.getvalue()


MILLION = gzip.compress(b"a" * 1_000_000)  # 1 kB
HOSTILE: dict[str, bytes] = {
    "laughs.yaml": b"a0: &a0 [x, x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 12)),
    "merged-laughs.yaml": b"a0: &a0 {x: 1, y: 2}\n"
    + b"".join(b"a%d: &a%d {<<: [%s]}\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 9)),
    "circle.yaml": b"a: &a [*a]\n",
    "merged-circle.yaml": b"a: &a {<<: *a}\n",
    "deep.yaml": b"a: " + b"[" * 100_000,
    "deep-block.yaml": b"".join(b" " * i + b"a:\n" for i in range(2_000)),
    "python.yaml": b"a: !!python/object/apply:os.system ['true']\n",
    "list.yaml": b"- 1\n" * 60_000,
    "keys.yaml": b"".join(b"k%d: 1\n" % i for i in range(15_000)),
    "digits.yaml": b"a: " + b"1" * 200_000,
    "merged-list.yaml": b"a: &a {"
    + b"".join(b"k%d: 1, " % i for i in range(3_000))
    + b"}\nb: {<<: ["
    + b"*a, " * 50_000,
    "huge.yaml": b"a: 1\n" * 10_000_000,
    "deep.jsonl": b'{"query": ' + b"[" * 1_000_000 + b"\n",
    "deep.json": b"[" * 1_000_000,
    "digits.json": b"[" + b"9" * 1_000_000 + b"]",
    "row.jsonl": b'{"query": "' + b"a" * 50_000_000 + b'"\n',
    "nul.jsonl": b"\0" * 10_000_000,
    "bomb.jsonl.gz": gzip.compress(b'{"query": "') + MILLION * 1_000,
    "bomb.json.gz": gzip.compress(b'[{"query": "') + MILLION * 1_000,
    "blank.jsonl.gz": gzip.compress(b'{"query": "a"}\n') + gzip.compress(b"\n" * 1_000_000) * 1_000,
    "blank.json.gz": gzip.compress(b"[") + gzip.compress(b" " * 1_000_000) * 1_000,
    "columns.jsonl": b"{" + b", ".join(b'"c%d": 1' % i for i in range(1_000_000)) + b"}\n",
    "inner.jsonl": b'{"messages": [{"role": "user", "content": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}]}\n",
    "brackets.jsonl": b'{"query": [' + b"[], " * 4_000_000 + b"[]]}\n",
    "dictionary.parquet": parquet("query", pa.array(["a" * 5_000_000]).dictionary_encode().take([0] * 1000)),
    "numbers.parquet": parquet("query", pa.ListArray.from_arrays([0, 20_000_000], np.zeros(20_000_000, np.int8))),
    "above.index.json": b'{"weight_map": {"a": "../model.safetensors"}}',
    "absolute.index.json": b'{"weight_map": {"a": "/etc/passwd.safetensors"}}',
    "nul.index.json": b'{"weight_map": {"a": "a\\u0000.safetensors"}}',
    "deep.index.json": b'{"weight_map": ' + b"[" * 1_000_000,
    "length.safetensors": safetensors(b"{}", length=2**63),
    "long.safetensors": safetensors(b"{}", length=99_000_000),
    "overlap.safetensors": safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        b"\0" * 12,
    ),
    "overflow.safetensors": safetensors(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "huge.safetensors": safetensors(
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}', b"\0" * 4
    ),
    "deep.safetensors": safetensors(b'{"a":' + b"[" * 100_000),
    "config.json": b"[" * 1_000_000,
}

ALLOWED_MB = 400
"""More memory than this above what the imports took, and the process below ends; the largest input is 50 MB."""


def read_hostile(path: Path, answer: Path) -> None:
    """In a process of its own: write the length and the beginning of what is said of the file, and by how many MB the
    process has grown."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (pages + (ALLOWED_MB << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
    message = ""
    try:
        if path.name.startswith("adapter"):
            read_adapter(path.parent)
        elif path.name.startswith("model."):
            open_checkpoint(path.parent)
        elif path.suffix == ".yaml":
            load_recipe(path)
        else:
            read_rows(path)
    except UserError as error:
        message = str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    answer.write_text(json.dumps([len(message), message[:300], grown]))


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_in_bounded_memory(name: str, tmp_path: Path) -> None:
    path, answer = tmp_path / name, tmp_path / "answer"
    if name == "config.json":
        path = tmp_path / "adapter_config.json"
    elif name.endswith(".index.json"):
        path = tmp_path / "model.safetensors.index.json"
    elif path.suffix == ".safetensors":
        path = tmp_path / "model.safetensors"
        (tmp_path / "adapter_config.json").write_text('{"format": "rasa_train", "format_version": 1, "method": "lora"}')
        (tmp_path / "adapter.safetensors").write_bytes(HOSTILE[name])
    path.write_bytes(HOSTILE[name])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_fuzz"])
    for file in [path, tmp_path / "adapter.safetensors"] if path.suffix == ".safetensors" else [path]:
        process = context.Process(target=read_hostile, args=(file, answer))
        process.start()
        process.join()
        assert process.exitcode == 0, "neither read nor refused"
        length, message, grown = json.loads(answer.read_text())
        assert message and length < 6_000, "refused, in a message that can be read"
        print(f"{file.name} ({name}): {grown} MB; {message[:100]!r}")
        if log := os.environ.get("RASA_FUZZ_LOG"):
            with open(log, "a") as out:
                out.write(f"{grown} MB {name}: {message[:160]!r}\n")


def test_no_pickle_is_ever_loaded() -> None:
    """torch.load, pickle and their relatives, and torch's exchanges of objects, which unpickle what another worker or a
    stranger sends, are named nowhere in the package, comments aside."""
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            seen += 1
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} & set(names), (
                    path
                )
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("yaml", "load"), ("np", "load")}, path
                assert not node.attr.endswith(("_object", "_object_list")) or node.value.id == "json_file", path
    assert seen > 10_000


@contextlib.contextmanager
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    secrets = {name: f"planted-{name.lower()}-3f9a" for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SERVICE_TOKEN")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    yield secrets


def test_secrets_of_the_environment_stay_there(
    tmp_path: Path, cli: Any, tiny_llama: Path, token_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training and merging, no file and no output holds a token that the environment held."""
    with planted(monkeypatch) as secrets:
        (tmp_path / "r.yaml").write_text(
            f"model: {{name: {tiny_llama}, dtype: float32}}\nadapter: {{method: rasa, r: 4, k: 1}}\n"
            f"data: {{dataset: {token_rows}}}\ntraining: {{max_steps: 1, batch_size: 2}}\noutput_dir: run\n"
        )
        said = [
            cli("train", "r.yaml", check=True),
            cli("merge", "run", "--output", "merged", "--push", "me/mine", check=True),
        ]
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert {"metrics.jsonl", "recipe.yaml", "README.md"} <= {p.name for p in files}
        for value in secrets.values():
            assert not any(value in done.stdout + done.stderr for done in said)
            assert not any(value.encode() in p.read_bytes() for p in files)


@pytest.mark.parametrize(
    "value",
    [
        "https://me:s3cret-0192837465@host/data.jsonl",
        "https://host/data.jsonl?token=s3cret-0192837465",
        "s3://key:s3cret-0192837465@bucket/x",
        "hf_s3cret0192837465abcdefghijklmnopqr",
    ],
)
def test_secrets_in_a_recipe_are_refused_unseen(value: str, tmp_path: Path) -> None:
    """A recipe is copied into its run directory and shown in messages: no place for a password."""
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**good(), "data": {"dataset": value}}))
    for read in (lambda: load_recipe(path), lambda: load_recipe("demo", [f"data.dataset={value}"])):
        with pytest.raises(UserError, match=r"data\.dataset holds a password") as error:
            read()
        assert "s3cret" not in str(error.value)
