"""rasa-merge from the outside: exit codes, messages, and that an output is there whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rasa_train.adapters.saved import read_adapter, write_adapter
from rasa_train.cli.merge import app
from rasa_train.io import atomic_dir as output
from rasa_train.io.base_fingerprint import base_identity, base_samples
from rasa_train.io.checksums import CHECKSUMS
from rasa_train.merging.merged import merge
from rasa_train.merging.options import Writing

from .conftest import load, save_adapter, save_base

INDEX = "model.safetensors.index.json"


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(tmp_path: Path, *arguments: object) -> str:
    """The one message of a command that must fail with code 2 and leave nothing behind."""
    before = {p for p in tmp_path.rglob("*")}
    code, stdout, stderr = run(*arguments)
    assert code == 2, (code, stdout, stderr)
    assert stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert {p for p in tmp_path.rglob("*")} == before
    return stderr


def test_json_is_the_only_thing_on_stdout(case, tmp_path):
    base, adapter, _ = case()
    code, stdout, stderr = run(adapter, "--output", tmp_path / "out", "--json")
    report = json.loads(stdout)
    assert code == 0 and stderr == "" and stdout.count("\n") == 1
    assert report.pop("seconds") > 0
    assert report == {
        "output": str(tmp_path / "out"), "format": "merged", "method": "rasa", "base_model": str(base),
        "base_checked": False, "tensors": 30, "adapted": 21, "rounding": 0.0,
        "rounding_method": "nearest", "aware_tensors": 0, "directions": 0, "tokenizer": None, "left_out": [],
        "bytes": (tmp_path / "out" / "model.safetensors").stat().st_size,
    }  # fmt: skip
    code, stdout, _ = run(adapter, "--output", tmp_path / "lora", "--format", "lora", "--json")
    assert code == 0 and json.loads(stdout)["max_lora_rank"] == 8
    assert json.loads(stdout)["bytes"] == (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size


def test_plain_output_says_what_a_person_needs(case, tmp_path):
    _, adapter, _ = case()
    _, stdout, _ = run(adapter, "--output", tmp_path / "out", "--dtype", "bfloat16")
    assert "21 weights of 30 tensors" in stdout and "of the update" in stdout
    _, stdout, _ = run(adapter, "--output", tmp_path / "lora", "--format", "lora")
    assert "rank 6" in stdout and "--max-lora-rank 8" in stdout


def test_who_reads_the_lora_of_fused_experts_is_said(case, tmp_path):
    _, adapter, _ = case("mixtral")
    code, stdout, _ = run(adapter, "--output", tmp_path / "lora", "--format", "lora")
    assert code == 0 and "rank 10" in stdout and "from version 0.19 on, and vLLM reads it only for" in stdout


def test_a_run_without_a_final_adapter_says_which_checkpoint_it_took(case, tmp_path):
    _, adapter, _ = case()
    step = tmp_path / "run" / "checkpoints" / "step-00000007"
    shutil.copytree(adapter, step)
    code, _, stderr = run(tmp_path / "run", "--output", tmp_path / "out")
    assert code == 0 and "step-00000007" in stderr


def test_the_command_line_loads_no_torch_and_main_exits_with_2():
    code = "import sys, rasa_train.cli.merge; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"
    done = subprocess.run(
        [sys.executable, "-m", "rasa_train.cli.merge", "nowhere", "--output", "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere does not exist") and "Traceback" not in done.stderr


# -- the inputs are wrong ----------------------------------------------------------------------------------


def test_no_base_is_named(case, tmp_path):
    _, adapter, _ = case()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model": None}))
    (adapter / CHECKSUMS).unlink()
    assert "--base" in refused(tmp_path, adapter, "--output", tmp_path / "out")
    absent = tmp_path / "absent"
    message = refused(tmp_path, adapter, "--output", tmp_path / "out", "--base", absent)
    assert str(absent) in message and "does not exist" in message
    assert "config.json" in refused(tmp_path, adapter, "--output", tmp_path / "out", "--base", adapter)
    assert "hub" in refused(tmp_path, adapter, "--output", tmp_path / "out", "--base", "nobody/no-such-model")


def test_adapter_of_another_shape(case, tmp_path):
    _, adapter, _ = case()
    save_base(tmp_path / "other", "tied")
    message = refused(tmp_path, adapter, "--output", tmp_path / "out", "--base", tmp_path / "other")
    assert "does not fit" in message
    tensors = load_file(adapter / "adapter.safetensors")
    name = "model.layers.0.mlp.up_proj.A"
    save_file({**tensors, name: torch.zeros(3, 33)}, adapter / "adapter.safetensors")
    (adapter / CHECKSUMS).unlink()
    message = refused(tmp_path, adapter, "--output", tmp_path / "out")
    assert name in message and "(3, 33)" in message and "(3, 32)" in message


def test_base_weights_of_another_shape_than_its_config(case, tmp_path):
    base, adapter, _ = case()
    weights, name = load_file(base / "model.safetensors"), "model.layers.1.self_attn.k_proj.weight"
    save_file(weights | {name: torch.zeros(8, 32)}, base / "model.safetensors", metadata={"format": "pt"})
    message = refused(tmp_path, adapter, "--output", tmp_path / "out")
    assert name in message and "(8, 32)" in message and "(16, 32)" in message
    del weights[name]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert f"no tensor for {name}" in refused(tmp_path, adapter, "--output", tmp_path / "out")


def test_base_without_safetensors(case, tmp_path):
    base, adapter, _ = case()
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert "model.safetensors" in refused(tmp_path, adapter, "--output", tmp_path / "out")


def test_quantised_base(case, tmp_path):
    base, adapter, _ = case()
    weights, name = load_file(base / "model.safetensors"), "model.layers.1.self_attn.k_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, base / "model.safetensors")
    message = refused(tmp_path, adapter, "--output", tmp_path / "out")
    assert name in message and "F8_E4M3" in message
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert "quantization_config" in refused(tmp_path, adapter, "--output", tmp_path / "out")


def test_base_from_the_hubs_cache(case, tmp_path, monkeypatch):
    """A model that was downloaded before is found by its id, without a network."""
    base, adapter, _ = case(shards="20KB")
    repo, commit = tmp_path / "hub" / "models--some--model", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(base, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, stdout, stderr = run(adapter, "--base", "some/model", "--output", tmp_path / "out", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["base_model"] == "some/model"
    assert load(tmp_path / "out").config.hidden_size == 32
    code, _, stderr = run(
        adapter, "--base", "some/model", "--revision", "v9", "--output", tmp_path / "x", "--format", "lora"
    )
    assert code == 2 and "some/model" in stderr
    next((repo / "snapshots" / commit).glob("model-00002*")).unlink()
    assert "model-00002" in refused(tmp_path, adapter, "--base", "some/model", "--output", tmp_path / "x")


@pytest.mark.parametrize("damage", ["truncated", "absent", "unlisted", "listed", "outside"])
def test_damaged_shards(case, tmp_path, damage):
    base, adapter, _ = case(shards="20KB")
    shard = sorted(base.glob("model-*.safetensors"))[2]
    index = json.loads((base / INDEX).read_text())
    name = next(n for n, file in index["weight_map"].items() if file == shard.name)
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "absent":
        shard.unlink()
    elif damage == "unlisted":
        del index["weight_map"][name]
    elif damage == "listed":
        index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shard.name
    else:
        index["weight_map"][name] = "../base/" + shard.name
    (base / INDEX).write_text(json.dumps(index))
    message = refused(tmp_path, adapter, "--output", tmp_path / "out")
    word = {"unlisted": "does not list it", "listed": "layers.9", "outside": "../base/"}.get(damage, str(shard))
    assert word in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["adapter", "base"])
def test_values_that_are_not_finite(case, tmp_path, value, where):
    base, adapter, _ = case()
    path = adapter / "adapter.safetensors" if where == "adapter" else base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj." + ("B" if where == "adapter" else "weight")
    tensors[name][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    (adapter / CHECKSUMS).unlink()
    message = refused(tmp_path, adapter, "--output", tmp_path / "out")
    assert name in message and "not finite" in message


def test_dtype_does_not_go_with_a_lora_export(case, tmp_path):
    _, adapter, _ = case()
    assert "--dtype" in refused(
        tmp_path, adapter, "--output", tmp_path / "out", "--format", "lora", "--dtype", "bfloat16"
    )


# -- the output ------------------------------------------------------------------------------------------


def test_output_with_files(case, tmp_path):
    _, adapter, _ = case()
    out = tmp_path / "out"
    out.mkdir()
    assert run(adapter, "--output", out)[0] == 0  # empty is fine
    (out / "stale.txt").write_text("x")
    assert "--overwrite" in refused(tmp_path, adapter, "--output", out)
    assert run(adapter, "--output", out, "--overwrite")[0] == 0
    assert not (out / "stale.txt").exists() and (out / "model.safetensors").exists()
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    assert "not a model" in refused(tmp_path, adapter, "--output", home, "--overwrite")
    assert "is a file" in refused(tmp_path, adapter, "--output", home / "thesis.tex", "--overwrite")


def test_a_failed_overwrite_keeps_what_was_there(case, tmp_path):
    base, adapter, _ = case()
    out = tmp_path / "out"
    assert run(adapter, "--output", out)[0] == 0
    before = (out / "model.safetensors").read_bytes()
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, adapter, "--output", out, "--overwrite")
    assert (out / "model.safetensors").read_bytes() == before


def test_output_must_keep_away_from_the_inputs(case, tmp_path):
    base, adapter, _ = case()
    (tmp_path / "link").symlink_to(base)
    for out in (base, adapter, base / "merged", adapter / "merged", tmp_path, tmp_path / "link"):
        assert "must not lie in" in refused(tmp_path, adapter, "--output", out, "--overwrite")


def test_output_under_a_file(case, tmp_path):
    _, adapter, _ = case()
    (tmp_path / "file").write_text("x")
    assert "cannot" in refused(tmp_path, adapter, "--output", tmp_path / "file" / "out")


@pytest.fixture
def common(tmp_path):
    """A directory like tmp_path that every user can reach: pytest's own are root's when root runs it."""
    if os.geteuid():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


def everybodys(directory: Path) -> Path:
    """transformers writes weights that their owner alone may read."""
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


@contextmanager
def ordinary_user():
    """Root may do anything, and so shows nothing."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("format", ["merged", "lora"])
