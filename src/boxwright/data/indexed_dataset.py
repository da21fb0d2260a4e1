"""A data set on disk: annotations in any known format and a folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boxwright.data.dataset import Category, Sample
from boxwright.data.decode import MAX_PIXELS, decode_image
from boxwright.data.formats import read_index
from boxwright.data.formats.check import decode_fault, file_faults, size_fault
from boxwright.data.formats.fault import Fault, FaultyDataError
from boxwright.data.formats.index import AnnotationIndex

# Images with a shorter side are dropped with keep_empty=False, as in mmdetection 0.5.
_MIN_SIDE = 32


class IndexedDataset:
    """Images and objects of one split, in any of the formats of `boxwright.data.formats`.

    The annotations are memory-mapped, and the data set is pickled as paths, so that all workers share one copy.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        keep_empty: bool = True,
        max_pixels: int = MAX_PIXELS,
        cache_dir: Path | None = None,
    ) -> None:
        """Open a split; `IndexedDataset(*find_layout(folder)["train"])` opens the training split of a folder.

        Args:
            annotations: Annotations of the split: a COCO JSON file, a VOC list `ImageSets/Main/SPLIT.txt`, ...
            images: Image folder; file names are relative to it.
            keep_empty: Whether to keep images without objects, which are background in training. False drops them, and
                also drops images with a side under 32 pixels, as mmdetection 0.5 does.
            max_pixels: Maximum number of pixels per image; larger images raise an error.
            cache_dir: See `read_index`.

        Raises:
            FaultyDataError: The annotations have errors that would corrupt training, or images are missing or too
                large.
            OSError: An annotation file cannot be read.
            ValueError: The annotations are not in a known format, a folder is missing, or no image remains.
        """
        self.annotations = Path(annotations)
        self.images = Path(images)
        self.max_pixels = max_pixels
        self.index: AnnotationIndex = read_index(self.annotations, self.images, cache_dir=cache_dir)
        """Annotations as arrays; the `object_ids` of a sample are their rows."""
        names = [self.index.file_name(row) for row in range(len(self.index))]
        faults = [*file_faults(self.images, names, self.index.image_ids.tolist()).values(), *self._too_large()]
        if faults:
            raise FaultyDataError(faults)
        num_objects = np.diff(self.index.object_offsets)
        keep = np.ones(len(self.index), bool)
        self.dropped: dict[str, int] = dict(self.index.dropped)
        """Number of dropped or clipped entries, by kind, to print for the user."""
        if not keep_empty:
            empty, small = num_objects == 0, (self.index.image_sizes < _MIN_SIDE).any(1)
            keep = ~empty & ~small
            counts = {
                "images without objects": empty.sum(),
                f"images under {_MIN_SIDE} pixels": (small & ~empty).sum(),
            }
            self.dropped |= {what: int(count) for what, count in counts.items() if count}
        self.rows: NDArray[np.int64] = np.flatnonzero(keep)
        """[N] int64, row of each image in the index."""
        if not len(self.rows):
            raise ValueError(
                f"{self.annotations}: no image has objects and sides of at least {_MIN_SIDE} pixels. Use "
                "keep_empty=True, or add annotations"
            )
        self.max_objects = int(num_objects[self.rows].max())
        keep_object = np.repeat(keep, num_objects)
        has_mask = self.index.has_mask[keep_object]
        self.num_masks = int(has_mask.sum())
        """Number of objects with a mask."""
        self.num_without_mask = int((~has_mask & ~self.index.crowd[keep_object]).sum())
        """Number of objects without a mask, not counting crowd regions."""

    @property
    def categories(self) -> tuple[Category, ...]:
        """Categories sorted by id, in the order of the labels."""
        return self.index.categories

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """[N] int64, image ids from the annotations."""
        return self.index.image_ids[self.rows]

    @property
    def image_sizes(self) -> NDArray[np.int32]:
        """[N, 2] int32, (height, width) from the annotations."""
        return self.index.image_sizes[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Sample:
        """Decode the image at a position.

        Raises:
            FaultyDataError: The image cannot be decoded, or its size differs from the annotations.
        """
        row = int(self.rows[position])
        path = self.images / self.index.file_name(row)
        image_id = int(self.index.image_ids[row])
        try:
            image = decode_image(path, max_pixels=self.max_pixels)
        except ValueError as error:
            raise FaultyDataError([decode_fault(path, image_id, error)]) from error
        height, width = self.index.image_sizes[row].tolist()
        if image.shape[:2] != (height, width):
            raise FaultyDataError([size_fault(path, image_id, (height, width), image.shape[:2])])
        objects = self.index.objects(row)
        return Sample(
            image=image,
            image_id=image_id,
            file_name=self.index.file_name(row),
            boxes=np.array(self.index.boxes[objects]),
            labels=self.index.labels[objects].astype(np.int64),
            crowd=np.array(self.index.crowd[objects]),
            object_ids=np.arange(objects.start, objects.stop),
            masks=[self.index.mask(object_row) for object_row in range(objects.start, objects.stop)],
        )

    def _too_large(self) -> list[Fault]:
        num_pixels = self.index.image_sizes.astype(np.int64).prod(1)
        return [
            Fault(
                str(self.images / self.index.file_name(row)),
                f"image {self.index.image_ids[row]}",
                f"{num_pixels[row]} pixels exceed the limit of {self.max_pixels}",
                "Downscale the image and its annotations, or increase max_pixels",
            )
            for row in np.flatnonzero(num_pixels > self.max_pixels).tolist()
        ]
