"""Number of object slots that a head is applied to.

Shapes must not depend on data inside a CUDA graph or a compiled graph, and reading a count from a GPU would wait for
the GPU. In eager mode on a CPU, reading a count is free, so a head is applied only to the leading slots that are in
use.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SLOTS = 8


def used_slots(valid: Tensor) -> int:
    """Number of leading slots that contain all valid ones, rounded up to 8, 16, 32, ... so that few shapes occur.

    Args:
        valid: [B, S] bool, slots in use; in each image these are the first slots.

    Returns:
        At most S. Always S on a GPU and in compiled code, where reading the count is not free.
    """
    num_slots = valid.shape[1]
    # Fake and traced tensors are subclasses of Tensor and have no values to count.
    if type(valid) is not Tensor or valid.device.type != "cpu" or torch.compiler.is_compiling():
        return num_slots
    num_used, size = int(valid.sum(1).max()), MIN_SLOTS
    while size < num_used:
        size *= 2
    return min(size, num_slots)
