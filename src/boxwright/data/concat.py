"""Concatenate several data sets, or repeat one data set, for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from boxwright.data.categories import match_by_name
from boxwright.data.dataset import Category, Dataset, DatasetInfo, Sample


class ConcatDataset:
    """Concatenation of several data sets, with the categories of the first.

    The parts must have the same class names; order and ids may differ. (Otherwise a class that a part does not annotate
    would be trained as background in this part.) The image ids of a part are unchanged, unless an earlier part has one
    of them; then a constant is added to all ids of the part, so that they follow the previous ids. `object_ids` are
    indices into the image's part.

    Evaluation reads the annotations of each part; see `boxwright.evaluation.objects`.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        """Concatenate data sets; the same data set may occur more than once.

        Raises:
            ValueError: There are no data sets, or two have different classes; the message lists the differences.
        """
        if not parts:
            raise ValueError("data sets to concatenate: expected at least one, got none")
        self.parts = tuple(parts)
        infos = [DatasetInfo(part) for part in parts]
        names = [str(info.annotations or f"data set {number}") for number, info in enumerate(infos, 1)]
        self.categories: tuple[Category, ...] = tuple(parts[0].categories)
        """Categories of the first part."""
        self.part_labels = [
            np.array(
                match_by_name(
                    part.categories,
                    self.categories,
                    sides=(name, names[0]),
                    what="the data sets have different categories",
                    fix="Rename, remove or add categories until both data sets have the same names.",
                ),
                np.int64,
            )
            for name, part in zip(names, parts, strict=True)
        ]
        """For each part, the label in the concatenated data set of each label of the part."""
        self.image_sizes: NDArray[np.int64] = np.concatenate([info.image_sizes for info in infos])
        """[N, 2] int64, (height, width)."""
        self.max_objects = max(info.max_objects for info in infos)
        """Maximum number of objects per image."""
        self.num_masks, self.num_without_mask = _mask_counts(infos)
        """Objects with a mask (None if a part does not state it), and objects known to have none."""
        self.image_ids: NDArray[np.int64] = np.zeros(0, np.int64)
        """[N] int64, unique if the ids of each part are unique."""
        self.part_shifts: list[int] = []
        """For each part, the constant that is added to its image ids."""
        for info in infos:
            previous, ids = self.image_ids, info.image_ids
            shift = int(previous.max()) + 1 - int(ids.min()) if np.isin(ids, previous).any() else 0
            self.part_shifts.append(shift)
            self.image_ids = np.concatenate([previous, ids + shift])
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position, with the label and image id of the concatenated data set."""
        k = int(np.searchsorted(self._ends, position, side="right"))
        part = self.parts[k]
        sample = part[position - int(self._ends[k]) + len(part)]
        return replace(sample, image_id=int(self.image_ids[position]), labels=self.part_labels[k][sample.labels])


class RepeatDataset:
    """A data set repeated several times, so that an epoch over a small data set has more steps.

    Each repetition is augmented with different random numbers. An image has the same id in all repetitions, so use this
    class for training, not for evaluation.
    """

    def __init__(self, dataset: Dataset, times: int) -> None:
        """Repeat a data set `times` times.

        Raises:
            ValueError: `times` is below 1.
        """
        if times < 1:
            raise ValueError(f"times: expected at least 1, got {times}")
        self.dataset, self.times = dataset, times
        self.categories: Sequence[Category] = dataset.categories
        info = DatasetInfo(dataset)
        self.max_objects = info.max_objects
        """Maximum number of objects per image."""
        self.num_masks, self.num_without_mask = _mask_counts([info])
        """Objects with a mask (None if the data set does not state it) and without; repetitions are not counted."""
        self.image_sizes: NDArray[np.int64] = np.tile(info.image_sizes, (times, 1))
        """[N, 2] int64, (height, width)."""
        self.image_ids: NDArray[np.int64] = np.tile(info.image_ids, times)
        """[N] int64, each id `times` times."""

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position."""
        return self.dataset[position % len(self.dataset)]


def _mask_counts(infos: Sequence[DatasetInfo]) -> tuple[int | None, int]:
    """Objects with a mask (None if a part does not state it), and objects known to have none."""
    stated = [info.num_masks for info in infos if info.num_masks is not None]
    total = sum(stated) if len(stated) == len(infos) else None
    return total, sum(info.num_without_mask or 0 for info in infos)
