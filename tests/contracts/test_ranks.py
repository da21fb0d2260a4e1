"""Two ranks learn what one process would, also where one of them has no object to learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from boxwright.structures import Batch, map_tensors
from factory import DETECTORS, random_batch, small_detector
from training.runs import start_python

RANK = "from contracts.test_ranks import be_rank; from pathlib import Path; be_rank({rank}, Path({folder!r}))"


def full_and_empty() -> Batch:
    """One picture with three objects and one with none."""
    torch.manual_seed(4)
    batch = random_batch(canvas=(96, 128))
    assert batch.targets is not None
    valid = batch.targets.valid & torch.tensor([[True], [False]])
    return replace(batch, targets=replace(batch.targets, valid=valid))


def gradients(kind: str, batch: Batch) -> dict[str, Tensor]:
    detector = small_detector(kind).double()  # so that rounding, which depends on the batch, decides nothing
    sum(detector.losses(batch).values()).backward()
    return {f"{kind}/{name}": p.grad for name, p in detector.named_parameters()}


def be_rank(rank: int, folder: Path) -> None:
    """What each of the two processes does: its own picture's gradients of every detector, averaged over both."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = map_tensors(full_and_empty(), lambda t: t[rank : rank + 1])
    averaged = {}
    for kind in DETECTORS:
        for name, gradient in gradients(kind, own).items():
            distributed.all_reduce(gradient)
            averaged[name] = gradient / 2
    save_file(averaged, folder / f"rank_{rank}.safetensors")
    distributed.destroy_process_group()


def test_a_rank_without_objects_takes_part_in_the_mean(tmp_path: Path) -> None:
    processes = [start_python(RANK.format(rank=rank, folder=str(tmp_path))) for rank in (0, 1)]
    wanted = {name: gradient for kind in DETECTORS for name, gradient in gradients(kind, full_and_empty()).items()}
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for rank in (0, 1):
        given = load_file(tmp_path / f"rank_{rank}.safetensors")
        assert given.keys() == wanted.keys()
        for name, gradient in wanted.items():
            error = (given[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < 1e-6, f"{name}: {error:.1e}"
