"""What must hold of a detector on a GPU: it computes what the CPU does, is one graph, and never makes the host wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.results import Result
from benchmarks.gpu.scale import Scale
from boxwright.benchmark.bench import Bench
from boxwright.benchmark.measure import synchronize
from boxwright.benchmark.system import build_detector
from boxwright.precision import Precision, autocast
from boxwright.structures import Batch, pin_memory, to_device
from boxwright.training.ema import EMA
from boxwright.training.experiment import SGD, AdamW
from boxwright.training.metrics import Window
from boxwright.training.optimizer import build_optimizer
from boxwright.training.step import TrainStep


def equals_cpu(scale: Scale, family: str) -> Result:
    """Losses, each parameter's gradient and detections of the device equal the CPU's, in float32.

    Raises:
        AssertionError: they do not.
    """
    with exact_products(), detector_and_batch(scale, family) as (on_cpu, on_device, batch):
        moved = to_device(batch, torch.device(scale.device))
        wanted, given = on_cpu.losses(batch), on_device.losses(moved)
        worst = compare_losses(given, wanted)
        total(wanted).backward()
        total(given).backward()
        compare_gradients(on_device, [parameter.grad for parameter in on_cpu.parameters()])
        with torch.inference_mode():
            wanted_boxes, given_boxes = on_cpu.eval().detect(batch), on_device.eval().detect(moved)
    # Two boxes of nearly equal score may change places; the sorted scores may not differ.
    torch.testing.assert_close(given_boxes.scores.cpu(), wanted_boxes.scores, rtol=1e-3, atol=1e-3)
    agree = (given_boxes.boxes.cpu() - wanted_boxes.boxes).abs().amax(-1) < 0.1
    found = int(wanted_boxes.valid.sum())
    share = agree[wanted_boxes.valid].float().mean().item() if found else 1.0
    assert share > 0.95, f"only {share:.1%} of the boxes agree within 0.1 px"
    return Result(detail=f"largest difference of a loss {worst:.1e}; {share:.1%} of {found} boxes within 0.1 px")


def no_host_sync(scale: Scale, family: str) -> Result:
    """What the training loop does in a step, and a detection, never make the host wait for the GPU.

    Raises:
        RuntimeError: something made it wait; the message is torch's.
        AssertionError: a figure is not finite.
    """
    device = torch.device(scale.device)
    cases: list[tuple[SGD | AdamW, Precision]] = [(SGD(lr=1e-4), "float32")]
    if device.type == "cuda":
        cases += [(SGD(lr=1e-4), "bfloat16"), (AdamW(lr=1e-4), "bfloat16")]
    for config, precision in cases:
        with detector_and_batch(scale, family) as (_, detector, batch):
            pinned = pin_memory(batch) if device.type == "cuda" else batch
            optimizer = build_optimizer(config, detector)
            step = TrainStep(detector, optimizer, device=device, precision=precision, clip_norm=35.0)
            ema, window = EMA(detector, 0.99), Window(2, device)
            for number in (1, 2):
                # The first time kernels are compiled and memory is taken.
                with waiting_is_an_error(device) if number == 2 else nullcontext():
                    moved = to_device(pinned, device)
                    window.record(step([moved], 1e-4 / number))
                    ema.update(number)
                    with torch.inference_mode(), autocast(device, precision):
                        detector.detect(moved)
                synchronize(device)
            assert window.read().isfinite().all(), f"{config}, {precision}: not finite"
    made = "no step or detection made the host wait" if device.type == "cuda" else "not applicable on the CPU"
    return Result(detail=made)


def compiled_equals_eager(scale: Scale, family: str) -> Result:
    """Losses compiled into one graph, without a break, and their gradients equal the eager ones, in float32.

    Raises:
        AssertionError: they do not.
    """
    with exact_products(), detector_and_batch(scale, family) as (_, detector, batch):
        device = torch.device(scale.device)
        moved = to_device(batch, device)
        wanted = {name: loss.detach() for name, loss in _backward(detector.losses(moved)).items()}
        gradients = [None if p.grad is None else p.grad.clone() for p in detector.parameters()]
        detector.zero_grad(set_to_none=True)
        losses = torch.compile(detector.losses, fullgraph=True, dynamic=False, backend=scale.backend)
        start = time.perf_counter()
        given = _backward(losses(moved))
        synchronize(device)
        seconds = time.perf_counter() - start
        compare_losses(given, wanted)
        compare_gradients(detector, gradients)
    return Result(detail=f"one graph, compiled in {seconds:.0f} s")


@contextmanager
def detector_and_batch(scale: Scale, family: str) -> Iterator[tuple[Any, Any, Batch]]:
    """A detector on the CPU, the same on the device, both in training mode, and a training batch on the CPU."""
    plan = scale.plan(family, size=scale.checked_size, batch=1, precision="float32")
    with Bench(plan) as bench:
        batch = bench.batches(training=True)[0]
        pair = [build_detector(plan, bench.experiment, bench.dataset.categories, batch).train() for _ in range(2)]
        yield pair[0], pair[1].to(bench.device).to(memory_format=torch.channels_last), batch


@contextmanager
def exact_products() -> Iterator[None]:
    """Let products of float32 be of float32 and not of their 19 leading bits."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Make anything inside that waits for the GPU an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def total(losses: dict[str, Tensor]) -> Tensor:
    """What is minimised."""
    return torch.stack(list(losses.values())).sum()


def compare_losses(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference; an AssertionError where one is too large."""
    for name, loss in wanted.items():
        torch.testing.assert_close(
            given[name].to(loss.device), loss, rtol=1e-3, atol=1e-4, msg=lambda message, n=name: f"{n}: {message}"
        )
    return max((given[name].to(loss.device) - loss).abs().item() for name, loss in wanted.items())


def compare_gradients(detector: nn.Module, wanted: list[Tensor | None]) -> None:
    """An AssertionError where a parameter's gradient differs by more than a hundredth of its norm."""
    for (name, parameter), gradient in zip(detector.named_parameters(), wanted, strict=True):
        if gradient is not None:
            assert parameter.grad is not None, f"{name} has no gradient"
            error = (parameter.grad.to(gradient.device) - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < 1e-2, f"the gradient of {name} differs by {error:.1e} of its norm"


def _backward(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    total(losses).backward()
    return losses


CHECKS = (equals_cpu, no_host_sync, compiled_equals_eager)
