"""How many floating-point operations a step or an inference is, and how fast the device could do them at best."""

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
    # channels in and out, side of the kernel, height and width of the map
    (64, 64, 3, 160, 160),
    (128, 128, 3, 80, 80),
    (256, 256, 3, 80, 80),
    (256, 256, 3, 160, 160),
    (512, 512, 3, 40, 40),
    (256, 1024, 1, 80, 80),
)
"""Convolutions such as detectors are made of."""
_ROUNDS = 5


def count_operations(system: BoxwrightSystem, batch: Batch, task: Task) -> int:
    """The operations of convolutions and matrix products, a multiplication and an addition being two.

    Args:
        system: not compiled: what a compiler makes of it is not what is counted.
        batch: the images.
        task: training counts the backward pass too.
    """
    given = system.prepare(batch)
    fused: Any = {}
    if torch.backends.mkldnn.is_available():
        fused = {fused_operator(): _fused_convolution}
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    counter.mod_tracker = cast(Any, _OnlyGlobal())
    with counter:
        (system.train_step if task == "train" else system.infer)(given)
    return int(counter.get_total_flops())


class _OnlyGlobal(nullcontext[None]):
    """Counts to no module. PyTorch's tracker of modules uses global hooks, and hooks turn the fast paths off."""

    parents = ("Global",)


def _fused_convolution(
    x: torch.Size, second: torch.Size, third: torch.Size | None, *_: Any, out_shape: torch.Size, **__: Any
) -> int:
    """The operations of `layers.fused`'s kernel, which PyTorch does not count.

    Its arguments are x, weight, bias or, where something is added, x, that, weight.
    """
    weight = third if third is not None and len(third) == 4 else second
    return int(conv_flop_count(list(x), list(weight), list(out_shape)))


def best_rate(device: torch.device, precision: Precision) -> float:
    """The most operations a second that any of a few convolutions reaches, channels last; of each the best of five."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    form: Any = {"device": device, "dtype": dtype}
    best = 0.0
    for inputs, outputs, kernel, height, width in _SHAPES:
        image = torch.rand(2, inputs, height, width, **form).to(memory_format=torch.channels_last)
        weight = torch.rand(outputs, inputs, kernel, kernel, **form).to(memory_format=torch.channels_last)
        operations = 2 * image.shape[0] * inputs * outputs * kernel**2 * height * width
        best = max(best, operations / _shortest(image, weight, kernel // 2, device))
    return best


@torch.inference_mode()
def _shortest(image: Tensor, weight: Tensor, padding: int, device: torch.device) -> float:
    """Seconds of the fastest call; the first one only prepares."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        F.conv2d(image, weight, padding=padding)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
