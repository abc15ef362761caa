"""The way from the nodes of a job to the store of node 0, for those who know the secret.

Node 0 listens at the address of ``--rdzv``. Each side proves, by an HMAC of two random numbers, that it knows the
secret, before anything else it says is read; the bytes that follow are passed on, in plain text, to the store, which
listens on the loopback interface of node 0. On every other node the agent listens on the loopback interface, and leads
each connection of its workers to node 0 in this way.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Coroutine
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..errors import UserError

T = TypeVar("T")
SECRET, SECRET_FILE = "RASA_TRAIN_SECRET", "RASA_TRAIN_SECRET_FILE"
LENGTH, NONCE, PROOF = 16, 32, 32
HANDSHAKE_SECONDS = 10.0
MOST_STRANGERS = 256
"""Largest number of connections, at a time, that have not yet proved to know the secret. Further ones are closed."""


def secret() -> bytes:
    """Return the secret of the job, from the environment or from the file that the environment names.

    Raises:
        UserError: there is none, it is short, or other users can read the file.
    """
    how = f"the same on each node, of at least {LENGTH} characters, for example from: openssl rand -hex 32"
    text, path = os.environ.get(SECRET), os.environ.get(SECRET_FILE)
    if text is None and path:
        try:
            with Path(path).open("rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    raise UserError(f"{SECRET_FILE}: other users may read or write {path}; chmod 600 {path}")
                text = file.read(4096).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{SECRET_FILE}: cannot read {path}: {error}") from None
    words = (text or "").strip()
    if len(words) < LENGTH:
        found = "it is too short" if words else "there is none"
        raise UserError(f"several nodes need a secret in {SECRET}, or in a file named by {SECRET_FILE}: {how}; {found}")
    return words.encode()


class _Connection(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class _Refused(Exception):
    """The other side does not know the secret."""


class Door:
    """One node's end of the way to the store. Its sockets are looked after by a thread of its own."""

    def __init__(self, secret: bytes, host: str, port: int, timeout_seconds: float) -> None:
        self.host, self.port = host, port
        self._secret, self._silence = secret, int(1000 * (timeout_seconds + 15.0))
        self._away: dict[str, None] = {}
        self._strangers = 0
        self._store_port = 0
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: None)  # connections break off
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def turned_away(self) -> str:
        """The addresses of those that did not know the secret, on one line."""
        return ", ".join(self._away)

    def guard(self, store_port: int) -> None:
        """Listen on node 0, at the given address only, and lead those who know the secret to the store.

        Raises:
            UserError: the address is not one of this machine, or the port is taken.
        """
        self._store_port = store_port
        most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(OSError, ValueError):  # three descriptors for each connection of a worker
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(most[0], min(most[1], 65_536)), most[1]))
        try:
            address = socket.gethostbyname(self.host)
            self._server = self._run(asyncio.start_server(self._admit, address, self.port, backlog=1024))
        except OSError as error:
            raise UserError(f"--rdzv: node 0 cannot listen at {self.host}:{self.port}: {error.strerror}") from None

    def reach(self, deadline: float) -> int:
        """Return the port, on the loopback interface of this node, that leads to the store of node 0.

        Raises:
            OSError: node 0 does not answer by the ``deadline``, a time of ``time.monotonic()``.
            UserError: it has another secret.
        """

        async def open_way() -> asyncio.Server:
            (await self._dial(deadline)).writer.close()  # the first to answer for the secret
            return await asyncio.start_server(self._lead_out, "127.0.0.1", 0, backlog=1024)

        try:
            self._server = self._run(open_way())
        except _Refused:
            raise UserError(
                f"node 0 at {self.host}:{self.port} has another secret than this node, or another program listens "
                f"there; {SECRET} must be the same on each node"
            ) from None
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening, and close all connections."""

        async def end() -> None:
            if self._server:
                self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if tasks and self._store_port:
                await asyncio.wait(tasks, timeout=1.0)  # an answer may be under way to nodes that are about to end
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # transports close in the next round of the loop

        if self._loop.is_closed():
            return
        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- node 0 ----------------------------------------------------------------------------------------------

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, EOFError, TimeoutError, asyncio.CancelledError), closing(writer):
            if self._strangers >= MOST_STRANGERS:
                return
            self._strangers += 1
            try:
                await asyncio.wait_for(self._examine(reader, writer), HANDSHAKE_SECONDS)
            finally:
                self._strangers -= 1
            store = _Connection(*await asyncio.open_connection("127.0.0.1", self._store_port))
            await self._pass_on(_Connection(reader, writer), store)

    async def _examine(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = os.urandom(NONCE)
        writer.write(mine)
        theirs, proof = await reader.readexactly(NONCE), await reader.readexactly(PROOF)
        if not hmac.compare_digest(proof, self._proof(b"node", mine, theirs)):
            if len(self._away) < 8:
                self._away[writer.get_extra_info("peername")[0]] = None
            raise EOFError
        writer.write(self._proof(b"node 0", mine, theirs))

    # -- the other nodes -------------------------------------------------------------------------------------

    async def _lead_out(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, _Refused, asyncio.CancelledError), closing(writer):
            outside = await self._dial(time.monotonic() + 6 * HANDSHAKE_SECONDS)
            await self._pass_on(_Connection(reader, writer), outside)

    async def _dial(self, deadline: float) -> _Connection:
        """Connect to node 0, which may not listen yet or have many strangers at the door.

        Raises:
            OSError: it does not answer by the ``deadline``.
            _Refused: one side does not know the other's secret.
        """
        while True:
            try:
                return await asyncio.wait_for(self._introduce(), HANDSHAKE_SECONDS)
            except (OSError, EOFError, TimeoutError):
                if time.monotonic() > deadline:
                    raise OSError(f"{self.host}:{self.port} does not answer") from None
            await asyncio.sleep(0.2)

    async def _introduce(self) -> _Connection:
        reader, writer = await asyncio.open_connection(self.host, self.port, family=socket.AF_INET)
        try:
            theirs, mine = await reader.readexactly(NONCE), os.urandom(NONCE)
            writer.write(mine + self._proof(b"node", theirs, mine))
            try:
                proof = await reader.readexactly(PROOF)
            except EOFError:
                raise _Refused from None
            if not hmac.compare_digest(proof, self._proof(b"node 0", theirs, mine)):
                raise _Refused
        except BaseException:
            writer.close()
            raise
        return _Connection(reader, writer)

    # -- both ------------------------------------------------------------------------------------------------

    def _proof(self, role: bytes, of_node_0: bytes, of_node: bytes) -> bytes:
        return hmac.digest(self._secret, b"rasa_train 1 " + role + of_node_0 + of_node, hashlib.sha256)

    async def _pass_on(self, one: _Connection, other: _Connection) -> None:
        """Pass on what each says to the other, until one falls silent: it has closed the connection, or what it was
        sent has not arrived for longer than the workers wait for each other (Linux)."""
        for connection in (one, other):
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                connection.writer.get_extra_info("socket").setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._silence
                )
        ways = [asyncio.create_task(_copy(one.reader, other.writer))]
        ways += [asyncio.create_task(_copy(other.reader, one.writer))]
        with closing(one.writer), closing(other.writer):
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
