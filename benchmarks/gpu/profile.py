"""One call under PyTorch's profiler, as a small table: kernels, launches, busy time and gaps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import synchronize

TOP = 60
"""Kernels that are kept."""
_GAPS = 10
_NAME = 160
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def profile_of(scale: Scale, call: Callable[[], object]) -> dict[str, Any]:
    """Profile one call. On the CPU the outermost operators stand for kernels.

    Returns:
        `launches`, `busy_s` (at least one kernel runs), `span_s` (first start to last end), `gap_s` (the difference),
        `largest_gaps` with the kernels around them, `kernels` (the `TOP` by time, with count), and `host_calls`: CUDA
        runtime calls by number, where synchronisations show.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if scale.device == "cuda" else [])
    synchronize(scale)
    with profile(activities=activities) as profiler:
        call()
        synchronize(scale)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return summary(events, on_gpu=scale.device == "cuda")


def summary(events: list[dict[str, Any]], *, on_gpu: bool) -> dict[str, Any]:
    """The table of a trace in Chrome's format, times in microseconds."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    if on_gpu:
        kernels = [event for event in complete if event.get("cat") in _ON_GPU]
    else:
        kernels = _outermost([event for event in complete if event.get("cat") == "cpu_op"])
    kernels.sort(key=lambda event: event["ts"])
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel["name"], []).append(kernel["dur"] / 1e6)
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP]
    busy, gaps = 0.0, []
    end, before = (kernels[0]["ts"], "") if kernels else (0.0, "")
    for kernel in kernels:
        start, stop = kernel["ts"], kernel["ts"] + kernel["dur"]
        if start > end:
            gaps.append({"seconds": (start - end) / 1e6, "after": before[:_NAME], "before": kernel["name"][:_NAME]})
        busy += max(0.0, stop - max(start, end))
        if stop >= end:
            end, before = stop, kernel["name"]
    host: dict[str, int] = {}
    for event in complete:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            host[event["name"]] = host.get(event["name"], 0) + 1
    return {
        "launches": len(kernels),
        "busy_s": busy / 1e6,
        "span_s": (end - kernels[0]["ts"]) / 1e6 if kernels else 0.0,
        "gap_s": sum(gap["seconds"] for gap in gaps),
        "largest_gaps": sorted(gaps, key=lambda gap: -gap["seconds"])[:_GAPS],
        "kernels": [{"name": name[:_NAME], "count": len(times), "seconds": sum(times)} for name, times in top],
        "host_calls": dict(sorted(host.items(), key=lambda item: -item[1])[:20]),
    }


def _outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events that no other event of the same thread contains."""
    outermost, end = [], dict[Any, float]()
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= end.get(event["tid"], -1.0):
            outermost.append(event)
            end[event["tid"]] = event["ts"] + event["dur"]
    return outermost
