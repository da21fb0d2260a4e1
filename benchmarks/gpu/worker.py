"""Runs items one by one in a second process, so that an item that hangs or breaks the GPU ends alone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

_START = 90.0
"""Seconds for a process to start and to find its GPU."""
_JOIN = 10.0
"""Seconds for a killed process to end; one that a driver holds is left behind."""


class Item(NamedTuple):
    """One thing to do."""

    group: str
    """One of `plan.GROUPS`."""
    name: str
    """Unique name."""
    limit: float
    """Seconds after which it is killed."""
    work: Callable[[], Iterator[dict[str, Any]]]
    """Yields its result in fragments, each as soon as it is known; can be pickled."""


@dataclass(kw_only=True)
class Outcome:
    """What became of an item."""

    group: str
    """Its group."""
    item: str
    """Its name."""
    status: str = "ok"
    """ok, failed (it raised), killed (it ran past its limit), died (its process ended), or skipped (no time left)."""
    seconds: float = 0.0
    """Time that it took, the start of a process included."""
    limit: float = 0.0
    """Time that it had."""
    error: str = ""
    """Traceback or reason."""
    result: dict[str, Any] = field(default_factory=dict)
    """Fragments so far, merged: lists are joined. Also of an item that failed later on."""

    def add(self, fragment: dict[str, Any]) -> None:
        """Merge a fragment."""
        for key, value in fragment.items():
            known = self.result.get(key)
            self.result[key] = known + value if isinstance(known, list) and isinstance(value, list) else value


class Worker:
    """A process that runs items. An item that fails, dies or is killed takes its process along."""

    def __init__(self, device: str) -> None:
        """Start nothing yet."""
        self._device = device
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self.facts: dict[str, str] = {}
        """Machine and versions, known from the first start on."""

    def run(self, item: Item, left: float) -> Outcome:
        """Run an item.

        Args:
            item: Has its limit, which does not include the start of a process where one is needed.
            left: Seconds until the end of the run, which include it.
        """
        start = time.perf_counter()
        outcome = Outcome(group=item.group, item=item.name)
        if self._process is None and not self._start(min(left, _START)):
            outcome.status, outcome.error = "died", "the worker process did not start in time"
        else:
            outcome.limit = max(0.0, min(item.limit, start + left - time.perf_counter()))
            self._connection.send(item)
            self._receive(outcome, time.perf_counter() + outcome.limit)
        outcome.seconds = time.perf_counter() - start
        if outcome.status != "ok":
            self.close()
        return outcome

    def _receive(self, outcome: Outcome, end: float) -> None:
        """Take in fragments until the item ends or its time is up."""
        try:
            while self._connection.poll(max(0.0, end - time.perf_counter())):
                kind, content = self._connection.recv()
                if kind == "fragment":
                    outcome.add(content)
                    continue
                if content:
                    outcome.status, outcome.error = "failed", content
                return
        except (EOFError, OSError):
            outcome.status, outcome.error = "died", "the worker process ended"
            return
        outcome.status, outcome.error = "killed", f"killed after {outcome.limit:.0f} s"

    def _start(self, seconds: float) -> bool:
        self._connection, other = self._context.Pipe()
        # Not a daemon: daemons may not start the workers of a loader.
        self._process = self._context.Process(target=serve, args=(other, self._device))
        self._process.start()
        other.close()
        try:
            if self._connection.poll(seconds):
                self.facts = self._connection.recv()
                return True
        except (EOFError, OSError):
            pass
        self.close()
        return False

    def close(self) -> None:
        """Kill the process with all that it started, and wait for it for a limited time."""
        if self._process is None:
            return
        self._connection.close()
        with suppress(ProcessLookupError, PermissionError):
            # `serve` makes the process lead a new group; before that it has no children.
            if os.getpgid(self._process.pid or 0) == self._process.pid:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(_JOIN)
        self._process = None


def serve(connection: Connection, device: str) -> None:
    """Run the items that arrive."""
    os.setsid()
    connection.send(facts(device))
    while True:
        try:
            item: Item = connection.recv()
        except EOFError:
            return
        if "torch._dynamo" in sys.modules:  # slow to import, and only a few items compile
            torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        error = ""
        try:
            for fragment in item.work():
                connection.send(("fragment", fragment))
        except Exception:  # the other items still run
            error = traceback.format_exc()
        connection.send(("end", error))


def facts(device: str) -> dict[str, str]:
    """Machine and versions."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "cores": str(os.cpu_count())}
    for package in ("torchvision", "triton", "boxwright"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            found["processor"] = line.partition(":")[2].strip()
            break
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["cuda"], found["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
    return found
