"""Several data sets as one, and one several times over, for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.data.categories import match_by_name
from boxwright.data.dataset import Category, Dataset, Sample


class ConcatDataset:
    """The pictures of several data sets, one data set after the other, under the first one's classes.

    The parts must have the same classes by name, in whatever order and under whatever ids: what a part does not
    annotate would be learnt as background. Image ids stay as they are unless an earlier part has one of them; then the
    part's are raised by one number, past all that came before. `object_ids` remain those of the picture's own part.

    It is measured with the annotations of its parts, as `boxwright.evaluation.objects` reads each.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        """Join data sets; the same one may come more than once.

        Raises:
            ValueError: There is none, or two do not have the same classes; the message lists what each alone has.
        """
        if not parts:
            raise ValueError("there are no data sets to join: give at least one")
        self.parts = tuple(parts)
        names = [str(getattr(part, "annotations", f"data set {k}")) for k, part in enumerate(parts, 1)]
        self.categories: tuple[Category, ...] = tuple(parts[0].categories)
        """The first part's."""
        self.part_labels = [
            np.array(
                match_by_name(
                    part.categories,
                    self.categories,
                    sides=(name, names[0]),
                    what="the data sets do not have the same categories",
                    mend="Rename categories, or take them out of one and into the other, until both have the same.",
                ),
                np.int64,
            )
            for name, part in zip(names, parts, strict=True)
        ]
        """For each part, the joined data set's label of each of its own."""
        facts = [_facts(part) for part in parts]
        self.image_sizes: NDArray[np.int64] = np.concatenate([sizes for sizes, _, _ in facts])
        """[N, 2] int64, (height, width)."""
        self.max_objects = max(most for _, _, most in facts)
        """Objects of the fullest picture."""
        self.num_masks, self.num_without_mask = _mask_counts(parts)
        """Objects with a mask (None where a part does not say), and known to have none."""
        self.image_ids: NDArray[np.int64] = np.zeros(0, np.int64)
        """[N] int64, unique if those of each part are."""
        self.part_shifts: list[int] = []
        """For each part, by how much its image ids are raised."""
        for _, ids, _ in facts:
            taken = self.image_ids
            shift = int(taken.max()) + 1 - int(ids.min()) if np.isin(ids, taken).any() else 0
            self.part_shifts.append(shift)
            self.image_ids = np.concatenate([taken, ids + shift])
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position, with the joined data set's labels and image id."""
        k = int(np.searchsorted(self._ends, position, side="right"))
        part = self.parts[k]
        sample = part[position - int(self._ends[k]) + len(part)]
        return replace(sample, image_id=int(self.image_ids[position]), labels=self.part_labels[k][sample.labels])


class RepeatDataset:
    """A data set several times over, so that an epoch holds as many passes and a small one is not all restarts.

    Each pass changes the pictures at random anew. A picture's image id is the same in each, so this is for training,
    not for measuring.
    """

    def __init__(self, dataset: Dataset, times: int) -> None:
        """Take a data set `times` times.

        Raises:
            ValueError: `times` is under 1.
        """
        if times < 1:
            raise ValueError(f"times={times}: give at least 1")
        self.dataset, self.times = dataset, times
        self.categories: Sequence[Category] = dataset.categories
        sizes, ids, self.max_objects = _facts(dataset)
        self.num_masks, self.num_without_mask = _mask_counts([dataset])
        """Of the data set itself: objects with a mask (None where it does not say), and known to have none."""
        self.image_sizes: NDArray[np.int64] = np.tile(sizes, (times, 1))
        """[N, 2] int64, (height, width)."""
        self.image_ids: NDArray[np.int64] = np.tile(ids, times)
        """[N] int64, each id `times` times."""

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position."""
        return self.dataset[position % len(self.dataset)]


def _mask_counts(parts: Sequence[Dataset]) -> tuple[int | None, int]:
    """Objects with a mask, None where a part does not say; and those that are known to have none."""
    with_mask = [getattr(part, "num_masks", None) for part in parts]
    stated = [count for count in with_mask if count is not None]
    total = sum(stated) if len(stated) == len(parts) else None
    return total, sum(getattr(part, "num_without_mask", 0) for part in parts)


def _facts(dataset: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Sizes [N, 2] and ids [N] of the pictures and the objects of the fullest; a pass over all where not stated."""
    if not len(dataset):
        return np.zeros((0, 2), np.int64), np.zeros(0, np.int64), 0
    stated: list[Any] = [getattr(dataset, name, None) for name in ("image_sizes", "image_ids", "max_objects")]
    if any(fact is None for fact in stated):
        samples = map(dataset.__getitem__, range(len(dataset)))
        sizes, ids, counts = zip(
            *((sample.image.shape[:2], sample.image_id, len(sample.boxes)) for sample in samples), strict=True
        )
        stated = [sizes, ids, max(counts)]
    return np.asarray(stated[0], np.int64), np.asarray(stated[1], np.int64), int(stated[2])
