"""What was measured, in the form that `--json` writes and the zoo's page reads."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch

import boxwright

FORMAT = "boxwright-benchmark-1"


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of what something was measured."""

    recipe: str
    """The recipe's name."""
    settings: list[str] = []
    """Its changes, `name=value` each."""
    system: str
    """boxwright, or a peer."""
    task: str
    """train or infer."""
    batch: int
    """Images at a time."""
    size: tuple[int, int]
    """(height, width) of the canvas of the first batch."""
    asked_size: tuple[int, int] | None = None
    """(height, width) that was asked for; None for the recipe's."""
    precision: str
    """Of the arithmetic."""
    compiled: bool = False
    """Whether it ran through torch.compile."""
    pictures: str
    """generated, or the name of the data set's folder."""
    weights: str = "random"
    """random, or the name of the weights file."""


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long it took."""

    case: Case
    loading: bool = False
    """Whether pictures were loaded meanwhile."""
    seconds: list[float]
    """Of one step or one batch, each time as measured."""
    data_wait: list[float] = []
    """Of these, how long it waited for the loader."""
    first_seconds: float | None = None
    """The very first step or batch, which also compiles and takes memory."""

    @property
    def median(self) -> float:
        """Seconds of one step or batch."""
        return statistics.median(self.seconds)

    @property
    def mean(self) -> float:
        """The same, as long waits count in full."""
        return statistics.mean(self.seconds)

    @property
    def images_per_second(self) -> float:
        """By the median; with a loader by the mean, since its batches come in bursts."""
        return self.case.batch / (self.mean if self.loading else self.median)


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much memory it took at most, in bytes, in a process of its own."""

    case: Case
    peak_rss: int
    """Resident memory of the process on the host."""
    start_rss: int
    """The same before the detector was built: the interpreter and its libraries."""
    cuda_allocated: int | None = None
    """What tensors took on the GPU; None without one."""
    cuda_reserved: int | None = None
    """What was reserved for them on the GPU."""


class Parts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How it divides, measured apart from its timing; always eager."""

    case: Case
    whole: list[float]
    """Seconds of one step or batch, each as measured."""
    parts: dict[str, list[float]]
    """Of each the seconds within it and within no part inside it, by name; at the same times as `whole`."""


class Operations(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many floating-point operations it is, by torch's counter: convolutions and matrix products."""

    case: Case
    operations: int
    """Of one step or batch; a multiplication and an addition are two."""
    rate: float
    """The most that a convolution reached on this device in this precision, operations a second."""

    @property
    def floor(self) -> float:
        """Seconds that they take at this rate."""
        return self.operations / self.rate


class Ratio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A peer's time over ours, of each round in which both ran."""

    case: Case
    """Of the peer."""
    each: list[float]
    """Round by round: above 1 ours is faster."""
    median: float
    """Of these."""


class Report(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All that one command measured."""

    format: str = FORMAT
    command: str
    """That measured it."""
    machine: dict[str, str]
    """What it ran on."""
    versions: dict[str, str]
    """What it ran with."""
    timings: list[Timing] = []
    """Times."""
    ratios: list[Ratio] = []
    """Peers' times over ours."""
    memory: list[Memory] = []
    """Peaks of memory."""
    parts: list[Parts] = []
    """Divisions."""
    operations: list[Operations] = []
    """Counts of operations."""


def machine(device: torch.device) -> dict[str, str]:
    """What figures depend on besides the software."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = {
        "processor": _processor(),
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "system": platform.system(),
    }
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        facts["gpu"] = f"{torch.cuda.get_device_name(device)}, {memory / 2**30:.0f} GiB"
    return facts


def versions(device: torch.device) -> dict[str, str]:
    """What was in use."""
    found = {"boxwright": boxwright.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "opencv-python-headless"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # noqa: PERF203, two of them
            continue
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or ""
        found["cudnn"] = str(torch.backends.cudnn.version() or "")
    return found


def compare(timings: Sequence[Timing], ours: str = "boxwright") -> list[Ratio]:
    """The ratios of what was measured alternately: the same task, round by round."""
    own = {timing.case.task: timing for timing in timings if timing.case.system == ours and not timing.loading}
    ratios = []
    for timing in timings:
        if timing.case.system == ours or timing.case.task not in own:
            continue
        each = [peer / our for peer, our in zip(timing.seconds, own[timing.case.task].seconds, strict=True)]
        ratios.append(Ratio(case=timing.case, each=each, median=statistics.median(each)))
    return ratios


def write_report(path: Path, report: Report) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def read_report(path: Path) -> Report:
    """Read what `write_report` wrote.

    Raises:
        ValueError: it is no such file; the message says what is wrong with it.
        OSError: it cannot be read.
    """
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no measurement that boxwright benchmark --json wrote: {error}") from None
    if report.format != FORMAT:
        raise ValueError(f"{path} is of form {report.format!r}, not {FORMAT!r}: measure anew")
    return report


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
