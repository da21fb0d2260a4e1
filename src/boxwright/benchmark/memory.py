"""Peak memory, each task in a fresh process: `python -m boxwright.benchmark.memory` reads what to do from its input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import torch

from boxwright.benchmark.bench import Bench
from boxwright.benchmark.peer_process import PeerProcess
from boxwright.benchmark.plan import Plan
from boxwright.benchmark.system import System
from boxwright.structures import Batch

_STEPS = 3


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is to do."""

    plan: Plan
    """The recipe and how to measure it."""
    task: str
    """train or infer."""
    system: str
    """boxwright or torchvision."""


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """What it found, in bytes."""

    peak_rss: int
    """Resident memory at most."""
    start_rss: int
    """The same before the detector was built."""
    cuda_allocated: int | None = None
    """On the GPU, what tensors took at most."""
    cuda_reserved: int | None = None
    """On the GPU, what was reserved at most."""


def peak_rss() -> int:
    """The most memory of this process that was resident at once, in bytes.

    Linux counts what a process held before it became this program into `ru_maxrss`, so that its own table is asked
    first.
    """
    table = Path("/proc/self/status")
    if table.exists():
        for line in table.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def measure_memory(plan: Plan, task: str, system: str) -> Peak:
    """Let a process of its own do a few steps or batches.

    Raises:
        RuntimeError: it failed; the message is what it said.
    """
    order = msgspec.json.encode(Order(plan=plan, task=task, system=system))
    # A recipe of the user's may lie anywhere that this process imports from.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "boxwright.benchmark.memory"], input=order, capture_output=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr.decode(errors='replace')}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Peak)


def measure_process(bench: Bench, task: str) -> Peak:
    """The same of a peer, which is a process of its own anyway."""
    training = task == "train"
    peer = bench.system(bench.plan.peer, training=training)
    assert isinstance(peer, PeerProcess)
    with closing(peer):
        start = peer.memory()["peak_rss"]
        _work(peer, bench.batches(training=training), training=training)
        return Peak(start_rss=start, **peer.memory())


def _work(system: System, batches: Sequence[Batch], *, training: bool) -> None:
    """A few steps or batches."""
    work = system.train_step if training else system.infer
    for number in range(_STEPS):
        work(system.prepare(batches[number % len(batches)]))


def main() -> None:
    """Do the order on the standard input and print the peak."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    plan = order.plan
    with Bench(plan) as bench:
        start = peak_rss()
        training = order.task == "train"
        batches = bench.batches(training=training)
        _work(bench.system(order.system, training=training), batches, training=training)
        cuda: dict[str, int] = {}
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
            cuda = {
                "cuda_allocated": torch.cuda.max_memory_allocated(bench.device),
                "cuda_reserved": torch.cuda.max_memory_reserved(bench.device),
            }
        peak = Peak(peak_rss=peak_rss(), start_rss=start, **cuda)
    sys.stdout.write(msgspec.json.encode(peak).decode() + "\n")


if __name__ == "__main__":
    main()
