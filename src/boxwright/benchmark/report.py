"""Benchmark reports. `boxwright benchmark --json` writes them, and the benchmark page is generated from them."""

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
    """What was measured, and under which conditions."""

    recipe: str
    """Name of the recipe."""
    settings: list[str] = []
    """Changes of the recipe, each `name=value`."""
    system: str
    """`boxwright`, or the name of a peer."""
    task: str
    """`train` or `infer`."""
    batch: int
    """Batch size."""
    size: tuple[int, int]
    """(height, width) of the canvas of the first batch."""
    asked_size: tuple[int, int] | None = None
    """(height, width) given with `--size`; None if the recipe's resize was used."""
    precision: str
    """`float32` or `bfloat16`."""
    compiled: bool = False
    """Whether the training step ran under torch.compile."""
    dataset: str = msgspec.field(name="pictures")
    """`generated`, or the name of the dataset folder. The JSON key is `pictures`."""
    weights: str = "random"
    """`random`, or the name of the weights file."""


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times of training steps or of inferences."""

    case: Case
    loading: bool = False
    """Whether data loading is included."""
    seconds: list[float]
    """Seconds of one step or batch, one value per measurement."""
    data_wait: list[float] = []
    """Seconds of each measurement that were spent waiting for the loader."""
    first_seconds: float | None = None
    """Seconds of the very first step or batch, which includes compilation and memory allocation."""

    @property
    def median(self) -> float:
        """Median seconds of one step or batch."""
        return statistics.median(self.seconds)

    @property
    def mean(self) -> float:
        """Mean seconds of one step or batch."""
        return statistics.mean(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Throughput, from the median time; with a loader from the mean, since its batches arrive in bursts."""
        return self.case.batch / (self.mean if self.loading else self.median)


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Peak memory in bytes, measured in a separate process."""

    case: Case
    peak_rss: int
    """Peak resident set size (RSS) of the process on the host."""
    start_rss: int
    """Peak RSS before the batches and the detector are built. In a peer's process, its detector is already built."""
    cuda_allocated: int | None = None
    """Peak GPU memory allocated by tensors; None on a CPU."""
    cuda_reserved: int | None = None
    """Peak GPU memory reserved by torch's allocator; None on a CPU."""


class Parts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Profile by part. It is always measured in eager mode, in a separate pass."""

    case: Case
    whole: list[float]
    """Seconds of one step or batch, one value per measurement."""
    parts: dict[str, list[float]]
    """Exclusive seconds of each part, one value per measurement in `whole`."""


class Operations(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Floating-point operations of convolutions and matrix products, counted by torch's FLOP counter."""

    case: Case
    operations: int
    """Operations of one step or batch; a multiply-add counts as two."""
    rate: float
    """Highest rate of a convolution on this device in this precision, in operations per second."""

    @property
    def floor(self) -> float:
        """Seconds that the operations take at this rate."""
        return self.operations / self.rate


class Ratio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A peer's time divided by Boxwright's time in the same round; above 1, Boxwright is faster."""

    case: Case
    """The peer's case."""
    each: list[float]
    """One ratio per round."""
    median: float
    """Median of `each`."""


class Report(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All measurements of one `boxwright benchmark` command."""

    format: str = FORMAT
    command: str
    """The command line."""
    machine: dict[str, str]
    """Hardware and operating system."""
    versions: dict[str, str]
    """Versions of Python, libraries and peers."""
    timings: list[Timing] = []
    """Times of all systems."""
    ratios: list[Ratio] = []
    """Peers' times divided by Boxwright's."""
    memory: list[Memory] = []
    """Peak memory of all systems."""
    parts: list[Parts] = []
    """Profiles by part."""
    operations: list[Operations] = []
    """Counts of floating-point operations."""


def machine(device: torch.device) -> dict[str, str]:
    """Processor, cores, threads, operating system and GPU."""
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
    """Versions of Boxwright, Python, torch and the libraries that affect speed."""
    by_package = {
        "boxwright": boxwright.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in ("torchvision", "opencv-python-headless"):
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:  # noqa: PERF203, only two packages
            continue
    if device.type == "cuda":
        by_package["cuda"] = torch.version.cuda or ""
        by_package["cudnn"] = str(torch.backends.cudnn.version() or "")
    return by_package


def compare(timings: Sequence[Timing], ours: str = "boxwright") -> list[Ratio]:
    """Compute the ratios of systems that were timed in alternation, round by round for each task."""
    our_timings = {timing.case.task: timing for timing in timings if timing.case.system == ours and not timing.loading}
    ratios = []
    for timing in timings:
        if timing.case.system == ours or timing.case.task not in our_timings:
            continue
        our_seconds = our_timings[timing.case.task].seconds
        each = [peer / our for peer, our in zip(timing.seconds, our_seconds, strict=True)]
        ratios.append(Ratio(case=timing.case, each=each, median=statistics.median(each)))
    return ratios


def write_report(path: Path, report: Report) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def read_report(path: Path) -> Report:
    """Read a report that `write_report` wrote.

    Raises:
        ValueError: the file is not a report, or has another format version.
        OSError: the file cannot be read.
    """
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a report of `boxwright benchmark --json`: {error}. Measure again.") from None
    if report.format != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {report.format!r}. Run the benchmark again.")
    return report


def _processor() -> str:
    """Model name of the processor; its architecture if the name is not known."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
