"""Rows encoded in this process, and in several processes if there are many."""

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from ..errors import UserError
from ..stop import die_with
from .contamination import Screened
from .encode import Encoded, Encoder, EncoderRow
from .encode_texts import TextEncoder

AnyEncoder = Encoder | TextEncoder | Screened
Chunk = list[EncoderRow]
CHUNK = 256
"""Most rows of a chunk."""


def encode_all(
    encoder: AnyEncoder, chunks: Iterator[Chunk], workers: int, pool_threshold: int
) -> Iterator[tuple[int, Encoded]]:
    """Yield (rows, encoded) of each chunk, in order. This process encodes the first chunks; if there are many, a pool
    encodes the rest."""
    here = chunks if workers == 1 else itertools.islice(chunks, -(-pool_threshold // CHUNK))
    for chunk in here:
        yield len(chunk), encoder.encode(chunk)
    following = next(chunks, None)
    if following is not None:
        yield from _encode_in_pool(encoder, itertools.chain([following], chunks), workers)


def _encode_in_pool(encoder: AnyEncoder, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[int, Encoded]]:
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encoder,)
    )
    waiting: deque[tuple[int, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((len(chunk), pool.submit(_encode_chunk, chunk)))
            if len(waiting) > 2 * workers:  # bounds the memory: reading is faster than encoding
                size, future = waiting.popleft()
                yield size, future.result()
        for size, future in waiting:
            yield size, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises has died, perhaps for lack of memory (or a script of your own lacks `if "
            "__name__ == '__main__':`); set data.num_workers: 1",
            key="data.num_workers",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: AnyEncoder  # the encoder of a worker process


def _start_worker(encoder: AnyEncoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process for each core already
    if parent := multiprocessing.parent_process():
        die_with(parent.pid or 0, signal.SIGKILL)  # it would wait for more work for ever
    _encoder = encoder


def _encode_chunk(chunk: Chunk) -> Encoded:
    return _encoder.encode(chunk)
