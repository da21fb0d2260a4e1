"""What is kept of a step whose loss or gradient was not finite, so that it can be named and done again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from boxwright.structures import Batch, MaskGrids, Proposals, Targets
from boxwright.training.distributed import gather, rank


class NonFiniteError(ValueError):
    """Training met a loss or gradient that is NaN or infinite."""


def keep_batches(folder: Path, step: int, batches: Sequence[Batch], *, loss_is_finite: bool) -> tuple[Path, list[int]]:
    """Write what each rank learnt from in a step. Every rank calls it together.

    Args:
        folder: made if need be.
        step: the number of the step that failed, 1 for a run's first.
        batches: this rank's, all parts of the step.
        loss_is_finite: whether this rank's own loss was finite.

    Returns:
        This rank's file, and the image ids of the ranks whose loss was not finite (of all ranks where every loss was
        finite and the gradient was not).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step}_rank_{rank()}.safetensors"
    tensors = {}
    for part, batch in enumerate(batches):
        tensors.update({f"{part}/{name}": tensor.cpu().contiguous() for name, tensor in _named_tensors(batch).items()})
    save_file(tensors, path)
    image_ids = torch.cat([batch.image_ids.cpu() for batch in batches])
    suspect = gather(torch.tensor(not loss_is_finite))
    if not any(suspect):
        suspect = [torch.tensor(True)] * len(suspect)
    return path, [int(i) for ids, bad in zip(gather(image_ids), suspect, strict=True) if bad for i in ids]


def load_batches(path: Path) -> list[Batch]:
    """The batches of a file that the guard kept, to do the step again."""
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        part, name = key.split("/", 1)
        parts.setdefault(int(part), {})[name] = tensor
    return [_rebuilt(Batch, tensors) for _, tensors in sorted(parts.items())]


_NESTED: dict[str, Any] = {"targets": Targets, "masks": MaskGrids, "proposals": Proposals}


def _rebuilt(kind: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A structure from its tensors, the names of nested ones behind a dot."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        field, dot, rest = name.partition(".")
        if dot:
            arguments.setdefault(field, {})[rest] = tensor
        else:
            arguments[field] = tensor
    return kind(**{name: _rebuilt(_NESTED[name], v) if isinstance(v, dict) else v for name, v in arguments.items()})


def _named_tensors(structure: Batch | Targets | MaskGrids | Proposals, prefix: str = "") -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for field in fields(structure):
        value = getattr(structure, field.name)
        if isinstance(value, Tensor):
            named[prefix + field.name] = value
        elif value is not None:
            named |= _named_tensors(value, f"{prefix}{field.name}.")
    return named
