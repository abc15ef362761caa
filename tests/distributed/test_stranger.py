"""A stranger on the network, who can reach the ports of a run and has no account on its machines."""

from __future__ import annotations

import base64
import os
import pickle
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousConnectionError

from rasa_train.distributed import door, network
from rasa_train.distributed.door import Door
from rasa_train.distributed.meeting import Meeting
from rasa_train.errors import UserError
from tests.conftest import Cli

from .conftest import reach, start
from .test_launch import PATIENCE, workers_of


def listening(pids: list[int]) -> list[tuple[str, int]]:
    """The addresses and ports at which the processes listen, as ``ss -ltn`` shows them."""
    sockets = {os.readlink(link) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pids[0]}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                family = socket.AF_INET if table == "tcp" else socket.AF_INET6
                found.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def store_a_pickle(host: str, port: int, path: Path) -> bool:
    """Store a pickle that makes ``path`` under the key of torch's rendezvous. Returns whether the port took it."""
    try:
        socket.create_connection((host, port), 2).close()
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False)
        store.set("torch.rendezvous.rasa-train", base64.b64encode(pickle.dumps(Touch(path))).decode())
    except (OSError, RuntimeError):
        return False
    return True


def test_a_stranger_finds_no_open_port_of_a_run_on_one_machine(home: Path, tmp_path: Path) -> None:
    """Every port is that of gloo on the loopback interface, and what a stranger says there is not understood."""
    run = home / "closed"
    process = start(home, "--nproc", "2", "output_dir=closed")
    reach(process, run, 2)
    ports = listening([process.pid, *workers_of(process)])
    outside = [address for address in network.addresses().values() if not address.startswith("127.")]
    taken = [
        (host, port, store_a_pickle(host, port, tmp_path / f"{host}-{port}"))
        for _, port in ports
        for host in ["127.0.0.1", *outside]
    ]
    time.sleep(0.5)  # torch's agent looks ten times a second
    made = sorted(path.name for path in tmp_path.iterdir())
    _, stderr = process.communicate(timeout=PATIENCE)
    assert not made, f"code of a stranger has run: {made}"
    assert ports and all(re.match(r"127\.|::1$|::ffff:127\.", address) for address, _ in ports), ports
    assert not any(took for *_, took in taken), taken
    assert process.returncode == 0, stderr


# -- several nodes -------------------------------------------------------------------------------------------

KNOWN = b"that of both nodes"


@pytest.fixture
def doors() -> Iterator[list[Door]]:
    """Those of node 0, of node 1 and of somebody who guesses the secret."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = [Door(known, "127.0.0.1", port, 20) for known in (KNOWN, KNOWN, b"another, as long")]
    yield found
    for one in found:
        one.close()


def meet(nodes: list[Meeting]) -> list[str]:
    """Let the nodes come to their next meeting. Returns what each reads of what the first says there."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(Meeting.next_rendezvous, nodes))
    assert [info.rank for info in found] == [0, 1]
    found[0].store.set("said", f"in meeting {nodes[0].get_run_id()}")
    return [info.store.get("said").decode() for info in found]


def answer(port: int, words: bytes) -> bytes:
    """What node 0 says to a stranger who says ``words``, after its challenge."""
    with socket.create_connection(("127.0.0.1", port), 20) as stranger, suppress(OSError):
        assert len(stranger.recv(100)) == door.NONCE
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        return stranger.recv(100)
    return b""


def test_a_stranger_does_not_come_to_the_meeting_of_two_nodes(doors: list[Door], tmp_path: Path) -> None:
    nodes = [Meeting(2, rank, doors[rank], 20) for rank in (0, 1)]
    assert meet(nodes) == ["in meeting 0"] * 2
    assert not store_a_pickle("127.0.0.1", doors[0].port, tmp_path / "made")
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(door.NONCE + door.PROOF), os.urandom(1 << 20)):
        assert answer(doors[0].port, words) == b""
    assert doors[0].turned_away == "127.0.0.1"
    with pytest.raises(UserError, match="has another secret"):
        Meeting(2, 1, doors[2], 20).next_rendezvous()
    assert not any(tmp_path.iterdir())


def test_node_0_listens_at_the_given_address_only(doors: list[Door]) -> None:
    doors[0].guard(1)
    assert ("127.0.0.1", doors[0].port) in listening([os.getpid()])
    elsewhere = [("0.0.0.0", doors[0].port), ("::", doors[0].port)]
    assert not set(elsewhere) & set(listening([os.getpid()]))
    with pytest.raises(UserError, match="node 0 cannot listen at"):
        doors[2].guard(1)


def test_a_crowd_of_silent_strangers_does_not_keep_a_node_away(
    doors: list[Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_SECONDS", 1.0)
    monkeypatch.setattr(door, "MOST_STRANGERS", 8)
    doors[0].guard(1)
    crowd = [socket.create_connection(("127.0.0.1", doors[0].port)) for _ in range(20)]
    assert doors[1].reach(time.monotonic() + 30) > 0
    for stranger in crowd:
        stranger.close()


def test_nodes_meet_again_after_a_restart_and_after_one_was_replaced(doors: list[Door]) -> None:
    """As they come: the agent of each node sees that another one waits. They part when one ends the job."""
    nodes = [Meeting(2, rank, doors[rank], 20) for rank in (0, 1)]
    assert meet(nodes) == ["in meeting 0"] * 2
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0]
    nodes[1] = Meeting(2, 1, doors[1], 20)  # its process was killed, and started again
    with ThreadPoolExecutor() as pool:
        second = pool.submit(nodes[1].next_rendezvous)
        while not nodes[0].num_nodes_waiting():
            time.sleep(0.01)
        assert nodes[0].next_rendezvous().rank == 0 and second.result().rank == 1
    assert [node.get_run_id() for node in nodes] == ["1", "1"]
    nodes[0].shutdown()
    assert nodes[1].is_closed()
    with pytest.raises(RendezvousClosedError):
        nodes[1].next_rendezvous()
    doors[0].close()
    with pytest.raises(RendezvousConnectionError):
        nodes[1].num_nodes_waiting()


@pytest.mark.parametrize(
    ("words", "mode", "wrong"),
    [
        (None, 0o600, "several nodes need a secret in RASA_TRAIN_SECRET"),
        ("short\n", 0o600, "it is too short"),
        ("long enough, not for all\n", 0o640, "other users may read or write"),
    ],
)
def test_several_nodes_need_a_secret_that_nobody_else_can_read(
    words: str | None, mode: int, wrong: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words:
        (tmp_path / "secret").write_text(words)
        (tmp_path / "secret").chmod(mode)
        monkeypatch.setenv("RASA_TRAIN_SECRET_FILE", str(tmp_path / "secret"))
    done = cli("train", "demo", "--nnodes", "2", "--node-rank", "0", "--rdzv", "127.0.0.1:29519")
    assert done.returncode == 2 and wrong in done.stderr, done.stderr


def test_the_secret_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_bytes(KNOWN + b"\n")
    monkeypatch.setenv("RASA_TRAIN_SECRET_FILE", str(path))
    assert door.secret() == KNOWN
    monkeypatch.setenv("RASA_TRAIN_SECRET_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot read"):
        door.secret()
