"""Checks before a run is resumed: all ranks see the same checkpoint, and the experiment is the one that began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from boxwright.training import checkpoint
from boxwright.training.distributed import max_over_ranks
from boxwright.training.run_folder import require_same


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's `checkpoints` folder, the same on all ranks; None for none.

    Raises:
        ValueError: the ranks see different checkpoints.
    """
    newest = checkpoint.newest(folder)
    step = 0 if newest is None else checkpoint.step_of(newest)
    last = max_over_ranks(step)
    if last != -max_over_ranks(-step):
        raise ValueError(
            f"not every process sees {folder / f'step_{last}'}: give --out a folder that all machines share"
        )
    return newest


def require_same_run(saved: dict[str, Any], present: dict[str, Any], folder: Path) -> None:
    """Check that a run continues with the experiment and the data it began with.

    Args:
        saved: the metadata stored with the checkpoint.
        present: the metadata of the run that resumes.
        folder: the run's folder, for the message.

    Raises:
        ValueError: they differ; the message names every field that does.
    """
    require_same(_fixed(saved), _fixed(present), folder)


def _fixed(page: dict[str, Any]) -> dict[str, Any]:
    """What must not change, by name. How the images of a step are shared over devices may change."""
    return {
        **page["experiment"]["arguments"],
        "images_per_device": None,
        "images_per_device x processes x accumulate": page.get("images_per_step"),
        "steps_per_epoch": page.get("steps_per_epoch"),
        "categories": page.get("categories"),
    }
