"""Sets of the hub that are streamed while they are tokenised: a server on this machine answers as the hub does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_data import rows_of, write_lines

from rasa_train.data import cache, row_files
from rasa_train.data.config import DataConfig
from rasa_train.data.hub_source import HubSource, SourceMissing
from rasa_train.data.prepare import PreparedData, prepare

ROWS = rows_of(700)


class Hub(BaseHTTPRequestHandler):
    """What a set is asked for: its commit, the list of its files, and ranges of their bytes."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    commit: str
    asked: list[str]
    broken: bool

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.partition(f"/datasets/some/set/resolve/{self.commit}/")[2]
        if path.startswith("/api/datasets/some/set/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in self.files.items()
            ]
            self.answer(json.dumps(listed).encode())
        elif path.startswith("/api/datasets/some/set"):
            facts = {"id": "some/set", "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}
            self.answer(json.dumps(facts).encode())
        elif name in self.files and not (self.broken and "00001" in name):
            self.asked.append(f"{self.command} {name}")
            self.answer(self.files[name])
        else:
            self.answer(b"{}", 404)

    def answer(self, body: bytes, code: int = 200) -> None:
        part, whole = body, len(body)
        if code == 200 and (wanted := self.headers.get("Range")):
            first, last = wanted.removeprefix("bytes=").split("-")
            part, code = body[int(first) : int(last or whole) + 1], 206
        self.send_response(code)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{whole}")
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        pass


def parquet(rows: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=100)
    return bytes(sink.getvalue())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub with ``some/set``, and empty caches."""
    files = {f"train-0000{i}-of-00002.parquet": parquet(ROWS[i * 350 : (i + 1) * 350]) for i in range(2)}
    facts = {"files": files, "commit": "0123456789abcdef" * 2 + "01234567", "asked": [], "broken": False}
    handler = type("OneSet", (Hub,), facts)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("RASA_TRAIN_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


def test_a_set_is_streamed_and_known_again_without_a_network(
    hub: type[Hub], tmp_path: Path, bpe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(dataset="some/set", num_workers=1)

    def content(prepared: PreparedData) -> list[list[int]]:
        return [example.input_ids.tolist() for example in prepared.train]

    def read() -> list[str]:
        """Return what was asked of the second file; the schema is read from the first one."""
        return [name for name in hub.asked if "00001" in name]

    streamed = prepare(config, bpe)
    local = prepare(DataConfig(dataset=str(write_lines(tmp_path / "rows.jsonl", ROWS)), num_workers=1), bpe)
    assert content(streamed) == content(local)
    assert not list(tmp_path.glob("datasets/**/*.arrow"))  # nothing was downloaded as a whole
    assert read()

    hub.asked.clear()
    again = prepare(config, bpe)
    assert (again.key, read()) == (streamed.key, [])
    with monkeypatch.context() as offline:
        offline.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        assert prepare(config, bpe).key == streamed.key
        with pytest.raises(SourceMissing, match="cannot be reached"):  # other tokens need the rows
            prepare(config.model_copy(update={"max_length": 9}), bpe)

    # A set that is in the local cache is read there, under the identity that it always had.
    other = config.model_copy(update={"cache_dir": str(tmp_path / "other")})
    whole = HubSource("some/set", None, "train", None)
    assert "commit" not in whole.fingerprint() and len(list(whole.rows())) == 700
    hub.asked.clear()
    assert content(prepare(other, bpe)) == content(local)
    assert read() == []
    assert not list((tmp_path / "other").glob("hub/*"))

    # Another commit is another set. A stream that breaks off says so, and nothing is taken for whole.
    hub.commit = "f" * 40
    hub.files["train-00000-of-00002.parquet"] = parquet(ROWS[:100])
    changed = prepare(config, bpe)
    assert (changed.key != streamed.key, changed.stats.rows) == (True, 450)
    hub.commit, hub.broken = "e" * 40, True
    hub.files["train-00000-of-00002.parquet"] = parquet(ROWS[50:350])
    monkeypatch.setattr(cache, "SAVE_EVERY", 0)
    monkeypatch.setattr(row_files, "_AT_A_TIME", (100, 30, 1))
    with pytest.raises(SourceMissing, match=r"some/set could not be read to its end: .*goes on from there"):
        prepare(config, bpe)
    hub.broken, done = False, list[int]()
    mended = prepare(config, bpe, progress=done.append)
    assert (done[0], mended.stats.rows) == (512, 650)  # the first 256 rows were tokenised before
    assert content(mended) == content(local)[50:]
