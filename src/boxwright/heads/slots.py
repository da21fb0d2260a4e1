"""How many slots a head has to look at.

Shapes never depend on data where something holds on to them: a graph, a compiler, an accelerator that would have to be
waited for. Where a count is free to read, which is on the CPU in eager mode, a head runs on the first few slots alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 8


def used_slots(valid: Tensor) -> int:
    """The fewest slots that hold all rows in use: 8, 16, 32 and so on, so that few shapes occur, or all.

    Args:
        valid: [B, S] bool, the slots in use, which are the first of each image.

    Returns:
        S where the count is not free to read.
    """
    num_slots = valid.shape[1]
    # A fake or traced tensor is of a type of its own, and has no count.
    if type(valid) is not Tensor or valid.device.type != "cpu" or torch.compiler.is_compiling():
        return num_slots
    most, size = int(valid.sum(1).max()), SMALLEST
    while size < most:
        size *= 2
    return min(size, num_slots)