def test_an_ordinary_user_may_not_write_there(common, format):
    save_adapter(common / "adapter", everybodys(save_base(common / "base")))
    arguments = (common / "adapter", "--format", format, "--output")
    assert run(*arguments, common / "before")[0] == 0  # what is imported late is there now
    (common / "locked").mkdir(mode=0o555)
    with ordinary_user():
        assert "Permission denied" in refused(common, *arguments, common / "locked" / "out")
        assert "Permission denied" in refused(common, *arguments, common / "locked" / "deep" / "out")
        assert run(*arguments, common / "after")[0] == 0  # it can read all it needs
        shutil.rmtree(common / "after")  # and may remove what is its own


@pytest.mark.parametrize("locked", ["adapter", "base", "model.safetensors"])
def test_an_ordinary_user_may_not_read_it(common, locked):
    save_adapter(common / "adapter", everybodys(save_base(common / "base")))
    assert run(common / "adapter", "--output", common / "before")[0] == 0
    path = common / "base" / locked if "." in locked else common / locked
    path.chmod(0)
    with ordinary_user():
        code, stdout, stderr = run(common / "adapter", "--output", common / "out")
    path.chmod(0o755)
    assert code == 2 and stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert str(path) in stderr and "ermission denied" in stderr and not (common / "out").exists()


