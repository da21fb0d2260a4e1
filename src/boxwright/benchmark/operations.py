"""Count the floating-point operations of a training step or inference, and measure the device's best rate."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from boxwright.benchmark.measure import Task, synchronize
from boxwright.benchmark.system import BoxwrightSystem
from boxwright.layers.fused import fused_operator
from boxwright.precision import Precision
from boxwright.structures import Batch

_SHAPES = (
    # input channels, output channels, kernel size, height, width
    (64, 64, 3, 160, 160),
    (128, 128, 3, 80, 80),
    (256, 256, 3, 80, 80),
    (256, 256, 3, 160, 160),
    (512, 512, 3, 40, 40),
    (256, 1024, 1, 80, 80),
)
"""Convolutions typical of detectors."""
_ROUNDS = 5


def count_operations(system: BoxwrightSystem, batch: Batch, task: Task) -> int:
    """Floating-point operations of convolutions and matrix products; a multiply-add counts as two.

    Args:
        system: must not be compiled, since torch's counter works on eager operators.
        batch: the images.
        task: "train" counts the forward and backward pass, "infer" the forward pass.
    """
    inputs = system.prepare(batch)
    custom_mapping: Any = {}
    if torch.backends.mkldnn.is_available():
        custom_mapping = {fused_operator(): _fused_convolution}
    counter = FlopCounterMode(display=False, custom_mapping=custom_mapping)
    counter.mod_tracker = cast(Any, _OnlyGlobal())
    with counter:
        (system.train_step if task == "train" else system.infer)(inputs)
    return int(counter.get_total_flops())


class _OnlyGlobal(nullcontext[None]):
    """Counts to no module. PyTorch's tracker of modules uses global hooks, and hooks turn the fast paths off."""

    parents = ("Global",)


def _fused_convolution(
    x: torch.Size, second: torch.Size, third: torch.Size | None, *_: Any, out_shape: torch.Size, **__: Any
) -> int:
    """Operations of `layers.fused`'s oneDNN kernel, which torch's counter does not know.

    The kernel's arguments are (x, weight, bias), or (x, addend, weight) when it also adds a tensor.
    """
    weight = third if third is not None and len(third) == 4 else second
    return int(conv_flop_count(list(x), list(weight), list(out_shape)))


def best_rate(device: torch.device, precision: Precision) -> float:
    """The highest rate that any convolution of `_SHAPES` reaches (channels last), in operations per second."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    options: Any = {"device": device, "dtype": dtype}
    best = 0.0
    for in_channels, out_channels, kernel, height, width in _SHAPES:
        features = torch.rand(2, in_channels, height, width, **options).to(memory_format=torch.channels_last)
        weight = torch.rand(out_channels, in_channels, kernel, kernel, **options).to(memory_format=torch.channels_last)
        operations = 2 * len(features) * in_channels * out_channels * kernel**2 * height * width
        best = max(best, operations / _shortest_seconds(features, weight, kernel // 2, device))
    return best


@torch.inference_mode()
def _shortest_seconds(features: Tensor, weight: Tensor, padding: int, device: torch.device) -> float:
    """Time of the fastest of `_ROUNDS` convolutions, after one warm-up."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        F.conv2d(features, weight, padding=padding)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
