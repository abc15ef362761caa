"""Bases from the hub: a server on this machine answers as the hub does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file

from rasa_train.merging.merged import merge

from .conftest import save_adapter, save_base
from .test_command import INDEX, run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """What a download asks for: the commit, its files, and each file."""

    model: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        names = sorted(path.name for path in self.model.iterdir())
        _, _, name = self.path.partition(f"/some/model/resolve/{COMMIT}/")
        if self.path.startswith(f"/api/models/some/model/tree/{COMMIT}"):
            files = [{"type": "file", "path": name, "size": (self.model / name).stat().st_size} for name in names]
            self.answer(json.dumps([{**file, "oid": "0" * 40} for file in files]).encode())
        elif self.path.startswith("/api/models/some/model"):
            facts = {"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self.answer(json.dumps(facts).encode())
        elif name in names:
            self.asked.append(name)
            self.answer((self.model / name).read_bytes())
        else:
            self.send_error(404)

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub with ``some/model``, whose files are in ``model``, and an empty cache."""
    handler = type("OneModel", (Hub,), {"model": save_base(tmp_path / "model", shards="20KB"), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_base_is_downloaded_as_far_as_it_is_needed(hub: type[Hub], tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", hub.model)
    (hub.model / "pytorch_model.bin").write_bytes(b"a pickle")
    merge(tmp_path / "adapter", tmp_path / "of-hub", base="some/model")
    assert "pytorch_model.bin" not in hub.asked and INDEX in hub.asked
    merge(tmp_path / "adapter", tmp_path / "of-directory")
    shards = sorted((tmp_path / "of-directory").glob("*.safetensors"))
    assert len(shards) > 3
    for path in shards:
        got, wanted = load_file(tmp_path / "of-hub" / path.name), load_file(path)
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ('{"weight_map": {"a"', "is not valid JSON"),
        ("[]", "must hold one JSON object"),
        ('{"metadata": {}}', "has no `weight_map`"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "must name *.safetensors files beside it"),
    ],
)
def test_an_index_that_is_broken(hub: type[Hub], tmp_path: Path, index: str, says: str) -> None:
    save_adapter(tmp_path / "adapter", hub.model)
    (hub.model / INDEX).write_text(index)
    code, stdout, stderr = run(tmp_path / "adapter", "--base", "some/model", "--output", tmp_path / "out")
    assert code == 2 and stdout == "" and not (tmp_path / "out").exists()
    message = stderr.splitlines()[-1]  # above it are the bars of the download
    assert message.startswith("error: ") and INDEX in message and says in message