def mounted(directory: Path, options: str) -> None:
    """A tmpfs; skipped where we may not mount."""
    directory.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount here")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True).returncode:
        pytest.skip("may not mount here")


@pytest.fixture
def read_only_disk(tmp_path):
    mounted(tmp_path / "read-only", "ro")
    yield tmp_path / "read-only"
    subprocess.run(["umount", tmp_path / "read-only"], check=True)


def test_a_disk_that_is_read_only(case, tmp_path, read_only_disk):
    base, adapter, _ = case()
    for words in ((adapter,), (adapter, "--format", "lora"), ("extract", base, "--base", base, "--r", 2)):
        assert "Read-only file system" in refused(tmp_path, *words, "--output", read_only_disk / "out")


@pytest.fixture
def small_disk(tmp_path):
    """64 kB, smaller than the tiny base."""
    mounted(tmp_path / "disk", "size=64k")
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.parametrize("found", ["before", "while"])
def test_full_disk(case, tmp_path, small_disk, monkeypatch, found):
    _, adapter, _ = case()
    if found == "while":
        monkeypatch.setattr(output.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 0, 1 << 60))
    message = refused(tmp_path, adapter, "--output", small_disk / "deep" / "out")
    assert ("has only 65.5 kB free" if found == "before" else "No space left") in message
    assert not list(small_disk.iterdir())


