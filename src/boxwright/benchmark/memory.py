"""Measure peak memory, each system and task in a fresh process.

`python -m boxwright.benchmark.memory` reads a `Job` as JSON from standard input and prints a `Peak` as JSON.
"""

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


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The measurement that a process is started for."""

    plan: Plan
    """The recipe and how to measure it."""
    task: str
    """`train` or `infer`."""
    system: str
    """`boxwright` or `torchvision`."""


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """Peak memory of a process, in bytes."""

    peak_rss: int
    """Peak resident set size (RSS) on the host."""
    start_rss: int
    """Peak RSS before the batches and the detector are built. In a peer's process, its detector is already built."""
    cuda_allocated: int | None = None
    """Peak GPU memory allocated by tensors (`torch.cuda.max_memory_allocated`); None on a CPU."""
    cuda_reserved: int | None = None
    """Peak GPU memory reserved by torch's allocator (`torch.cuda.max_memory_reserved`); None on a CPU."""


def peak_rss() -> int:
    """Peak resident set size of this process, in bytes.

    On Linux the value is `VmHWM`: `ru_maxrss` also counts the memory of the parent process before exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def measure_memory(plan: Plan, task: str, system: str) -> Peak:
    """Run a few steps or batches of Boxwright or torchvision in a new process and return its peak memory.

    Raises:
        RuntimeError: the process failed; the message holds its standard error.
    """
    job = msgspec.json.encode(Job(plan=plan, task=task, system=system))
    # The new process must be able to import the user's recipe, which may be anywhere on this process's sys.path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.run(
        [sys.executable, "-m", "boxwright.benchmark.memory"], input=job, capture_output=True, env=environment
    )
    if process.returncode:
        raise RuntimeError(
            f"the process that measures the memory of {system} ({plan.recipe}, {task}) failed with exit code "
            f"{process.returncode}:\n{process.stderr.decode(errors='replace')}"
        )
    return msgspec.json.decode(process.stdout.splitlines()[-1], type=Peak)


def measure_peer_memory(bench: Bench, task: str) -> Peak:
    """Peak memory of a peer that already runs in its own process."""
    training = task == "train"
    peer = bench.system(bench.plan.peer, training=training)
    assert isinstance(peer, PeerProcess)
    with closing(peer):
        start = peer.memory()["peak_rss"]
        _run_steps(peer, bench.batches(training=training), training=training)
        return Peak(start_rss=start, **peer.memory())


def _run_steps(system: System, batches: Sequence[Batch], *, training: bool) -> None:
    """Run `_STEPS` training steps or inferences."""
    step = system.train_step if training else system.infer
    for index in range(_STEPS):
        step(system.prepare(batches[index % len(batches)]))


def main() -> None:
    """Run the job given on standard input and print its peak memory."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    with Bench(job.plan) as bench:
        start = peak_rss()
        training = job.task == "train"
        batches = bench.batches(training=training)
        _run_steps(bench.system(job.system, training=training), batches, training=training)
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
