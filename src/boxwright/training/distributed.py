"""One process or many: who this process is, and the few collectives that training needs.

torchrun starts one process a device and tells each its place through environment variables. CUDA tensors travel over
NCCL, host tensors over gloo, so that flags and checkpoints are agreed upon without touching the device.
Without torchrun every function here is the trivial one.
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

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for the slowest rank: rank 0 scores an evaluation alone, in seconds to minutes."""


def rank() -> int:
    """This process's place among all, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str | None = None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and give this process's device.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None takes CUDA where there is one.

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
            raise ValueError(f"{error}; start no more processes per machine than it has devices") from error
    torch.cuda.set_device(device)
    return device


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of every rank's tensor, on every rank."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / world_size()


def max_over_ranks(number: int) -> int:
    """The largest of every rank's number, on every rank; a host collective, the device does not wait."""
    if world_size() == 1:
        return number
    flag = torch.tensor(number)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag)


def gather(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor (equal shapes), in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers, so that running statistics agree where they are used: evaluating and saving."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
