"""Checks before a run is resumed: all ranks see the same checkpoint, and the experiment did not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from boxwright.training import checkpoint
from boxwright.training.distributed import max_over_ranks
from boxwright.training.run_folder import require_same


def newest_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint in the `checkpoints` folder of a run, the same on all ranks, or None.

    Raises:
        ValueError: The ranks see different checkpoints.
    """
    newest = checkpoint.newest(folder)
    step = 0 if newest is None else checkpoint.step_of(newest)
    last = max_over_ranks(step)
    if last != -max_over_ranks(-step):
        raise ValueError(
            f"{folder / f'step_{last}'} is not visible to every process: set --out to a folder that all machines share"
        )
    return newest


def require_same_run(saved: dict[str, Any], present: dict[str, Any], folder: Path) -> None:
    """Check that a resumed run has the same experiment and data as before.

    Args:
        saved: metadata stored with the checkpoint.
        present: metadata of the resumed run.
        folder: folder of the run, for the message.

    Raises:
        ValueError: They differ; the message names every changed field.
    """
    require_same(_fixed(saved), _fixed(present), folder)


def _fixed(metadata: dict[str, Any]) -> dict[str, Any]:
    """Settings that must not change, by name. The distribution of the images of a step over devices may change."""
    return {
        **metadata["experiment"]["arguments"],
        "images_per_device": None,
        "images_per_device x processes x accumulate": metadata.get("images_per_step"),
        "steps_per_epoch": metadata.get("steps_per_epoch"),
        "categories": metadata.get("categories"),
    }
