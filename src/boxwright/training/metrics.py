"""Log of a run: progress lines, `metrics.jsonl` and TensorBoard curves. Nothing leaves the machine.

`metrics.jsonl` holds one JSON object per line. Its field `kind` is one of:

- "train": `step` (steps done), `epoch`, `learning_rate`, `losses` {name: mean over the interval}, `total`, `grad_norm`
  (before clipping), `seconds_per_step`, `images_per_second`, `data_wait` (seconds per step that the host waited for
  images) and `data_wait_share`, `memory_mib` (`memory_reserved_mib` on CUDA), `eta_seconds`;
- "evaluation": `step`, `epoch`, `seconds`, `metrics` {name: value}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boxwright.training.distributed import rank
from boxwright.training.plan import Plan


def log_line(line: str) -> None:
    """Print a line on rank 0."""
    if rank() == 0:
        from rich.console import Console  # Imported here, because a step without a log does not need it.

        Console(soft_wrap=True, markup=False, highlight=False, emoji=False).print(line)


class Window:
    """Scalars of the steps since the last log line, one row per step. They stay on the device until they are read."""

    def __init__(self, length: int, device: torch.device) -> None:
        """Allocate `length` rows."""
        self.length = length
        self._device = device
        self.names: list[str] = []
        self.table = torch.zeros(0, 0, device=device)
        self.num_rows = 0

    def record(self, scalars: dict[str, Tensor]) -> None:
        """Add the scalars of a step; every step must have the same names."""
        if not self.names:
            self.names = list(scalars)
            self.table = torch.zeros(self.length, len(self.names), device=self._device)
        assert self.names == list(scalars), f"the names of the losses changed from {self.names} to {list(scalars)}"
        self.table[self.num_rows] = torch.stack(list(scalars.values()))
        self.num_rows += 1

    def restore(self, names: Sequence[str], rows: Tensor) -> None:
        """Continue an interval from the rows that a checkpoint saved."""
        if len(rows):
            self.names, self.num_rows = list(names), len(rows)
            # More rows than `length`, because the resumed run may log more often.
            self.table = torch.zeros(len(rows) + self.length, len(names), device=self._device)
            self.table[: len(rows)] = rows.to(self._device)

    def read(self) -> Tensor:
        """Copy the rows to the host, [steps, names]. Synchronises with the device."""
        return self.table[: self.num_rows].cpu()

    def clear(self) -> None:
        """Discard the recorded rows."""
        self.num_rows = 0


class Clock:
    """Time of an interval: seconds per step, and the share of the time spent waiting for images."""

    def __init__(self) -> None:
        """Start the first interval."""
        self.restart()

    def restart(self) -> None:
        """Reset all times and counts."""
        self._start = time.perf_counter()
        self._paused = 0.0
        self.data_wait = 0.0
        self.num_steps = 0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the block as waiting for images."""
        start = time.perf_counter()
        yield
        self.data_wait += time.perf_counter() - start

    @contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Exclude the time of the block, such as an evaluation. Work queued on the device before it still counts."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Seconds since the start of the interval, without pauses."""
        return time.perf_counter() - self._start - self._paused


def memory(device: torch.device) -> dict[str, int]:
    """Peak memory in MiB: allocated and reserved memory on CUDA, resident set of the process on a CPU."""
    if device.type == "cuda":
        return {
            "memory_mib": torch.cuda.max_memory_allocated(device) >> 20,
            "memory_reserved_mib": torch.cuda.max_memory_reserved(device) >> 20,
        }
    import resource  # not on Windows, where only CUDA runs report memory

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_mib": peak >> (20 if sys.platform == "darwin" else 10)}


class Log:
    """`metrics.jsonl` and the TensorBoard events of a run. Only rank 0 writes."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Open the log of a run at `step`. Entries of later steps, left by an interrupted run, are removed."""
        self._path = folder / "metrics.jsonl"
        self.lines: list[dict[str, Any]] = []
        self._writer: Any = None
        if rank() > 0:
            return
        if self._path.exists():
            self.lines = [line for line in read_lines(self._path) if line["step"] <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        partial.replace(self._path)

        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, line: dict[str, Any], curves: dict[str, float]) -> None:
        """Append a line to `metrics.jsonl` and points to the curves."""
        if self._writer is None:
            return
        self.lines.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for name, value in curves.items():
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`. An incomplete last line, left by a killed process, is dropped.

    Raises:
        ValueError: Another line is damaged.
    """
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if text.endswith(b"\n"):
            try:
                lines.append(json.loads(text))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is not valid JSON ({error}). Remove this line.") from None
    return lines


def train_line(rows: Tensor, names: Sequence[str], clock: Clock, plan: Plan, *, step: int) -> dict[str, Any]:
    """Make a "train" line of `metrics.jsonl`, without the memory.

    Args:
        rows: [steps, names] scalars of the interval's steps, averaged over ranks. Non-finite steps are left out.
        names: names of the columns.
        clock: the interval's clock.
        plan: the run's plan.
        step: number of steps done.
    """
    finite = rows[rows[:, names.index("finite")] == 1]
    means = dict(zip(names, finite.mean(0).tolist(), strict=True)) if len(finite) else {}
    seconds = clock.seconds / clock.num_steps
    return {
        "kind": "train",
        "step": step,
        "epoch": step / plan.steps_per_epoch,
        "learning_rate": plan.learning_rate(step - 1),
        "total": means.pop("total", 0.0),
        "grad_norm": means.pop("grad_norm", 0.0),
        "losses": {name: value for name, value in means.items() if name != "finite"},
        "seconds_per_step": seconds,
        "images_per_second": plan.images_per_step / seconds,
        "data_wait": clock.data_wait / clock.num_steps,
        "data_wait_share": clock.data_wait / clock.seconds,
        "eta_seconds": seconds * (plan.total_steps - step),
    }


_CURVES = ("total", "learning_rate", "grad_norm", "seconds_per_step", "images_per_second", "data_wait", "memory_mib")


def train_curves(line: dict[str, Any]) -> dict[str, float]:
    """TensorBoard scalars of a "train" line."""
    losses = {f"loss/{name}": value for name, value in line["losses"].items()}
    return losses | {f"train/{name}": line[name] for name in _CURVES}


def progress_line(line: dict[str, Any], total_steps: int) -> str:
    """Format a "train" line of `metrics.jsonl` for the terminal."""
    losses = " ".join(f"{name} {value:.4f}" for name, value in line["losses"].items())
    eta = str(timedelta(seconds=round(line["eta_seconds"])))
    return (
        f"epoch {line['epoch']:.2f} step {line['step']}/{total_steps} lr {line['learning_rate']:.3g} "
        f"loss {line['total']:.4f} ({losses}) grad {line['grad_norm']:.3g} | {line['seconds_per_step']:.3f} s/iter "
        f"{line['images_per_second']:.1f} img/s, data {100 * line['data_wait_share']:.0f}%, "
        f"{line['memory_mib']} MiB, ETA {eta}"
    )