def killed_merge(adapter, out):
    """What a merge leaves that is killed when it has written half. Forked: that spares the seconds of imports."""

    def progress(done, total):
        if 2 * done > total:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=merge, args=(adapter, out), kwargs={"writing": Writing(True, progress)}
    )
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("there", [False, True])
def test_killed_in_the_middle(case, tmp_path, there):
    _, adapter, _ = case()
    out = tmp_path / "out"
    if there:
        merge(adapter, out)
        (out / "old").touch()
    killed_merge(adapter, out)
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    assert (out / "old").exists() if there else not out.exists()
    (tmp_path / ".outer.partial-1").mkdir()  # another output's: not ours to remove
    merge(adapter, out, writing=Writing(overwrite=True))
    assert load(out).config.hidden_size == 32 and not (out / "old").exists()
    assert [p.name for p in tmp_path.glob(".*")] == [".outer.partial-1"]


def test_a_killed_merge_goes_on_with_the_files_it_had_finished(case, tmp_path):
    base, adapter, _ = case(shards="20KB")
    killed_merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.glob(".out.partial-*")
    finished = json.loads((partial / ".finished.json").read_text())
    inodes = {file: (partial / file).stat().st_ino for file in finished}
    assert 0 < len(inodes) < len(list(base.glob("*.safetensors")))
    merge(adapter, tmp_path / "plain")
    report = merge(adapter, tmp_path / "out")
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert {file: (tmp_path / "out" / file).stat().st_ino for file in finished} == inodes
    assert not list((tmp_path / "out").glob(".*")) and not list(tmp_path.glob(".*"))
    assert report.rounding == 0.0 and report.adapted == 21


@pytest.mark.parametrize(
    "note", ["[]", '{"FILE": 5}', '{"FILE": {"bytes": "x"}}', '{"FILE": {"bytes": -1, "a": 1}}', "{"]
)
def test_what_a_killed_merge_noted_is_damaged(case, tmp_path, note):
    base, adapter, _ = case(shards="20KB")
    killed_merge(adapter, tmp_path / "out")
    (partial,) = tmp_path.glob(".out.partial-*")
    (partial / ".finished.json").write_text(note.replace("FILE", min(path.name for path in base.glob("*.safetensors"))))
    merge(adapter, tmp_path / "out")
    assert load(tmp_path / "out").config.hidden_size == 32


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have files of another user")
def test_somebody_else_leaves_half_a_merge_beside_the_output(case, tmp_path):
    """With the right key, in a directory that both may write: the finished files in it are whatever they chose."""
    _, adapter, _ = case(shards="20KB")
    killed_merge(adapter, tmp_path / "out")
    (partial,) = tmp_path.glob(".out.partial-*")
    file = next(iter(json.loads((partial / ".finished.json").read_text())))
    (partial / file).write_bytes(b"x" * (partial / file).stat().st_size)
    os.chown(partial, 12345, 12345)
    merge(adapter, tmp_path / "out")
    assert load(tmp_path / "out").config.hidden_size == 32


