"""Handle non-finite losses and gradients: name the images, save the batch, stop the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from boxwright.structures import Batch, MaskGrids, Proposals, Targets
from boxwright.training.distributed import gather, rank
from boxwright.training.metrics import log_line


class NonFiniteError(ValueError):
    """A loss or gradient was NaN or infinite."""


class NonFiniteGuard:
    """Finds skipped steps among a run's recorded steps, keeps their batches, and stops the run after too many."""

    def __init__(
        self,
        folder: Path,
        *,
        allowed: int,
        read_batches: Callable[[int], Sequence[Batch]],
        write_weights: Callable[[Path], None],
    ) -> None:
        """Set up the guard.

        Args:
            folder: folder for the batches and weights of non-finite steps.
            allowed: number of non-finite steps that are skipped; the next one stops training.
            read_batches: reads this rank's batches of a step again; the first step is 0.
            write_weights: writes the current weights to a file.
        """
        self._folder, self._allowed = folder, allowed
        self._read_batches, self._write_weights = read_batches, write_weights
        self._num_checked, self._num_non_finite = 0, 0

    def resume(self, step: int, num_non_finite: int) -> None:
        """Continue after `step` checked steps, `num_non_finite` of which were skipped."""
        self._num_checked, self._num_non_finite = step, num_non_finite

    def check(self, rows: Tensor, names: Sequence[str], step: int) -> None:
        """Check the steps that were not checked before. All ranks must call it together.

        Args:
            rows: [steps, names] this rank's scalars of the latest steps, on the host.
            names: names of the columns, with "finite" and "total".
            step: number of steps done; the last row is this step's.

        Raises:
            NonFiniteError: more steps than allowed were not finite.
        """
        finite, total = names.index("finite"), names.index("total")
        for number, row in enumerate(rows, start=step - len(rows) + 1):
            if row[finite] == 0 and number > self._num_checked:
                self._handle(number, loss_is_finite=bool(row[total].isfinite()))
        self._num_checked = step

    def _handle(self, step: int, *, loss_is_finite: bool) -> None:
        parts = self._read_batches(step - 1)
        path, image_ids = keep_batches(self._folder, step, parts, loss_is_finite=loss_is_finite)
        what = (
            f"step {step}: the {'gradient' if loss_is_finite else 'loss'} is not finite on images {image_ids}; "
            f"batch saved to {path}"
        )
        self._num_non_finite += 1
        if self._num_non_finite <= self._allowed:
            log_line(f"{what}. Step skipped ({self._num_non_finite} of {self._allowed} allowed)")
            return
        weights = self._folder / "weights.safetensors"
        self._write_weights(weights)
        raise NonFiniteError(
            f"{what}, weights before the step to {weights}. Check the annotations of these images, lower the learning "
            "rate, or allow such steps to be skipped (--allow-non-finite)"
        )


def keep_batches(folder: Path, step: int, batches: Sequence[Batch], *, loss_is_finite: bool) -> tuple[Path, list[int]]:
    """Write each rank's batches of a step. All ranks must call it together.

    Args:
        folder: created if it does not exist.
        step: number of the step; the first step is 1.
        batches: this rank's batches, one for each part of an accumulated step.
        loss_is_finite: whether this rank's loss was finite.

    Returns:
        This rank's file, and the image ids of the ranks whose loss was not finite (of all ranks if every loss was
        finite but the gradient was not).
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
    """Load the batches of a non-finite step from a file that the guard wrote."""
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        part, name = key.split("/", 1)
        parts.setdefault(int(part), {})[name] = tensor
    return [_rebuilt(Batch, tensors) for _, tensors in sorted(parts.items())]


_NESTED: dict[str, Any] = {"targets": Targets, "masks": MaskGrids, "proposals": Proposals}


def _rebuilt(kind: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A structure from its tensors by name; names of nested structures contain a dot."""
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
