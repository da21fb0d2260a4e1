"""The data set protocol: categories, a length, and samples by position.

Any object with these three members is a data set. `DatasetInfo` supplies everything else that loaders, evaluation and
reports need to know about one.

N images.
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
    """A class of objects; its position in the data set's `categories` is the label that detectors learn."""

    id: int
    """The annotation file's id: may start anywhere and leave gaps."""
    name: str
    """What people call it."""


Mask: TypeAlias = "Sequence[NDArray[np.floating[Any]]] | NDArray[np.bool_] | bytes | None"
"""An object's mask: its polygons, each [points, 2] (x, y); or a bitmap [H, W] of the image's size; or its run lengths
in COCO's compressed form; or None for an object that has a box only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image with its n objects, in pixels of the file."""

    image: NDArray[np.uint8]
    """[H, W, 3] uint8 RGB, upright (EXIF orientation applied)."""
    image_id: int
    """The annotation file's image id."""
    file_name: str
    """As the annotation file names it, for messages."""
    boxes: NDArray[np.float32]
    """[n, 4] float32 xyxy in pixels of the file, inside the image and with an area."""
    labels: NDArray[np.int64]
    """[n] int64, position in `categories`."""
    crowd: NDArray[np.bool_]
    """[n] bool, regions of many objects, and objects marked as difficult: neither trained on nor evaluated."""
    object_ids: NDArray[np.int64]
    """[n] int64, the objects' rows in the data set's index, from which their masks can be read."""
    masks: Sequence[Mask] | None = None
    """n masks, in the file's pixels; None where there are none at all."""


@runtime_checkable
class Dataset(Protocol):
    """Images with their objects, by position.

    A data set is pickled into every worker, so it should hold paths and memory maps rather than objects.

    It may have further attributes, which `DatasetInfo` reads. They save passes over all samples (the first four), are
    shown to the user, or lead to the annotations as they were before training dropped or clipped anything:

    - `image_sizes`: [N, 2] int (height, width);
    - `image_ids`: [N] int64;
    - `max_objects`: int, the largest number of objects on one image, crowd regions included;
    - `num_masks`: int, objects with a mask;
    - `num_without_mask`: int, objects without a mask, crowd regions not counted;
    - `annotations`, `images`: paths of the annotations, in a format of `boxwright.data.formats`, and of the images;
    - `parts`: the data sets that this one joins.
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
    """Facts about a data set, as it states them, otherwise computed from its samples.

    Facts are read on first use. The first that is not stated costs one pass over all samples, which decodes every
    image; that pass supplies the other facts too.
    """

    def __init__(self, dataset: Dataset) -> None:
        """Describe a data set; nothing is read yet."""
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
        """The largest number of objects on one image, crowd regions included; 0 without images."""
        stated = self._stated("max_objects")
        return max((count for _, _, count in self._samples), default=0) if stated is None else int(stated)

    @property
    def num_masks(self) -> int | None:
        """Objects with a mask; None if the data set does not state it."""
        return self._stated("num_masks")

    @property
    def num_without_mask(self) -> int | None:
        """Objects without a mask, crowd regions not counted; None if the data set does not state it."""
        return self._stated("num_without_mask")

    @cached_property
    def has_masks(self) -> bool:
        """Whether any object has a mask. If that is not stated, samples are read up to the first mask."""
        if self.num_masks is not None:
            return self.num_masks > 0
        samples = map(self._dataset.__getitem__, range(len(self._dataset)))
        return any(mask is not None for sample in samples for mask in sample.masks or ())

    @property
    def annotations(self) -> Path | None:
        """The annotations that the data set was read from; None if they are not files."""
        return self._path("annotations")

    @property
    def images(self) -> Path | None:
        """The image folder of `annotations`; None if the data set does not state it."""
        return self._path("images")

    @property
    def source(self) -> str:
        """Name for messages: the annotations, or the class; for a joined data set, the names of its parts."""
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
