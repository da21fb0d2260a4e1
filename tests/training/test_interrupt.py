from __future__ import annotations

import os
import signal

import pytest

from boxwright.training.interrupt import stop_request


def test_first_signal_is_stored_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_request() as stop:
        assert stop.agreed() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with stop_request() as stop:
        sent = []
        monkeypatch.setattr(os, "kill", lambda process, number: sent.append(number))
        stop.receive(signal.SIGTERM, None)
        stop.receive(signal.SIGTERM, None)
        assert not sent
        stop.receive(signal.SIGINT, None)
        assert sent == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
