"""Which errors say that a worker was lost, and which say something else."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from rasa_train.distributed.rendezvous import broken_off, unconnected


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.2]:7001", True),
        (
            "[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:7001: Connection reset by peer",
            True,
        ),
        (
            "[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation",
            True,
        ),
        ("[third_party/gloo/gloo/transport/tcp/pair.cc:410] Application timeout caused pair closure", True),
        (
            "[enforce fail at third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 8 > 4",
            False,
        ),
        ("start (5) + length (5) exceeds dimension size (9).", False),
        ("Error(s) in loading state_dict for /data/gloo-timed/model: size mismatch", False),
    ],
)
def test_an_error_of_another_kind_is_no_lost_exchange(said: str, lost: bool) -> None:
    assert broken_off(RuntimeError(said)) == lost


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.27.3", True),
        ("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details): Duplicate GPU detected", False),
    ],
)
def test_a_misuse_of_nccl_is_no_lost_exchange(said: str, lost: bool) -> None:
    assert broken_off(torch.distributed.DistBackendError(said)) == lost


def test_a_wrong_interface_and_a_closed_port_are_no_connection() -> None:
    """The errors are torch's own."""
    with pytest.raises(RuntimeError) as interface:
        torch.distributed.ProcessGroupGloo.create_device(interface="eth99")
    with pytest.raises(RuntimeError) as port:
        torch.distributed.TCPStore("127.0.0.1", 1, is_master=False, timeout=timedelta(seconds=1))
    assert unconnected(interface.value) and unconnected(port.value)


GPU_FAILS = ["CUDA error: out of memory", "CUDA error: misaligned address"]


@pytest.mark.parametrize("said", GPU_FAILS)
def test_a_gpu_that_fails_where_the_workers_meet_is_not_reported_as_the_network(said: str) -> None:
    assert not unconnected(RuntimeError(said)) and not unconnected(torch.distributed.DistBackendError(said))
