"""Run the phases of a benchmark for a list of recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import msgspec

from boxwright.benchmark.bench import OURS, Bench
from boxwright.benchmark.inputs import inference_loader, training_loader
from boxwright.benchmark.measure import Task, Times, alternate, infer_with_loader, train_with_loader
from boxwright.benchmark.memory import measure_memory, measure_peer_memory
from boxwright.benchmark.operations import best_rate, count_operations
from boxwright.benchmark.parts import time_parts
from boxwright.benchmark.peer_process import PEERS
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

Log = Callable[[str], None]


def measure(plans: Sequence[Plan], phases: Sequence[str], *, command: str, log: Log) -> Report:
    """Measure recipes one after another.

    Args:
        plans: one plan per recipe, all for the same device.
        phases: keys of `PHASES`, in the order in which they run.
        command: the command line, stored in the report.
        log: called with a line at the start of each phase.

    Raises:
        ValueError: a plan is invalid. All plans are checked before the first measurement.
    """
    benches = [Bench(plan) for plan in plans]
    device = benches[0].device
    report = Report(command=command, machine={}, versions=versions(device))
    for bench in benches:
        with bench:
            _measure_recipe(bench, phases, report, log)
        # A peer process may have another version of torch than this one.
        report.versions |= {f"{bench.plan.peer}'s {name}": text for name, text in bench.peer_versions.items()}
    # Read last, since a bench may change the number of threads.
    report.machine = machine(device)
    return report


def _measure_recipe(bench: Bench, phases: Sequence[str], report: Report, log: Log) -> None:
    plan = bench.plan
    names = [OURS, *([plan.peer] if plan.peer else [])]
    timings: list[Timing] = []
    for phase in phases:
        log(f"{plan.recipe}: {phase}")
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
    """Times of Boxwright and of the peer on the same batches in memory, in alternation."""
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
    return [_timing(bench.case(name, training=training), result) for name, result in zip(names, times, strict=True)]


def _with_loader(bench: Bench, *, training: bool) -> Timing:
    plan, system = bench.plan, bench.system(OURS, training=training)
    assert isinstance(system, BoxwrightSystem)
    shared: Any = {"proposals": bench.proposals, "num_workers": plan.workers}
    counts = {"iterations": plan.iterations, "warmup": plan.warmup}
    if training:
        loader = training_loader(plan, bench.experiment, bench.dataset, masks=bench.masks, **shared)
        times = train_with_loader(system, loader, device=bench.device, **counts)
    else:
        batches = inference_loader(plan, bench.experiment, bench.dataset, **shared)
        precision = bench.experiment.precision
        times = infer_with_loader(system, batches, device=bench.device, precision=precision, **counts)
    return _timing(bench.case(OURS, training=training), times, loading=True)


def _timing(case: Case, times: Times, *, loading: bool = False) -> Timing:
    seconds, first, data_wait = times
    return Timing(case=case, loading=loading, seconds=seconds, data_wait=data_wait, first_seconds=first)


def _memory(bench: Bench, name: str, *, training: bool) -> Memory:
    task = "train" if training else "infer"
    peak = measure_peer_memory(bench, task) if name in PEERS else measure_memory(bench.plan, task, name)
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
    results = []
    for training in (True, False):
        system = bench.system(OURS, training=training, compiled=False)
        assert isinstance(system, BoxwrightSystem)
        count = count_operations(system, bench.batches(training=training)[0], "train" if training else "infer")
        results.append(Operations(case=_eager(bench.case(OURS, training=training)), operations=count, rate=rate))
    return results


def _eager(case: Case) -> Case:
    """The case, marked as not compiled."""
    return msgspec.structs.replace(case, compiled=False)
