"""The folder of a run: where its parts lie, what `experiment.json` says, and whether a run may begin or go on in it."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import boxwright


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path
    """The folder itself."""

    @property
    def experiment(self) -> Path:
        """The experiment, the categories, the versions and the command."""
        return self.path / "experiment.json"

    @property
    def checkpoints(self) -> Path:
        """Holds `step_N`."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """The latest weights to detect with: the averaged ones where the experiment keeps an average."""
        return self.path / "weights.safetensors"

    @property
    def non_finite(self) -> Path:
        """Batches of steps that were not finite."""
        return self.path / "non_finite"

    def require_no_run(self) -> None:
        """Check that a new run may begin here.

        Raises:
            ValueError: there is a run that could be resumed, or no folder can be here.
        """
        if any(self.checkpoints.glob("step_*")):
            raise ValueError(f"{self.path} holds a run already: go on with it with --resume, or name another folder")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: name another folder for the run")

    def clear(self) -> None:
        """Remove what a run that never saved left."""
        (self.path / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)


def versions() -> dict[str, str]:
    """What a run's numbers may depend on besides its experiment."""
    return {
        "boxwright": boxwright.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def write_page(path: Path, page: dict[str, Any]) -> None:
    """Write a JSON page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def require_same(saved: Any, present: Any, where: Path) -> None:
    """Check that a run goes on with the experiment it began with.

    Raises:
        ValueError: it changed; every field that did is named.
    """
    before, now = dict(_leaves(saved)), dict(_leaves(present))
    changes = [
        f"{name} was {before.get(name, 'not there')!r} and is {now.get(name, 'not there')!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) or (name in before) != (name in now)
    ]
    if changes:
        raise ValueError(
            f"{where} cannot be resumed with a changed experiment: {'; '.join(changes)}. Put that back, or train anew "
            "into another folder with --init"
        )


def _leaves(page: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(page, dict):
        for key, value in page.items():
            # A call's arguments are called by their own names, as --set does.
            yield from _leaves(value, name if key == "arguments" else f"{name}.{key}" if name else key)
    elif isinstance(page, list) and page:
        for index, value in enumerate(page):
            yield from _leaves(value, f"{name}[{index}]")
    else:
        yield name, page
