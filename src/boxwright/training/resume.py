"""Checks before a run is resumed: all ranks see the same checkpoint, and the experiment is the one that began."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

from boxwright.training import checkpoint
from boxwright.training.distributed import max_over_ranks
from boxwright.training.experiment import to_json
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
    saved = {**saved, "experiment": _with_new_defaults(saved["experiment"], present["experiment"])}
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


def _with_new_defaults(saved: Any, present: Any) -> Any:
    """Saved settings plus the defaults of settings that did not exist when they were saved.

    Names come from `present`, the running experiment, so that no module is imported because a file names it.
    """
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        return [_with_new_defaults(*pair) for pair in zip(saved, present, strict=True)]
    if not (isinstance(saved, dict) and isinstance(present, dict) and saved.get("call") == present.get("call")):
        return saved
    arguments, defaults = dict(saved["arguments"]), _defaults(present["call"])
    for name, value in present["arguments"].items():
        if name in arguments:
            arguments[name] = _with_new_defaults(arguments[name], value)
        elif name in defaults:
            arguments[name] = to_json(defaults[name])
    return {**saved, "arguments": arguments}


def _defaults(name: str) -> dict[str, Any]:
    """Defaults of a function's arguments or of a dataclass's fields."""
    module, _, attribute = name.rpartition(".")
    target = getattr(importlib.import_module(module), attribute)
    if not dataclasses.is_dataclass(target):
        parameters = inspect.signature(target).parameters
        return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    fields = dataclasses.fields(target)
    made = {field.name: field.default_factory() for field in fields if callable(field.default_factory)}
    return made | {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
