"""Correctness of a detector on a GPU: results equal the CPU's, the host never waits, and compiled equals eager."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import make_batch, make_detector
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import synchronize
from boxwright.precision import Precision, autocast
from boxwright.structures import Batch, pin_memory, to_device
from boxwright.training.ema import EMA
from boxwright.training.experiment import SGD, AdamW
from boxwright.training.metrics import Window
from boxwright.training.optimizer import build_optimizer
from boxwright.training.step import TrainStep


def equals_cpu(scale: Scale, family: str) -> Iterator[dict[str, Any]]:
    """Losses, the gradient of each parameter and detections equal the CPU's in float32.

    Raises:
        AssertionError: They differ.
    """
    with exact_products():
        on_cpu, on_device, batch = _pair(scale, family)
        moved = to_device(batch, torch.device(scale.device))
        expected, losses = on_cpu.losses(batch), on_device.losses(moved)
        yield {"largest_loss_difference": _compare_losses(losses, expected)}
        _total(expected).backward()
        _total(losses).backward()
        _compare_gradients(on_device, [parameter.grad for parameter in on_cpu.parameters()])
        with torch.inference_mode():
            expected_boxes, boxes = on_cpu.eval().detect(batch), on_device.eval().detect(moved)
    # Two boxes of nearly equal score may swap places; the sorted scores may not differ.
    torch.testing.assert_close(boxes.scores.cpu(), expected_boxes.scores, rtol=1e-3, atol=1e-3)
    close = (boxes.boxes.cpu() - expected_boxes.boxes).abs().amax(-1) < 0.1
    count = int(expected_boxes.valid.sum())
    share = close[expected_boxes.valid].float().mean().item() if count else 1.0
    yield {"detections": count, "boxes_within_a_tenth_of_a_pixel": share}
    assert share > 0.95, f"only {share:.1%} of {count} boxes are within 0.1 px of the CPU's"


def no_host_sync(scale: Scale, family: str) -> Iterator[dict[str, Any]]:
    """A training step and a detection never make the host wait for the GPU, in float32 and bfloat16, SGD and AdamW.

    Raises:
        RuntimeError: An operation made the host wait; the message is PyTorch's.
        AssertionError: A value is not finite.
    """
    device = torch.device(scale.device)
    cases: list[tuple[SGD | AdamW, Precision]] = [(SGD(lr=1e-4), "float32")]
    if device.type == "cuda":
        cases += [(SGD(lr=1e-4), "bfloat16"), (AdamW(lr=1e-4), "bfloat16")]
    batch = make_batch(scale, family, 1, canvas=scale.checked_canvas)
    batch = pin_memory(batch) if device.type == "cuda" else batch
    original = make_detector(scale, family)
    for config, precision in cases:
        detector: Any = deepcopy(original).to(device).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(config, detector)
        step = TrainStep(detector, optimizer, device=device, precision=precision, clip_norm=35.0)
        ema, window = EMA(detector, 0.99), Window(2, device)
        for number in (1, 2):
            # The first round compiles kernels and allocates memory.
            with waiting_is_an_error(device) if number == 2 else nullcontext():
                moved = to_device(batch, device)
                window.record(step([moved], 1e-4 / number))
                ema.update(number)
                with torch.inference_mode(), autocast(device, precision):
                    detector.detect(moved)
            synchronize(scale)
        assert window.read().isfinite().all(), f"{config}, {precision}: a loss or the gradient norm is not finite"
        _check_skipped_step(scale, detector, optimizer, step, to_device(batch, device))
    yield {"cases": [f"{type(config).__name__}, {precision}" for config, precision in cases]}


def _check_skipped_step(scale: Scale, detector: nn.Module, optimizer: Any, step: TrainStep, batch: Batch) -> None:
    """A step that is left out (`found_inf`) changes no parameter, with the learning rate as a tensor."""
    before = [parameter.detach().clone() for parameter in detector.parameters()]
    step.num_non_finite.fill_(1)
    step([batch], 1.0)
    synchronize(scale)
    for parameter, value in zip(detector.parameters(), before, strict=True):
        assert torch.equal(parameter, value), "a step that is left out changed a parameter"
    for state in optimizer.state.values():
        for value in state.values():
            assert torch.as_tensor(value).isfinite().all(), "a step that is left out changed the optimizer's state"


def compiled_equals_eager(scale: Scale, family: str) -> Iterator[dict[str, Any]]:
    """Losses compiled as one graph, and their gradients, equal the eager ones in float32.

    Raises:
        AssertionError: They differ.
    """
    with exact_products():
        _, detector, batch = _pair(scale, family)
        moved = to_device(batch, torch.device(scale.device))
        expected = detector.losses(moved)
        _total(expected).backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in detector.parameters()]
        detector.zero_grad(set_to_none=True)
        backend = "inductor" if scale.device == "cuda" else "eager"
        losses = torch.compile(detector.losses, fullgraph=True, dynamic=False, backend=backend)
        start = time.perf_counter()
        compiled = losses(moved)
        _total(compiled).backward()
        synchronize(scale)
        yield {"first_call_s": time.perf_counter() - start}
        yield {"largest_loss_difference": _compare_losses(compiled, {k: v.detach() for k, v in expected.items()})}
        _compare_gradients(detector, gradients)


def _pair(scale: Scale, family: str) -> tuple[Any, Any, Batch]:
    """A detector on the CPU, a copy on the device, both in training mode, and a training batch on the CPU."""
    detector = make_detector(scale, family)
    copy = deepcopy(detector).to(scale.device).to(memory_format=torch.channels_last)
    return detector, copy, make_batch(scale, family, 1, canvas=scale.checked_canvas)


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 within the block, not in TF32."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for the GPU within the block."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _compare_losses(losses: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference; an AssertionError if it is too large."""
    for name, loss in expected.items():
        torch.testing.assert_close(
            losses[name].to(loss.device), loss, rtol=1e-3, atol=1e-4, msg=lambda message, n=name: f"{n}: {message}"
        )
    return max((losses[name].to(loss.device) - loss).abs().item() for name, loss in expected.items())


def _compare_gradients(detector: nn.Module, expected: list[Tensor | None]) -> None:
    """An AssertionError where a parameter's gradient differs by more than a hundredth of its norm."""
    for (name, parameter), gradient in zip(detector.named_parameters(), expected, strict=True):
        if gradient is not None:
            assert parameter.grad is not None, f"{name} has no gradient"
            error = (parameter.grad.to(gradient.device) - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < 1e-2, f"the gradient of {name} differs by {error:.1e} of its norm"
