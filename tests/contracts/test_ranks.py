"""Gradients on two ranks equal those of one process, even if the images of one rank contain no objects."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from boxwright.losses import shared_denominators
from boxwright.structures import Batch, map_tensors
from factory import DETECTORS, random_batch, small_detector
from training.runs import start_python

RANK = "from contracts.test_ranks import {function}; from pathlib import Path; {function}({rank}, Path({folder!r}))"


def full_and_empty() -> Batch:
    """One image with three objects and one with none."""
    torch.manual_seed(4)
    batch = random_batch(canvas=(96, 128))
    assert batch.targets is not None
    valid = batch.targets.valid & torch.tensor([[True], [False]])
    return replace(batch, targets=replace(batch.targets, valid=valid))


def start_ranks(function: Callable[[int, Path], None], folder: Path) -> list[subprocess.Popen[str]]:
    return [start_python(RANK.format(function=function.__name__, rank=rank, folder=str(folder))) for rank in (0, 1)]


def join_ranks(processes: list[subprocess.Popen[str]], timeout: float) -> None:
    """Wait until the processes have ended without an error."""
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            with process:  # Leaving the context closes the pipes.
                process.kill()


def init_group(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)


def gradients(kind: str, batch: Batch) -> dict[str, Tensor]:
    detector = small_detector(kind).double()  # Rounding depends on the batch size; in float64 it cannot change a match.
    sum(detector.losses(batch).values()).backward()
    return {f"{kind}/{name}": p.grad for name, p in detector.named_parameters()}


def average_gradients(rank: int, folder: Path) -> None:
    """Compute the gradients of every detector on one image per process, and average them over both processes."""
    init_group(rank, folder)
    image = map_tensors(full_and_empty(), lambda t: t[rank : rank + 1])
    averaged = {}
    for kind in DETECTORS:
        with shared_denominators():
            local = gradients(kind, image)
        for name, gradient in local.items():
            distributed.all_reduce(gradient)
            averaged[name] = gradient / 2
    save_file(averaged, folder / f"rank_{rank}.safetensors")
    distributed.destroy_process_group()


def test_gradients_are_averaged_correctly_if_a_rank_has_no_objects(tmp_path: Path) -> None:
    processes = start_ranks(average_gradients, tmp_path)
    expected = {name: gradient for kind in DETECTORS for name, gradient in gradients(kind, full_and_empty()).items()}
    join_ranks(processes, timeout=300)
    for rank in (0, 1):
        averaged = load_file(tmp_path / f"rank_{rank}.safetensors")
        assert averaged.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (averaged[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < 1e-6, f"{name}: {error:.1e}"


def losses_on_one_rank(rank: int, folder: Path) -> None:
    """Rank 0 computes losses; rank 1 waits for it at a barrier, as it would while rank 0 validates alone."""
    init_group(rank, folder)
    if rank == 0:
        losses = {kind: sum(small_detector(kind).losses(full_and_empty()).values()) for kind in DETECTORS}
        save_file(losses, folder / "losses.safetensors")
    distributed.monitored_barrier()
    distributed.destroy_process_group()


def test_one_rank_alone_can_compute_losses(tmp_path: Path) -> None:
    processes = start_ranks(losses_on_one_rank, tmp_path)
    expected = {kind: sum(small_detector(kind).losses(full_and_empty()).values()) for kind in DETECTORS}
    join_ranks(processes, timeout=120)
    for kind, loss in load_file(tmp_path / "losses.safetensors").items():
        torch.testing.assert_close(loss, expected[kind].detach())
