"""What a data set is to the loaders: categories, a length, and samples by position.

Any object with these three serves, so that reading another format takes a class and no registration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
"""An object's mask: its polygons, each [points, 2] (x, y); or a bitmap [H, W] of the picture's size; or the run lengths
of one in COCO's compressed form; or None for an object of which the box alone is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture with its objects, in the file's own pixels; n objects."""

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
    """[n] bool, regions that hold many objects."""
    object_ids: NDArray[np.int64]
    """[n] int64, the objects' rows in the data set's index, from which their masks can be read."""
    masks: Sequence[Mask] | None = None
    """n masks, in the file's pixels; None where there are none at all."""


@runtime_checkable
class Dataset(Protocol):
    """Pictures with their objects, by position.

    It is pickled into every worker, so it should hold paths and memory maps rather than objects. Optional
    attributes spare the loader a pass over all samples: `image_sizes` [N, 2] int (height, width), `image_ids` [N]
    int64, `max_objects` (the most objects on one image, crowd regions included) and `num_masks` (objects with a mask).
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
