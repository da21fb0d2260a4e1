"""The evaluations of a run, each in its own folder: `RUN/evaluation/NAME/` with results, report and metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from boxwright.evaluation.results import write_json

FOLDER = "evaluation"
_METADATA = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, on what and how."""

    data: str
    """Name of the data set: its folder's, or its annotation file's where no folder was given."""
    split: str
    """Name of the split, or of the annotation file."""
    annotations: str
    """Absolute path of the annotation file."""
    conditions: dict[str, Any] = field(default_factory=dict)
    """What else the metrics depend on: precision, views, limits."""
    step: int | None = None
    """Training step of the weights; None if unknown."""
    weights: str = ""
    """SHA-256 of the weights file."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics by name, in 0..1; below 0 where there was nothing to measure with."""

    @property
    def title(self) -> str:
        """Data set, split and conditions in a few words."""
        words = [f"{name} {value}" for name, value in self.conditions.items() if value not in (None, "float32", "coco")]
        return ", ".join([f"{self.data} ({self.split})", *words])

    def is_repeated_by(self, other: Evaluation) -> bool:
        """Whether the other one measures the same data under the same conditions."""
        names = ("annotations", "split", "conditions")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def write(self, folder: Path) -> None:
        """Write the metadata beside the results."""
        write_json(folder / _METADATA, dataclasses.asdict(self))


def data_name(annotations: Path, folders: Sequence[Path]) -> str:
    """The name of the data set's folder that holds an annotation file; the file's own name if none does."""
    file = annotations.resolve()
    return next((folder.resolve().name for folder in folders if folder.resolve() in file.parents), annotations.name)


def evaluation_folder(run: Path, name: str, evaluation: Evaluation) -> Path:
    """Where an evaluation belongs: `NAME`, `DATA_NAME`, `DATA_NAME_2` and so on, the first that holds no other one.

    A repeated evaluation takes the folder of the one before.
    """
    longer = f"{evaluation.data}_{name}"
    for folder in (run / FOLDER / text for text in _names(name, longer)):
        file = folder / _METADATA
        if not file.exists():  # free, or an evaluation that was stopped while it was written
            return folder
        before = _read(file)
        if before is not None and before.is_repeated_by(evaluation):
            return folder
    raise AssertionError("the names do not end")


def _names(name: str, longer: str) -> Iterator[str]:
    yield name
    yield longer
    yield from (f"{longer}_{number}" for number in count(2))


def read_evaluations(run: Path, weights: str) -> dict[str, Evaluation]:
    """The evaluations of weights with this SHA-256, by the name of their folder; `val` comes first.

    Raises:
        ValueError: The metadata of an evaluation is damaged.
    """
    files = sorted((run / FOLDER).glob(f"*/{_METADATA}"), key=lambda file: (file.parent.name != "val", file))
    found: dict[str, Evaluation] = {}
    for file in files:
        evaluation = _read(file)
        if evaluation is None:
            raise ValueError(f"{file} is damaged: remove its folder, or run boxwright test again")
        if evaluation.weights == weights:
            found[file.parent.name] = evaluation
    return found


def _read(file: Path) -> Evaluation | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Evaluation)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def numbers_of(metrics: Any) -> Mapping[str, float]:
    """Metrics by name: the summary of `CocoMetrics`, or recalls unchanged."""
    return metrics if isinstance(metrics, Mapping) else metrics.numbers
