"""Several data sets as one, and one several times over, for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from boxwright.data.categories import match_by_name
from boxwright.data.dataset import Category, Dataset, DatasetInfo, Sample


class ConcatDataset:
    """The images of several data sets, one data set after the other, with the classes of the first.

    The parts must have the same class names; order and ids may differ. A class that a part does not annotate would be
    trained on as background in that part. The image ids of a part stay unchanged unless an earlier part has one of
    them; then one number is added to all of them, so that they follow the previous ids. `object_ids` are rows of the
    image's part.

    Evaluation uses the annotations of the parts, as `boxwright.evaluation.objects` reads each.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        """Join data sets; the same one may come more than once.

        Raises:
            ValueError: There is none, or two do not have the same classes; the message lists what each alone has.
        """
        if not parts:
            raise ValueError("there are no data sets to join: give at least one")
        self.parts = tuple(parts)
        infos = [DatasetInfo(part) for part in parts]
        names = [str(info.annotations or f"data set {number}") for number, info in enumerate(infos, 1)]
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
        self.image_sizes: NDArray[np.int64] = np.concatenate([info.image_sizes for info in infos])
        """[N, 2] int64, (height, width)."""
        self.max_objects = max(info.max_objects for info in infos)
        """The largest number of objects on one image."""
        self.num_masks, self.num_without_mask = _mask_counts(infos)
        """Objects with a mask (None if a part does not state it), and objects known to have none."""
        self.image_ids: NDArray[np.int64] = np.zeros(0, np.int64)
        """[N] int64, unique if those of each part are."""
        self.part_shifts: list[int] = []
        """For each part, by how much its image ids are raised."""
        for info in infos:
            previous, ids = self.image_ids, info.image_ids
            shift = int(previous.max()) + 1 - int(ids.min()) if np.isin(ids, previous).any() else 0
            self.part_shifts.append(shift)
            self.image_ids = np.concatenate([previous, ids + shift])
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
        info = DatasetInfo(dataset)
        self.max_objects = info.max_objects
        """The largest number of objects on one image."""
        self.num_masks, self.num_without_mask = _mask_counts([info])
        """Objects with a mask (None if the data set does not state it) and known to have none, each counted once."""
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
