"""The process group of a run, and the collectives that training needs.

torchrun starts one process per device and passes the rank in environment variables. CUDA tensors are exchanged over
NCCL and host tensors over gloo, so that flags and checkpoints need no device synchronisation. Without torchrun, every
function here handles the single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from boxwright.checks import check_device

# Re-exported: both were defined here before evaluation needed them too.
from boxwright.distributed import rank as rank
from boxwright.distributed import world_size as world_size

TIMEOUT = timedelta(minutes=30)
"""Timeout of collectives. It is long because rank 0 computes the metrics of an evaluation alone."""


@contextmanager
def process_group(device: str | None = None) -> Iterator[torch.device]:
    """Initialise the process group if torchrun started this process, and yield the device of this process.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None for CUDA if available, otherwise the CPU.

    Raises:
        ValueError: see `check_device`.
    """
    chosen = _device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        yield chosen
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def _device(name: str | None) -> torch.device:
    device = check_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        try:
            check_device(device)
        except ValueError as error:
            raise ValueError(f"{error}; start at most one process per device of the machine") from error
    torch.cuda.set_device(device)
    return device


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, on every rank."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / world_size()


def max_over_ranks(number: int) -> int:
    """Maximum of a number over all ranks, on every rank. A host collective: the device is not synchronised."""
    if world_size() == 1:
        return number
    flag = torch.tensor(number)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag)


def gather(tensor: Tensor) -> list[Tensor]:
    """Tensors of all ranks (of equal shapes), in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0 to all ranks, so that running statistics agree in evaluation and in saved weights."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
