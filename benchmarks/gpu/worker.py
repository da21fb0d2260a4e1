"""Does the items of a run one by one in a process of its own, so that one that hangs or breaks the GPU ends alone."""

from __future__ import annotations

import gc
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import msgspec
import torch

from benchmarks.gpu.results import Outcome, Result
from boxwright.benchmark.report import machine, versions

_START = 120
"""Seconds that a process may take to begin."""


class Item(NamedTuple):
    """One thing to do."""

    name: str
    """Tells it from the others."""
    budget: float
    """Seconds that it may take."""
    work: Callable[[], Result]
    """Does it; it can be pickled."""


class Worker:
    """A process that does items. After an item that failed the next one gets a new process."""

    def __init__(self, device: str) -> None:
        """Start nothing yet."""
        self._device = device
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self.facts: dict[str, dict[str, str]] = {"machine": {}, "versions": {}}
        """What the process says of machine and versions."""

    def do(self, item: Item, seconds: float) -> Outcome:
        """Do an item within so many seconds, the start of a process not counted."""
        outcome = Outcome(item=item.name, seconds=0.0)
        if self._process is None and not self._start():
            outcome.error = "the process did not start"
            return outcome
        start = time.perf_counter()
        self._connection.send(item)
        try:
            if self._connection.poll(seconds):
                outcome = msgspec.json.decode(self._connection.recv_bytes(), type=Outcome)
            else:
                outcome.error = f"stopped after {seconds:.0f} s"
        except EOFError:
            outcome.error = "the process that did it died"
        outcome.seconds = time.perf_counter() - start
        if outcome.error:
            self.close()
        return outcome

    def _start(self) -> bool:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(theirs, self._device), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if self._connection.poll(_START):
                self.facts = self._connection.recv()
                return True
        except EOFError:
            pass
        self.close()
        return False

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def serve(connection: Connection, device: str) -> None:
    """Do what items come."""
    connection.send({"machine": machine(torch.device(device)), "versions": versions(torch.device(device))})
    while True:
        try:
            item: Item = connection.recv()
        except EOFError:
            return
        connection.send_bytes(msgspec.json.encode(do(item)))


def do(item: Item) -> Outcome:
    """Do an item; a failure is told and stops nothing."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return Outcome(item=item.name, seconds=0.0, result=item.work())
    except Exception:  # whatever it is, the other items are worth doing
        return Outcome(item=item.name, seconds=0.0, error=traceback.format_exc())
