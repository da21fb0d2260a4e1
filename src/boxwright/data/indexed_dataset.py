"""A data set of annotations in any known format, and a folder of images."""

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

_MIN_SIDE_2018 = 32


class IndexedDataset:
    """The images of one split with their objects, in any of the formats of `boxwright.data.formats`.

    It holds memory maps and pickles as paths, so that workers share one copy of the annotations.
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
            annotations: The split's annotations: a COCO JSON file, a VOC list `ImageSets/Main/SPLIT.txt`, ...
            images: The image folder; file names are relative to it.
            keep_empty: Whether to keep images without objects, which are background in training. False leaves them out,
                and also images with a side under 32 pixels, like mmdetection 0.5.
            max_pixels: Refuse images with more pixels.
            cache_dir: See `read_index`.

        Raises:
            FaultyDataError: The annotations have errors that would corrupt training, or images are missing.
            OSError: An annotation file cannot be read.
            ValueError: The annotations are in no known format, or a folder is missing.
        """
        self.annotations = Path(annotations)
        self.images = Path(images)
        self.max_pixels = max_pixels
        self.index: AnnotationIndex = read_index(self.annotations, self.images, cache_dir=cache_dir)
        """The annotations as arrays; the `object_ids` of a sample are rows of them."""
        names = [self.index.file_name(row) for row in range(len(self.index))]
        faults = [*file_faults(self.images, names, self.index.image_ids.tolist()).values(), *self._too_large()]
        if faults:
            raise FaultyDataError(faults)
        num_objects = np.diff(self.index.object_offsets)
        kept = np.ones(len(self.index), bool)
        self.dropped: dict[str, int] = dict(self.index.dropped)
        """Number of entries that are left out or changed, by kind, to be printed for the user."""
        if not keep_empty:
            empty, small = num_objects == 0, (self.index.image_sizes < _MIN_SIDE_2018).any(1)
            kept = ~empty & ~small
            counts = {
                "images without objects": empty.sum(),
                f"images under {_MIN_SIDE_2018} pixels": (small & ~empty).sum(),
            }
            self.dropped |= {what: int(count) for what, count in counts.items() if count}
        self.rows: NDArray[np.int64] = np.flatnonzero(kept)
        """[N] int64, each image's row in the index."""
        if not len(self.rows):
            raise ValueError(f"{self.annotations}: no image is left once those without objects are left out")
        self.max_objects = int(num_objects[self.rows].max())
        of_kept = np.repeat(kept, num_objects)
        has_mask = self.index.has_mask[of_kept]
        self.num_masks = int(has_mask.sum())
        """Objects with a mask."""
        self.num_without_mask = int((~has_mask & ~self.index.crowd[of_kept]).sum())
        """Objects that have a box only, crowd regions not counted."""

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes in order of their ids, which is the order of the labels."""
        return self.index.categories

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """[N] int64, the image ids of the annotations."""
        return self.index.image_ids[self.rows]

    @property
    def image_sizes(self) -> NDArray[np.int32]:
        """[N, 2] int32, (height, width)."""
        return self.index.image_sizes[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Sample:
        """Decode the image at a position.

        Raises:
            FaultyDataError: The file cannot be decoded, or its size is not the one in the annotations.
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
            masks=[self.index.mask(row) for row in range(objects.start, objects.stop)],
        )

    def _too_large(self) -> list[Fault]:
        num_pixels = self.index.image_sizes.astype(np.int64).prod(1)
        return [
            Fault(
                str(self.images / self.index.file_name(row)),
                f"image {self.index.image_ids[row]}",
                f"{num_pixels[row]} pixels, over the limit of {self.max_pixels}",
                "shrink it with its annotations, or raise max_pixels",
            )
            for row in np.flatnonzero(num_pixels > self.max_pixels).tolist()
        ]