@pytest.mark.parametrize("change", ["adapter", "base", "dtype"])
def test_a_killed_merge_of_something_else_is_not_gone_on_with(case, tmp_path, change):
    base, adapter, _ = case(shards="20KB")
    killed_merge(adapter, tmp_path / "out")
    (partial,) = tmp_path.glob(".out.partial-*")
    assert (partial / ".finished.json").exists()
    path = {"adapter": adapter / "adapter.safetensors", "base": sorted(base.glob("*.safetensors"))[0]}.get(change)
    if path is not None:
        save_file({name: t * 2 for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    (adapter / CHECKSUMS).unlink()
    dtype = torch.bfloat16 if change == "dtype" else None
    merge(adapter, tmp_path / "out", dtype=dtype)
    merge(adapter, tmp_path / "plain", dtype=dtype)
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_in_one_of_several_files_is_told(case, tmp_path, threads):
    base, adapter, _ = case(shards="20KB")
    path = sorted(base.glob("model-*.safetensors"))[3]
    weights = load_file(path)
    name = next(n for n, t in weights.items() if t.ndim == 2)
    weights[name][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    arguments = (adapter, "--output", tmp_path / "out", "--threads", threads)
    assert f"{name} has values that are not finite" in refused(tmp_path, *arguments)


def test_the_base_must_be_the_one_trained_on(case, tmp_path):
    base, adapter, _ = case(shards="20KB")
    saved = read_adapter(adapter)
    samples = base_samples(str(base))
    write_adapter(adapter, saved.method, saved.tensors, base_model=str(base), base_revision=None, base_tensors=samples)
    assert read_adapter(adapter).base_tensors == samples
    code, stdout, _ = run(adapter, "--output", tmp_path / "right", "--json")
    assert code == 0 and json.loads(stdout)["base_checked"]
    model = load(base)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    model.save_pretrained(tmp_path / "tuned")
    arguments = (adapter, "--base", tmp_path / "tuned", "--output", tmp_path / "out")
    message = refused(tmp_path, *arguments)
    assert "is not the base" in message and "8 of 8" in message and "--any-base" in message
    assert "is not the base" in refused(tmp_path, *arguments, "--format", "lora")
    assert run(*arguments, "--any-base")[0] == 0


def test_options_that_do_not_go_together(case, tmp_path):
    _, adapter, _ = case()
    out = ("--output", tmp_path / "out")
    assert "--max-rank" in refused(tmp_path, adapter, *out, "--max-rank", 4)
    assert "--verify" in refused(tmp_path, adapter, *out, "--format", "lora", "--verify")
    assert "--upload" in refused(tmp_path, adapter, *out, "--upload")
    assert "ADAPTER_OR_RUN" in refused(tmp_path, *out)
    assert "ADAPTER_OR_RUN" in refused(tmp_path, adapter, *out, "--adapter", adapter)
    assert "must be a number" in refused(tmp_path, *out, "--adapter", f"{adapter}:much")
    assert "--base" in refused(tmp_path, *out, "--extract", tmp_path / "base")
    for form in ("--extract", "extract"):
        extract = (form, tmp_path / "base", "--base", tmp_path / "base", *out)
        assert "in [0, --r=2]" in refused(tmp_path, *extract, "--r", 2, "--k", 3)
        assert "--upload needs --push" in refused(tmp_path, *extract, "--upload")


def test_sums_proofs_and_cards(case, tmp_path):
    _, adapter, _ = case()
    out = tmp_path / "out"
    code, stdout, _ = run("--adapter", f"{adapter}:0.5", "--adapter", f"{adapter}:0.5", "--output", out, "--verify")
    assert code == 0 and "0.5 rasa + 0.5 rasa" in stdout and "verified on 4 prompts" in stdout
    code, stdout, stderr = run(adapter, "--output", tmp_path / "card", "--push", "me/model", "--verify", "--json")
    assert code == 0 and json.loads(stdout)["verify"]["logits"] < 1e-4
    assert "not uploaded" in stderr and "model.safetensors" in stderr
    card = (tmp_path / "card" / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "adapter_logits" in card and "2503.12576" in card


def test_extraction_prints_both_errors(case, tmp_path):
    base, adapter, _ = case()
    merge(adapter, tmp_path / "tuned")
    arguments = (tmp_path / "tuned", "--base", base, "--r", 4, "--k", 1, "--sweeps", 5)
    code, stdout, _ = run("extract", *arguments, "--output", tmp_path / "out")
    assert code == 0 and "rasa r=4 k=1" in stdout and "lora r=4" in stdout and "mlp.up_proj" in stdout
    code, stdout, stderr = run("--extract", *arguments, "--output", tmp_path / "json", "--json", "--push", "me/model")
    total = json.loads(stdout)["total"]
    assert code == 0 and "not uploaded" in stderr and (tmp_path / "json" / "README.md").exists()
    adapters = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("out", "json")]
    assert adapters[0] == adapters[1]
    assert 0 <= total["error"] <= total["lora_error"] < total["norm2"]
    assert read_adapter(tmp_path / "out").base_tensors == base_identity(str(base))


def test_killed_between_the_two_renames_of_a_replacement(case, tmp_path):
    _, adapter, _ = case()
    merge(adapter, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced-123")
    merge(adapter, tmp_path / "out", writing=Writing(overwrite=True))
    assert (tmp_path / "out" / "model.safetensors").exists() and not list(tmp_path.glob(".*"))


def test_two_merges_into_one_output(case, tmp_path):
    _, adapter, _ = case()
    with output.new_directory(tmp_path / "out", overwrite=False, inputs=[], nbytes=0) as partial:
        assert "another merge" in refused(tmp_path, adapter, "--output", tmp_path / "out")
        (partial / "config.json").touch()
    assert (tmp_path / "out" / "config.json").exists()


def test_interrupted(case, tmp_path, monkeypatch):
    _, adapter, _ = case()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rasa_train.merging.merged.copy_small_files", interrupt)
    before = set(tmp_path.iterdir())
    assert run(adapter, "--output", tmp_path / "out")[0] == 130
    assert set(tmp_path.iterdir()) == before
