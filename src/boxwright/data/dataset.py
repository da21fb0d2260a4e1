"""The data set protocol: categories, a length, and samples by position.

Any object with these three members is a data set. `DatasetInfo` provides everything else that loaders, evaluation and
reports need to know about a data set.

Shapes: N is the number of images of the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Category:
    """A class of objects. Its position in the data set's `categories` is the label that detectors are trained on."""

    id: int
    """Category id of the annotation file; ids may start at any number and have gaps."""
    name: str
    """Class name."""


Mask: TypeAlias = "Sequence[NDArray[np.floating[Any]]] | NDArray[np.bool_] | bytes | None"
"""Mask of an object: polygons, each [points, 2] (x, y); or a bitmap [H, W] of the size of the image; or run lengths in
COCO's compressed form; or None for an object without a mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image with its n objects, in pixels of the file."""

    image: NDArray[np.uint8]
    """[H, W, 3] uint8 RGB, after EXIF orientation."""
    image_id: int
    """Image id of the annotation file."""
    file_name: str
    """File name in the annotation file, for messages."""
    boxes: NDArray[np.float32]
    """[n, 4] float32 xyxy in pixels of the file, inside the image and with a positive area."""
    labels: NDArray[np.int64]
    """[n] int64, indices into `categories`."""
    crowd: NDArray[np.bool_]
    """[n] bool, crowd regions and objects marked as difficult: ignored in training and evaluation."""
    object_ids: NDArray[np.int64]
    """[n] int64, rows of the objects in the index of the data set, from which their masks can be read."""
    masks: Sequence[Mask] | None = None
    """n masks in pixels of the file; None if no object has a mask."""


@runtime_checkable
class Dataset(Protocol):
    """Images with their objects, by position.

    A data set is pickled for every worker, so it should hold paths and memory maps instead of large objects.

    It may have further attributes, which `DatasetInfo` reads. The first four save passes over all samples; the others
    are shown to the user or lead to the original annotations, before training dropped or clipped objects:

    - `image_sizes`: [N, 2] int (height, width);
    - `image_ids`: [N] int64;
    - `max_objects`: int, maximum number of objects per image, including crowd regions;
    - `num_masks`: int, number of objects with a mask;
    - `num_without_mask`: int, number of objects without a mask, not counting crowd regions;
    - `annotations`, `images`: paths of the annotations (in a format of `boxwright.data.formats`) and the image folder;
    - `parts`: data sets that this data set concatenates.
    """

    @property
    def categories(self) -> Sequence[Category]:
        """The classes, in the order of their labels."""
        ...

    def __len__(self) -> int:
        """The number of images."""
        ...

    def __getitem__(self, position: int, /) -> Sample:
        """The sample at a position, 0 <= position < len."""
        ...


class DatasetInfo:
    """Facts about a data set: attributes of the data set if it has them, otherwise computed from its samples.

    Facts are read on first use. The first fact that the data set does not state costs one pass over all samples, which
    decodes every image; the same pass computes the other facts.
    """

    def __init__(self, dataset: Dataset) -> None:
        """Wrap a data set; nothing is read yet."""
        self._dataset = dataset

    @cached_property
    def image_sizes(self) -> NDArray[np.int64]:
        """[N, 2] int64, (height, width)."""
        stated = self._stated("image_sizes")
        sizes = [size for size, _, _ in self._samples] if stated is None else stated
        return np.asarray(sizes, np.int64).reshape(-1, 2)

    @cached_property
    def image_ids(self) -> NDArray[np.int64]:
        """[N] int64."""
        stated = self._stated("image_ids")
        return np.asarray([image_id for _, image_id, _ in self._samples] if stated is None else stated, np.int64)

    def stated_image_id(self, position: int) -> int | None:
        """Image id at a position; None if the data set does not state it, because reading the sample may fail."""
        stated = self._stated("image_ids")
        return None if stated is None else int(stated[position])

    @cached_property
    def max_objects(self) -> int:
        """Maximum number of objects per image, including crowd regions; 0 without images."""
        stated = self._stated("max_objects")
        return max((count for _, _, count in self._samples), default=0) if stated is None else int(stated)

    @property
    def num_masks(self) -> int | None:
        """Number of objects with a mask; None if the data set does not state it."""
        return self._stated("num_masks")

    @property
    def num_without_mask(self) -> int | None:
        """Number of objects without a mask, not counting crowd regions; None if the data set does not state it."""
        return self._stated("num_without_mask")

    @cached_property
    def has_masks(self) -> bool:
        """Whether any object has a mask. If the data set does not state it, samples are read up to the first mask."""
        if self.num_masks is not None:
            return self.num_masks > 0
        samples = map(self._dataset.__getitem__, range(len(self._dataset)))
        return any(mask is not None for sample in samples for mask in sample.masks or ())

    @property
    def annotations(self) -> Path | None:
        """Path of the annotations; None if the data set was not read from files."""
        return self._path("annotations")

    @property
    def images(self) -> Path | None:
        """Image folder of `annotations`; None if the data set does not state it."""
        return self._path("images")

    @property
    def source(self) -> str:
        """Name for messages: the annotations or the class name; for a concatenated data set, the names of its parts."""
        parts = self._stated("parts")
        if parts is not None:
            return ", ".join(DatasetInfo(part).source for part in parts)
        return str(self.annotations or type(self._dataset).__name__)

    @cached_property
    def _samples(self) -> list[tuple[tuple[int, int], int, int]]:
        """(height, width), image id and number of objects of every sample."""
        samples = map(self._dataset.__getitem__, range(len(self._dataset)))
        return [(sample.image.shape[:2], sample.image_id, len(sample.boxes)) for sample in samples]

    def _stated(self, name: str) -> Any:
        return getattr(self._dataset, name, None)

    def _path(self, name: str) -> Path | None:
        stated = self._stated(name)
        return Path(stated) if isinstance(stated, str | Path) else None
