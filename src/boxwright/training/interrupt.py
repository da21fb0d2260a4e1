"""Handle Ctrl-C and SIGTERM: finish the step, save a checkpoint, exit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from boxwright.training.distributed import max_over_ranks


class TrainingInterrupted(Exception):
    """A signal ended training early, after a checkpoint was saved."""

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        """Store the signal and the checkpoint that was saved."""
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}; saved {checkpoint}. Run the same command with --resume to continue.")
        self.signal_number = signal_number
        self.checkpoint = checkpoint


class StopRequest:
    """Signal that asks training to stop, if any rank received one."""

    def __init__(self) -> None:
        """Start without a signal."""
        self._received = 0

    def receive(self, signal_number: int, frame: FrameType | None) -> None:
        """Store the signal. A second Ctrl-C ends the process immediately."""
        if self._received and signal_number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._received = signal_number

    def agreed(self) -> int:
        """The signal number that any rank received, the same on every rank; 0 for none. All ranks call it together."""
        return max_over_ranks(self._received)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM within the block. In other threads nothing is caught, because Python forbids it."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
