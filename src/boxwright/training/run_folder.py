"""`RunFolder`: the files of a run, and checks before a run is started or resumed in a folder."""

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
    """Paths of the files of a run."""

    path: Path
    """Folder of the run."""

    @property
    def experiment(self) -> Path:
        """Experiment, categories, versions and command, as JSON."""
        return self.path / "experiment.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints `step_N`."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """Latest weights for detection: the averaged weights if the experiment has `ema_decay`."""
        return self.path / "weights.safetensors"

    @property
    def non_finite(self) -> Path:
        """Folder of the batches with a non-finite loss or gradient."""
        return self.path / "non_finite"

    def require_no_run(self) -> None:
        """Check that a new run can start here.

        Raises:
            ValueError: The folder holds a run that could be resumed, or the path is a file.
        """
        if any(self.checkpoints.glob("step_*")):
            raise ValueError(
                f"{self.path} already holds a run. Continue it with --resume, or choose another folder with --out."
            )
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file. Choose a folder for the run with --out.")

    def clear(self) -> None:
        """Remove the logs of a run that stopped before its first checkpoint."""
        (self.path / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of Boxwright, PyTorch and Python, and the device: the results of a run may depend on them."""
    return {
        "boxwright": boxwright.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def require_same(saved: Any, present: Any, where: Path) -> None:
    """Check that a resumed run has the same experiment as before.

    Raises:
        ValueError: The experiment changed; the message names every changed field.
    """
    before, now = dict(_leaves(saved)), dict(_leaves(present))
    changes = [
        f"{name}: {before.get(name, 'missing')!r} -> {now.get(name, 'missing')!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) or (name in before) != (name in now)
    ]
    if changes:
        raise ValueError(
            f"{where} cannot be resumed with a changed experiment: {'; '.join(changes)}. Restore these settings, or "
            "start a new run in another folder with --init."
        )


def _leaves(data: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            # The arguments of a part are named without "arguments", as in --set.
            yield from _leaves(value, name if key == "arguments" else f"{name}.{key}" if name else key)
    elif isinstance(data, list) and data:
        for index, value in enumerate(data):
            yield from _leaves(value, f"{name}[{index}]")
    else:
        yield name, data
