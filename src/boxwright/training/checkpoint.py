"""Checkpoints: everything that a resumed run needs to give the same results as an uninterrupted run.

A checkpoint is the folder `checkpoints/step_N/`, which exists only if it is complete. It contains safetensors files (no
pickle) and a JSON file:

- `model.safetensors`: parameters and buffers, including frozen ones;
- `optimizer.safetensors`: momenta, named `<kind>/<parameter>`;
- `ema.safetensors`: averaged parameters, if the experiment has `ema_decay`;
- `loop.safetensors`: random states of every rank, and the scalars recorded since the last log line;
- `state.json`: the step (also the position of the loader and the schedule), experiment, versions, number of ranks.

The learning rate is not saved, because the schedule computes it from the step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from boxwright.training.distributed import gather, rank
from boxwright.training.ema import EMA

_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The objects whose state a checkpoint saves and restores."""

    model: nn.Module
    """The detector itself, not a wrapper around it."""
    optimizer: torch.optim.Optimizer
    """Optimizer over the trainable parameters."""
    ema: EMA | None
    """Moving average of the parameters, or None."""
    device: torch.device
    """Device of the model. Its random state is saved with the host's."""


def newest(folder: Path) -> Path | None:
    """Newest complete checkpoint in the `checkpoints` folder of a run, or None."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def step_of(checkpoint: Path) -> int:
    """Number of steps done at a checkpoint, read from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def save(
    folder: Path, step: int, state: TrainingState, *, figures: Mapping[str, Tensor], metadata: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step_N`, and remove all but the newest `keep` checkpoints. Every rank calls it; rank 0 writes.

    Args:
        folder: `checkpoints` folder of the run.
        step: number of steps done.
        state: objects to save.
        figures: small tensors of the loop, which `load` returns.
        metadata: contents of `state.json` besides the step.
        keep: number of checkpoints to keep.

    Raises:
        OSError: The disk is full or cannot be written. The earlier checkpoints are kept.
    """
    target = folder / f"step_{step}"
    loop = {name: tensor.detach().cpu() for name, tensor in figures.items()}
    loop["random/cpu"] = torch.stack(gather(torch.get_rng_state()))
    if state.device.type == "cuda":
        loop["random/cuda"] = torch.stack(gather(torch.cuda.get_rng_state(state.device)))
    if rank() > 0 or target.is_dir():
        return target
    partial = folder / f".partial_step_{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_tensors(partial / "model.safetensors", state.model.state_dict())
        _write_tensors(partial / "optimizer.safetensors", _optimizer_tensors(state))
        if state.ema is not None:
            _write_tensors(partial / "ema.safetensors", state.ema.state())
        _write_tensors(partial / "loop.safetensors", loop)
        (partial / "state.json").write_text(json.dumps({"step": step, **metadata}, indent=1) + "\n", encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint {target} cannot be written: {error}. Free disk space or allow writing, then use --resume."
        ) from error
    _flush(folder)
    for old in _checkpoints(folder)[:-keep]:
        # Rename first: an interrupted removal must not leave an incomplete checkpoint with a valid name.
        doomed = old.rename(folder / f".removed_{old.name}")
        shutil.rmtree(doomed)
    return target


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint: its step, and the metadata of the run.

    Raises:
        ValueError: The checkpoint is damaged.
    """
    with _reading(checkpoint):
        metadata: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return metadata


def load(checkpoint: Path, state: TrainingState) -> dict[str, Tensor]:
    """Load a checkpoint into a model, its optimizer and its moving average.

    Returns:
        Tensors of the loop. Pass them to `restore_random_state` after everything else is set up.

    Raises:
        ValueError: The checkpoint is damaged, or its tensors do not match the model.
    """
    with _reading(checkpoint):
        model = load_file(checkpoint / "model.safetensors")
        optimizer = load_file(checkpoint / "optimizer.safetensors")
        averages = load_file(checkpoint / "ema.safetensors") if state.ema is not None else {}
        loop = load_file(checkpoint / "loop.safetensors")
    try:
        state.model.load_state_dict(model)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{checkpoint} does not match the model of this experiment: {why}") from error
    parameters = dict(state.model.named_parameters())
    for key, tensor in optimizer.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # Fused optimizers require that a momentum has the memory layout of its parameter.
        slot = torch.empty_like(parameter) if tensor.shape == parameter.shape else tensor.to(state.device)
        state.optimizer.state[parameter][kind] = slot.detach().copy_(tensor)
    if state.ema is not None:
        state.ema.load_state(averages)
    return loop


def restore_random_state(loop: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the random state of this rank. A rank without a saved state keeps its current state."""
    if rank() < len(loop["random/cpu"]):
        torch.set_rng_state(loop["random/cpu"][rank()].clone())
        if device.type == "cuda" and "random/cuda" in loop:
            torch.cuda.set_rng_state(loop["random/cuda"][rank()].clone(), device)


def clear_leftovers(folder: Path) -> None:
    """Remove folders that a killed process was writing or removing."""
    for pattern in (".partial_*", ".removed_*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Replace errors of reading a file by an error that names the checkpoint and the fix."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {checkpoint} is damaged: {error}. Remove this folder to resume from the checkpoint before it; "
            "without an earlier checkpoint the run starts from the beginning."
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)), key=step_of)


def _optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{kind}/{names[parameter]}": value
        for parameter, slots in state.optimizer.state.items()
        for kind, value in slots.items()
        if isinstance(value, Tensor)
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
