"""Measures recipes phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import msgspec

from boxwright.benchmark.bench import OURS, Bench
from boxwright.benchmark.measure import Task, Times, alternate, infer_with_loader, train_with_loader
from boxwright.benchmark.memory import measure_memory, measure_process
from boxwright.benchmark.operations import best_rate, count_operations
from boxwright.benchmark.parts import time_parts
from boxwright.benchmark.peer_process import PEERS
from boxwright.benchmark.pictures import inference_loader, training_loader
from boxwright.benchmark.plan import Plan
from boxwright.benchmark.report import (
    Case,
    Memory,
    Operations,
    Parts,
    Report,
    Timing,
    compare,
    machine,
    versions,
)
from boxwright.benchmark.system import BoxwrightSystem

Say = Callable[[str], None]


def measure(plans: Sequence[Plan], phases: Sequence[str], *, command: str, say: Say) -> Report:
    """Measure recipes one after another.

    Args:
        plans: one for each recipe, all for the same device.
        phases: of `PHASES`, in order.
        command: what the user called, to be kept with the figures.
        say: is told what begins.

    Raises:
        ValueError: a plan cannot be carried out; all are looked at before the first is.
    """
    benches = [Bench(plan) for plan in plans]
    device = benches[0].device
    report = Report(command=command, machine={}, versions=versions(device))
    for bench in benches:
        with bench:
            _measure_one(bench, phases, report, say)
        # Of torch, too, a peer may have another.
        report.versions |= {f"{bench.plan.peer}'s {name}": text for name, text in bench.peer_versions.items()}
    # Threads may have been set meanwhile.
    report.machine = machine(device)
    return report


def _measure_one(bench: Bench, phases: Sequence[str], report: Report, say: Say) -> None:
    plan = bench.plan
    names = [OURS, *([plan.peer] if plan.peer else [])]
    timings: list[Timing] = []
    for phase in phases:
        say(f"{plan.recipe}: {phase}")
        if phase in ("train", "infer"):
            timings += _in_memory(bench, names, "train" if phase == "train" else "infer")
        elif phase in ("train-loader", "infer-loader"):
            timings.append(_with_loader(bench, training=phase == "train-loader"))
        elif phase == "memory":
            report.memory += [_memory(bench, name, training=training) for training in (True, False) for name in names]
        elif phase == "parts":
            report.parts += [_parts(bench, training=training) for training in (True, False)]
        else:
            report.operations += _operations(bench)
    report.timings += timings
    report.ratios += compare(timings)


def _in_memory(bench: Bench, names: Sequence[str], task: Task) -> list[Timing]:
    """Ours and a peer's times of the same batches, in turns."""
    training, plan = task == "train", bench.plan
    with ExitStack() as stack:
        systems = [stack.enter_context(closing(bench.system(name, training=training))) for name in names]
        times = alternate(
            systems,
            bench.batches(training=training),
            task,
            iterations=plan.iterations,
            warmup=plan.warmup,
            steps_per_time=plan.steps_per_time if training else 1,
            device=bench.device,
        )
    return [_timing(bench.case(name, training=training), one) for name, one in zip(names, times, strict=True)]


def _with_loader(bench: Bench, *, training: bool) -> Timing:
    plan, system = bench.plan, bench.system(OURS, training=training)
    assert isinstance(system, BoxwrightSystem)
    shared: Any = {"proposals": bench.proposals, "num_workers": plan.workers}
    turns = {"iterations": plan.iterations, "warmup": plan.warmup}
    if training:
        loader = training_loader(plan, bench.experiment, bench.dataset, masks=bench.masks, **shared)
        times = train_with_loader(system, loader, device=bench.device, **turns)
    else:
        batches = inference_loader(plan, bench.experiment, bench.dataset, **shared)
        precision = bench.experiment.precision
        times = infer_with_loader(system, batches, device=bench.device, precision=precision, **turns)
    return _timing(bench.case(OURS, training=training), times, loading=True)


def _timing(case: Case, times: Times, *, loading: bool = False) -> Timing:
    seconds, first, data_wait = times
    return Timing(case=case, loading=loading, seconds=seconds, data_wait=data_wait, first_seconds=first)


def _memory(bench: Bench, name: str, *, training: bool) -> Memory:
    task = "train" if training else "infer"
    peak = measure_process(bench, task) if name in PEERS else measure_memory(bench.plan, task, name)
    return Memory(
        case=bench.case(name, training=training),
        peak_rss=peak.peak_rss,
        start_rss=peak.start_rss,
        cuda_allocated=peak.cuda_allocated,
        cuda_reserved=peak.cuda_reserved,
    )


def _parts(bench: Bench, *, training: bool) -> Parts:
    system = bench.system(OURS, training=training, compiled=False)
    assert isinstance(system, BoxwrightSystem)
    whole, parts = time_parts(
        system,
        bench.batches(training=training)[0],
        "train" if training else "infer",
        iterations=bench.plan.iterations,
        warmup=bench.plan.warmup,
        device=bench.device,
    )
    return Parts(case=_eager(bench.case(OURS, training=training)), whole=whole, parts=parts)


def _operations(bench: Bench) -> list[Operations]:
    rate = best_rate(bench.device, bench.experiment.precision)
    found = []
    for training in (True, False):
        system = bench.system(OURS, training=training, compiled=False)
        assert isinstance(system, BoxwrightSystem)
        count = count_operations(system, bench.batches(training=training)[0], "train" if training else "infer")
        found.append(Operations(case=_eager(bench.case(OURS, training=training)), operations=count, rate=rate))
    return found


def _eager(case: Case) -> Case:
    return msgspec.structs.replace(case, compiled=False)
