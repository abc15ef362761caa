"""Signals to this very process."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from rasa_train.cli.errors import stoppable
from rasa_train.errors import Stopped
from rasa_train.stop import StopSignal


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_a_stop_is_remembered(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.reason == ""
        os.kill(os.getpid(), number)
        assert stop.reason == name
        said = capfd.readouterr().err
        if name == "SIGINT":
            assert "press Ctrl-C again to end it at once" in said
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        else:
            assert said == ""
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """As in a background job of a shell, which has the terminal's Ctrl-C go to others, and under ``nohup``."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stoppable(), StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop.reason == ""
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_stop_while_loading_ends_the_work_at_once(name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=name), stoppable(), suppress(Exception):  # as libraries do
        os.kill(os.getpid(), number)
        time.sleep(600)
    assert signal.getsignal(number) is before


def test_a_stop_while_training_is_remembered_inside_of_what_can_be_stopped() -> None:
    with stoppable(), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_the_word_of_a_launcher(tmp_path: Path) -> None:
    with StopSignal(tmp_path / "stop") as stop:
        assert stop.reason == ""
        (tmp_path / "stop").write_text("SIGUSR1")
        assert stop.reason == "SIGUSR1"
