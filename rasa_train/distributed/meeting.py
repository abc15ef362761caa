"""The meeting of a job's nodes: a rendezvous of torch's agents that reads nothing a stranger says.

On one machine the agent keeps its store in memory, the workers share a file, and nothing listens. On several, the store
is that of node 0 and listens on its loopback interface; ``door.py`` leads to it from the other nodes. No value in the
store is ever unpickled, unlike in torch's own dynamic rendezvous.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

from .door import Door

BACKEND = "rasa_train"
STOPPING_SECONDS = 50.0
"""Additional seconds to come to a later meeting: torch's agent gives workers half a minute to end."""
CLOSED, HELD = "closed", "held"


class Meeting(RendezvousHandler):
    """The nodes of a job, whose number does not change. They meet at the start, and again whenever workers are started
    anew; a node whose process was replaced meanwhile may come in its place."""

    def __init__(self, nodes: int, node_rank: int, door: Door | None, timeout_seconds: float) -> None:
        self.nodes, self.node_rank, self.door, self.timeout = nodes, node_rank, door, timeout_seconds
        self.number, self.port = 0, 0
        self._store: Store | None = None

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        """Return the number of the last meeting, from 0: workers find it as ``TORCHELASTIC_RUN_ID``."""
        return str(self.number)

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all nodes have come, and return the store and this node's place among them.

        Raises:
            RendezvousError: another node has ended the job or has not come in time, or the store is out of reach.
            UserError: node 0 has another secret.
        """
        deadline = time.monotonic() + self.timeout + (STOPPING_SECONDS if self._store else 0.0)
        with _connected():
            store = self._store = self._store or self._open(deadline)
            number = self.number = store.add(HELD, 0)
            store.set(f"{number}/{self.node_rank}", "")
            store.add(_came(number), 1)
            everyone = [f"{number}/{rank}" for rank in range(self.nodes)]
            while not store.check([f"{number}/begun"]):
                if store.check([CLOSED]):
                    raise RendezvousClosedError("another node has ended the job")
                if self.node_rank == 0 and store.check(everyone):
                    store.add(HELD, 1)
                    store.set(f"{number}/begun", "")
                elif time.monotonic() > deadline:
                    away = f" Turned away: {self.door.turned_away}." if self.door and self.door.turned_away else ""
                    raise RendezvousTimeoutError(f"A node has not come.{away}")
                else:
                    time.sleep(0.1)
        where = RendezvousStoreInfo("127.0.0.1", self.port)
        return RendezvousInfo(PrefixStore(f"of meeting {number}", store), self.node_rank, self.nodes, where)

    def _open(self, deadline: float) -> Store:
        if self.door is None:
            return HashStore()
        patience = timedelta(seconds=self.timeout + STOPPING_SECONDS)
        if self.node_rank == 0:
            listening = socket.create_server(("127.0.0.1", 0))
            self.port = listening.getsockname()[1]
            store = TCPStore(
                "127.0.0.1",
                self.port,
                is_master=True,
                timeout=patience,
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )
            self.door.guard(self.port)
            return store
        self.port = self.door.reach(deadline)
        return TCPStore("127.0.0.1", self.port, is_master=False, timeout=patience, wait_for_workers=False)

    def num_nodes_waiting(self) -> int:
        """Return how many nodes have come to the next meeting; the agent of each other node then joins them."""
        assert self._store is not None
        with _connected():
            return int(self._store.add(_came(self.number + 1), 0))

    def is_closed(self) -> bool:
        with _connected():
            return self._store is not None and bool(self._store.check([CLOSED]))

    def set_closed(self) -> None:
        """End the job for all nodes: those that wait for a meeting stop waiting."""
        with suppress(RuntimeError):  # node 0 has gone
            if self._store is not None:
                self._store.set(CLOSED, "")

    def shutdown(self) -> bool:
        self.set_closed()
        return True


def _came(number: int) -> str:
    return f"{number}/came"


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise RendezvousConnectionError(str(error)) from error


def handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """Return the ``Meeting`` in torch's ``parameters``."""
    meeting: Meeting = parameters.config["meeting"]
    return meeting


rendezvous_handler_registry.register(BACKEND, handler)
