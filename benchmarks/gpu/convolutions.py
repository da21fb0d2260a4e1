"""Rate of each convolution shape of a detector, forward and backward, with `cudnn.benchmark` off and on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.cases import Training
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import synchronize

_SECONDS = 30.0
"""Convolutions that come later are left out."""
_CALLS = 10


class Convolution(NamedTuple):
    """Arguments of a convolution."""

    images: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    needs_image_gradient: bool

    def operations(self) -> int:
        """Floating-point operations of the forward pass; a multiplication and an addition are two."""
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                self.images[2:], self.padding, self.dilation, self.weight[2:], self.stride, strict=True
            )
        )
        out, channels, kernel_height, kernel_width = self.weight
        return 2 * self.images[0] * out * height * width * channels * kernel_height * kernel_width


class _Recorder(TorchDispatchMode):
    """Counts the convolutions of each shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and not args[6] and args[0].ndim == 4:
            images, weight, bias, stride, padding, dilation, _, _, groups = args
            self.counts[
                Convolution(
                    tuple(images.shape),
                    tuple(weight.shape),
                    bias is not None,
                    tuple(stride),
                    tuple(padding),
                    tuple(dilation),
                    groups,
                    images.dtype,
                    images.requires_grad,
                )
            ] += 1
        return func(*args, **(kwargs or {}))


def convolution_rates(scale: Scale, family: str, batch_size: int) -> Iterator[dict[str, Any]]:
    """Time the convolutions of a training step, the ones with the most operations first."""
    training = Training(scale, family, batch_size)
    with _Recorder() as recorder:
        training.step()
    del training
    end = time.perf_counter() + _SECONDS
    rows: list[dict[str, Any]] = []
    ranked = sorted(recorder.counts.items(), key=lambda item: -item[0].operations() * item[1])
    for convolution, count in ranked:
        if time.perf_counter() > end:
            break
        rows.append(_row(scale, convolution, count))
    yield {"convolutions": rows, "left_out": len(ranked) - len(rows)}


def _row(scale: Scale, convolution: Convolution, count: int) -> dict[str, Any]:
    form: Any = {"device": scale.device, "dtype": convolution.dtype}
    images, weight = (
        torch.randn(shape, **form).to(memory_format=torch.channels_last)
        for shape in (convolution.images, convolution.weight)
    )
    bias = torch.randn(convolution.weight[0], **form) if convolution.bias else None
    settings = (list(convolution.stride), list(convolution.padding), list(convolution.dilation), False, [0, 0])

    def forward() -> Tensor:
        return torch.ops.aten.convolution(images, weight, bias, *settings, convolution.groups)

    gradient = torch.randn_like(forward())

    def backward() -> object:
        mask = [convolution.needs_image_gradient, True, False]
        return torch.ops.aten.convolution_backward(gradient, images, weight, None, *settings, convolution.groups, mask)

    operations = convolution.operations()
    passes = 1 + convolution.needs_image_gradient
    row: dict[str, Any] = {
        "images": list(convolution.images),
        "weight": list(convolution.weight),
        "stride": list(convolution.stride),
        "groups": convolution.groups,
        "dtype": str(convolution.dtype).removeprefix("torch."),
        "count": count,
        "gflop": operations / 1e9,
    }
    before = torch.backends.cudnn.benchmark
    try:
        for name, benchmark in (("off", False), ("on", True)):
            torch.backends.cudnn.benchmark = benchmark
            for direction, call, work in (("forward", forward, 1), ("backward", backward, passes)):
                seconds = _fastest(scale, call)
                row[f"{direction}_{name}_s"] = seconds
                row[f"{direction}_{name}_tflops"] = work * operations / seconds / 1e12
    finally:
        torch.backends.cudnn.benchmark = before
    return row


@torch.no_grad()
def _fastest(scale: Scale, call: Callable[[], object]) -> float:
    """Seconds per call, the best of three."""
    call()
    calls = _CALLS if scale.device == "cuda" else 1
    best = float("inf")
    for _ in range(3 if scale.device == "cuda" else 1):
        synchronize(scale)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(scale)
        best = min(best, (time.perf_counter() - start) / calls)
    return best
