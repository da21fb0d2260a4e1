"""Time and memory of whole detectors, by `boxwright.benchmark`, in turns with torchvision where it has the model."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from typing import Any, cast

import torch

from benchmarks.gpu.results import Result
from benchmarks.gpu.scale import Scale
from boxwright.benchmark.bench import OURS, Bench
from boxwright.benchmark.measure import Times, alternate, synchronize
from boxwright.benchmark.report import Report, Timing, compare
from boxwright.benchmark.run import measure
from boxwright.benchmark.system import BoxwrightSystem
from boxwright.detectors.detector import Detector
from boxwright.evaluation.evaluate import Precision, autocast
from boxwright.structures import Batch, to_device

MODES = {
    "eager": (),
    "compiled": ("compile=true",),
    "graphs": ("compile=true", "cuda_graphs=true"),
}
"""How training runs, as settings of a recipe."""
_STEPS = 3
_ROUNDS = 5


def train(scale: Scale, family: str, mode: str, precision: Precision | None = None) -> Result:
    """Training steps of the recipe's batch, and what memory they take before there is a peer."""
    changes: dict[str, Any] = {} if precision is None else {"precision": precision}
    plan = scale.plan(family, settings=MODES[mode], peer=True, **changes)
    names = [OURS, *([plan.peer] if plan.peer else [])]
    with ExitStack() as stack:
        bench = stack.enter_context(Bench(plan))
        batches = bench.batches(training=True)
        ours = stack.enter_context(closing(bench.system(OURS, training=True)))
        # The first step of all, which also compiles, and the memory, are of ours alone.
        _reset_peak(bench.device)
        given, start = ours.prepare(batches[0]), time.perf_counter()
        ours.train_step(given)
        synchronize(bench.device)
        first = time.perf_counter() - start
        for _ in range(_STEPS):
            ours.train_step(given)
        synchronize(bench.device)
        peak = _peak(bench.device)
        peers = [stack.enter_context(closing(bench.system(name, training=True))) for name in names[1:]]
        times = alternate(
            [ours, *peers],
            batches,
            "train",
            iterations=scale.iterations,
            warmup=scale.warmup,
            steps_per_time=plan.steps_per_time,
            device=bench.device,
        )
        times[0] = times[0]._replace(first=first)
        timings = [_timing(bench, name, one) for name, one in zip(names, times, strict=True)]
    report = _report(timings=timings, ratios=compare(timings))
    case = timings[0].case
    memory = [{"recipe": case.recipe, "mode": mode, "precision": case.precision, "images": case.batch, **peak}]
    return Result(report=report, memory=memory if peak else [])


def infer(scale: Scale, family: str, batch: int) -> Result:
    """What `boxwright test` does with pictures in memory, to boxes and encoded masks on the host.

    One image is beside torchvision's; larger batches tell what ours gains by them.
    """
    return Result(report=_measure(scale, family, ["infer"], batch=batch, peer=batch == 1))


def operations(scale: Scale, family: str) -> Result:
    """Floating-point operations of a training step and of an inference."""
    return Result(report=_measure(scale, family, ["flops"]))


def memory(scale: Scale, family: str) -> Result:
    """Peaks of training and of inference, each in a fresh process."""
    return Result(report=_measure(scale, family, ["memory"], peer=True))


def detect(scale: Scale, family: str, batch: int) -> Result:
    """Only `detect`, whose boxes and masks stay on the device: eager, compiled, and replayed as CUDA graphs."""
    rows = []
    plan = scale.plan(family, batch=batch)
    with Bench(plan) as bench:
        batches = bench.batches(training=False)[:1]
        system = bench.system(OURS, training=False)
        assert isinstance(system, BoxwrightSystem)
        for mode in MODES:
            _reset_peak(bench.device)
            torch._dynamo.reset()
            detection = Detection(system.detector, bench, mode, scale)
            times = alternate(
                [detection],
                batches,
                "infer",
                iterations=scale.iterations,
                warmup=scale.warmup,
                steps_per_time=_ROUNDS if scale.device == "cuda" else 1,
                device=bench.device,
            )[0]
            case = bench.case(OURS, training=False)
            rows.append(
                {
                    "recipe": case.recipe,
                    "mode": mode,
                    "precision": case.precision,
                    "images": batch,
                    "seconds": times.seconds,
                    "first_seconds": times.first,
                    **_peak(bench.device),
                }
            )
    return Result(detect=rows)


class Detection:
    """`detect` as a thing to time."""

    name = OURS

    def __init__(self, detector: torch.nn.Module, bench: Bench, mode: str, scale: Scale) -> None:
        """Compile it or not."""
        self._device, self._precision = bench.device, bench.experiment.precision
        self._detect: Any = cast(Detector, detector.eval()).detect
        if mode != "eager":
            how: dict[str, Any] = {"mode": "reduce-overhead" if mode == "graphs" else None}
            if scale.backend != "inductor":
                how = {"backend": scale.backend}
            self._detect = torch.compile(self._detect, fullgraph=True, dynamic=False, **how)

    def prepare(self, batch: Batch) -> Batch:
        """On the device: neither decoding nor copying is timed."""
        return to_device(batch, self._device)

    def infer(self, given: Batch) -> None:
        """One batch."""
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), autocast(self._device, self._precision):
            self._detect(given)

    def train_step(self, given: Batch) -> None:
        """It does not train."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held elsewhere."""


def _measure(scale: Scale, family: str, phases: list[str], *, peer: bool = False, **changes: Any) -> Report:
    return measure([scale.plan(family, peer=peer, **changes)], phases, command="", log=lambda _: None)


def _report(**found: Any) -> Report:
    return Report(command="", machine={}, versions={}, **found)


def _timing(bench: Bench, name: str, times: Times) -> Timing:
    return Timing(case=bench.case(name, training=True), seconds=times.seconds, first_seconds=times.first)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, int]:
    """Bytes at most; nothing on the CPU, where a process's peak is not one step's."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
