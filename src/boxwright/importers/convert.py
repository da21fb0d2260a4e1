"""Turns a weights file of another code base into one of ours, which `boxwright.load` opens."""

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
"""The code bases whose files are read."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A file as ours."""

    source: Source
    """The code base that it comes from."""
    file: ForeignFile
    """What was read."""
    tensors: dict[str, Tensor]
    """Under our names."""
    unused: list[str]
    """The file's own names of tensors that have no use here."""
    settings: Settings
    """What the file did not say and was taken from its source's published models."""
    experiment: Experiment | None
    """The model; None of a backbone alone."""
    categories: list[Category]
    """The classes by label; none of a backbone alone."""

    def save(self, path: Path) -> None:
        """Write our weights file: to be opened by `boxwright.load`, or of a backbone alone, to start from (--init)."""
        page: dict[str, Any] = {
            "versions": versions(),
            "source": {"format": self.source.name, "file": self.file.path.name, "sha256": self.file.sha256},
        }
        if self.experiment is not None:
            page["experiment"] = to_json(self.experiment)
            page["categories"] = [{"id": category.id, "name": category.name} for category in self.categories]
        save_weights(path, self.tensors, page)


def find_source(file: ForeignFile, name: str | None = None) -> Source:
    """The code base that a file comes from.

    Args:
        file: As read.
        name: Of the source, where the user names it.

    Raises:
        ValueError: There is no such source, none knows the file, or several do.
    """
    if name is not None:
        found = [source for source in SOURCES if source.name == name]
        if not found:
            raise ValueError(f"there is no source {name!r}: give one of {', '.join(s.name for s in SOURCES)}")
        return found[0]
    found = [source for source in SOURCES if source.recognises(file.tensors.keys(), file)]
    if not found:
        raise ValueError(
            f"{file.path} is of no kind that is read here ({', '.join(source.name for source in SOURCES)}); its "
            f"tensors are {listed(sorted(file.tensors))}"
        )
    if len(found) > 1:
        raise ValueError(
            f"{file.path} may be {' or '.join(source.title for source in found)}, whose numbers differ, and does not "
            f"say which: give --source {' or --source '.join(source.name for source in found)}"
        )
    return found[0]


def convert(
    file: ForeignFile,
    *,
    source: str | None = None,
    categories: Sequence[Category] | None = None,
    norm_eps: float | None = None,
    changes: Sequence[str] = (),
    require_names: bool = True,
) -> Imported:
    """Bring a file's tensors under our names, and find the model that they are.

    Args:
        file: As read.
        source: Where it comes from; None finds out.
        categories: The classes by label; None takes the file's or the source's.
        norm_eps: What the norms of the backbone add to the variance where they were trained; None takes the source's.
        changes: `name=value` each, of the experiment, where the source's usual numbers are not the file's: see
            `with_settings`.
        require_names: Whether it is an error that nobody names the classes; otherwise they are numbered.

    Raises:
        ValueError: It cannot be converted whole: a tensor is unknown, missing or of another shape, or the classes are.
    """
    known = find_source(file, source)
    settings = known.settings(file)
    if norm_eps is not None:
        settings = replace(settings, norm_eps=norm_eps)
    try:
        tensors, unused = _renamed(file, known, settings)
        experiment, classes = None, list[Category]()
        if is_backbone(tensors):
            if changes or categories is not None:
                raise ValueError("it is a backbone alone, which has neither settings nor classes: leave them out")
        else:
            experiment = with_settings(Experiment(model=model_of(tensors, settings)), changes)
            classes = _categories(known, file, categories, num_classes_of(tensors), require_names)
            with torch.device("meta"):
                detector = build(experiment.model, num_classes=len(classes))
            _require_fit(tensors, detector.state_dict())
    except ValueError as error:
        raise ValueError(f"{file.path}, taken for {known.title}: {error}") from None
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
    """A file's tensors under our names, whether or not they are the whole of a model.

    Raises:
        ValueError: Its source is not known, or a tensor is not.
    """
    source = find_source(file)
    return _renamed(file, source, source.settings(file))[0]


def _renamed(file: ForeignFile, source: Source, settings: Settings) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under our names, and the names without use."""
    renamed = rename(file.tensors, source.rules(file.tensors.keys()))
    tensors = with_batch_counts(source.finish(renamed.tensors))
    if settings.norm_eps != NORM_EPS:
        tensors = with_norm_eps(tensors, settings.norm_eps, NORM_EPS)
    return tensors, renamed.unused


def _categories(
    source: Source, file: ForeignFile, given: Sequence[Category] | None, count: int | None, require_names: bool
) -> list[Category]:
    if count is None:  # of a network for proposals, which has no classes of its own
        return list(given or source.categories(file, len(COCO)) or COCO)
    found = source.categories(file, count) if given is None else given
    if found is None and not require_names:
        return [Category(number, f"class {number}") for number in range(1, count + 1)]
    if found is None:
        raise ValueError(f"it does not name its {count} classes: give --categories, a file with a name a line")
    if len(found) != count:
        raise ValueError(f"it has {count} classes, but {len(found)} are named: {listed([c.name for c in found])}")
    return list(found)


def _require_fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that the tensors are the model's, each of them.

    Raises:
        ValueError: some are missing, over, or of another shape; all are named.
    """
    missing = sorted(wanted.keys() - tensors.keys())
    over = sorted(tensors.keys() - wanted.keys())
    other = [
        f"{name} is {list(tensors[name].shape)} in the file and {list(wanted[name].shape)} in the model"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing: {listed(missing)}")
    if over:
        faults.append(f"{len(over)} tensors have no place in the model: {listed(over)}")
    if other:
        faults.append("; ".join(other[:10]) + (f"; and {len(other) - 10} more" if len(other) > 10 else ""))
    if faults:
        raise ValueError("the file does not fit the model that it seems to be. " + ". ".join(faults))
