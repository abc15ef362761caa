"""Signals to this very process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rasa_train.stop import StopSignal


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
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


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As in a background job of a shell, which has the terminal's Ctrl-C go to others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.reason == ""
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_word_of_a_launcher(tmp_path: Path) -> None:
    with StopSignal(tmp_path / "stop") as stop:
        assert stop.reason == ""
        (tmp_path / "stop").write_text("SIGUSR1")
        assert stop.reason == "SIGUSR1"
