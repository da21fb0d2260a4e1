"""Convert a weights file of another library to a Boxwright weights file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boxwright.data.dataset import Category
from boxwright.importers import detectron, detectron2, maskrcnn_benchmark, mmdetection, torchvision
from boxwright.importers.architecture import is_backbone, model_of, num_classes_of
from boxwright.importers.categories import COCO
from boxwright.importers.rules import NORM_EPS, listed, rename, with_batch_counts, with_norm_eps
from boxwright.importers.source import Settings, Source
from boxwright.text import plural
from boxwright.training.experiment import Experiment, build, to_json
from boxwright.training.run_folder import versions
from boxwright.training.settings import with_settings
from boxwright.weights.foreign import ForeignFile
from boxwright.weights.ours import save_weights

SOURCES = (
    torchvision.TORCHVISION,
    torchvision.RESNET,
    mmdetection.FIRST,
    mmdetection.LATER,
    detectron2.DETECTRON2,
    detectron.DETECTRON,
    maskrcnn_benchmark.MASKRCNN_BENCHMARK,
)
"""Libraries whose weights files can be imported."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A converted weights file."""

    source: Source
    """Library that wrote the file."""
    file: ForeignFile
    """The file as read."""
    tensors: dict[str, Tensor]
    """Tensors by Boxwright's names."""
    unused: list[str]
    """Names, in the file, of tensors that Boxwright does not use."""
    settings: Settings
    """Settings that the file does not contain, taken from the published models of the library."""
    experiment: Experiment | None
    """Experiment with the model; None for a backbone only."""
    categories: list[Category]
    """Classes by label; empty for a backbone only."""

    def save(self, path: Path) -> None:
        """Write a Boxwright weights file, for `boxwright.load` or, for a backbone only, for `--init`."""
        metadata: dict[str, Any] = {
            "versions": versions(),
            "source": {"format": self.source.name, "file": self.file.path.name, "sha256": self.file.sha256},
        }
        if self.experiment is not None:
            metadata["experiment"] = to_json(self.experiment)
            metadata["categories"] = [{"id": category.id, "name": category.name} for category in self.categories]
        save_weights(path, self.tensors, metadata)


def find_source(file: ForeignFile, name: str | None = None) -> Source:
    """Find the library that wrote a file.

    Args:
        file: The file as read.
        name: Name of the source, if the user states it.

    Raises:
        ValueError: The name is unknown, no source recognises the file, or several do.
    """
    if name is not None:
        named = [source for source in SOURCES if source.name == name]
        if not named:
            raise ValueError(f"--source: expected one of {', '.join(s.name for s in SOURCES)}, got {name!r}")
        return named[0]
    candidates = [source for source in SOURCES if source.recognises(file.tensors.keys(), file)]
    if not candidates:
        raise ValueError(
            f"{file.path}: unknown source; supported are {', '.join(source.name for source in SOURCES)}. Its tensors "
            f"are {listed(sorted(file.tensors))}"
        )
    if len(candidates) > 1:
        raise ValueError(
            f"{file.path} may be {' or '.join(source.title for source in candidates)}, with different settings. Choose "
            f"one with --source {' or --source '.join(source.name for source in candidates)}."
        )
    return candidates[0]


def convert(
    file: ForeignFile,
    *,
    source: str | None = None,
    categories: Sequence[Category] | None = None,
    norm_eps: float | None = None,
    changes: Sequence[str] = (),
    require_names: bool = True,
) -> Imported:
    """Rename the tensors of a file and determine its model.

    Args:
        file: The file as read.
        source: Name of the library that wrote the file; None to recognise it.
        categories: Classes by label; None for the classes of the file or of the library.
        norm_eps: Epsilon of the backbone's norm layers in training; None for the usual value of the library.
        changes: `name=value` settings of the experiment that differ from the library's usual ones, see
            `with_settings`.
        require_names: Whether unknown class names are an error; otherwise the classes are numbered.

    Raises:
        ValueError: The file cannot be converted completely: a tensor is unknown, missing or has another shape, or the
            classes are unknown.
    """
    known = find_source(file, source)
    try:
        settings = known.settings(file)
        if norm_eps is not None:
            settings = replace(settings, norm_eps=norm_eps)
        tensors, unused = _renamed(file, known, settings)
        experiment, classes = None, list[Category]()
        if is_backbone(tensors):
            if changes or categories is not None:
                raise ValueError("a backbone has neither settings nor classes. Leave out --set and --categories.")
        else:
            experiment = with_settings(Experiment(model=model_of(tensors, settings)), changes)
            classes = _categories(known, file, categories, num_classes_of(tensors), require_names)
            with torch.device("meta"):
                detector = build(experiment.model, num_classes=len(classes))
            _require_fit(tensors, detector.state_dict())
    except ValueError as error:
        raise ValueError(f"{file.path} ({known.title}): {error}") from None
    return Imported(
        source=known,
        file=file,
        tensors=tensors,
        unused=unused,
        settings=settings,
        experiment=experiment,
        categories=classes,
    )


def our_tensors(file: ForeignFile) -> dict[str, Tensor]:
    """Rename the tensors of a file to Boxwright's names. The model may be incomplete.

    Raises:
        ValueError: The source or a tensor is unknown.
    """
    source = find_source(file)
    return _renamed(file, source, source.settings(file))[0]


def _renamed(file: ForeignFile, source: Source, settings: Settings) -> tuple[dict[str, Tensor], list[str]]:
    """Renamed tensors, and the names of unused tensors."""
    renamed = rename(file.tensors, source.rules(file.tensors.keys()))
    tensors = with_batch_counts(source.finish(renamed.tensors))
    if settings.norm_eps != NORM_EPS:
        tensors = with_norm_eps(tensors, settings.norm_eps, NORM_EPS)
    return tensors, renamed.unused


def _categories(
    source: Source, file: ForeignFile, categories: Sequence[Category] | None, count: int | None, require_names: bool
) -> list[Category]:
    if count is None:  # An RPN has no classes.
        return list(categories or source.categories(file, len(COCO)) or COCO)
    named = source.categories(file, count) if categories is None else categories
    if named is None and not require_names:
        return [Category(number, f"class {number}") for number in range(1, count + 1)]
    if named is None:
        raise ValueError(f"the names of its {count} classes are unknown: use --categories FILE, with one name per line")
    if len(named) != count:
        raise ValueError(f"the model has {count} classes, got {len(named)} names: {listed([c.name for c in named])}")
    return list(named)


def _require_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that the tensors have the names and shapes of the model's.

    Raises:
        ValueError: Tensors are missing, unexpected or have another shape; the message names them.
    """
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    other = [
        f"{name}: {list(tensors[name].shape)} in the file, {list(expected[name].shape)} in the model"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    faults = []
    if missing:
        faults.append(f"{plural(len(missing), 'missing tensor')}: {listed(missing)}")
    if unexpected:
        faults.append(f"{plural(len(unexpected), 'unexpected tensor')}: {listed(unexpected)}")
    if other:
        faults.append("; ".join(other[:10]) + (f"; and {len(other) - 10} more" if len(other) > 10 else ""))
    if faults:
        raise ValueError("the tensors do not match the model. " + ". ".join(faults))
