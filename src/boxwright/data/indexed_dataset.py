"""COCO or Pascal VOC annotations and a folder of pictures as a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boxwright.data.dataset import Category, Sample
from boxwright.data.decode import MAX_PIXELS, decode_image
from boxwright.data.formats.check import decode_fault, file_faults, size_fault
from boxwright.data.formats.fault import Fault, FaultyDataError
from boxwright.data.formats.index import CocoIndex, read_index

_MIN_SIDE_2018 = 32


class CocoDataset:
    """Pictures with their objects from a COCO annotation file, or from the XML files that a VOC split lists.

    Holds memory maps and pickles as paths, so that workers share one copy of the annotations.
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
        """Open a data set; `CocoDataset(*find_layout(folder)["train"])` opens what a folder holds.

        Args:
            annotations: The COCO JSON file, or VOC's `ImageSets/Main/SPLIT.txt`.
            images: The folder that its file names start from.
            keep_empty: Whether images without objects are kept, to be learnt from as background. False leaves them out,
                and images with a side under 32 pixels, like the 2018 toolbox.
            max_pixels: Refuse pictures with more.
            cache_dir: See `read_index`.

        Raises:
            FaultyDataError: Something would corrupt training, or images are missing; lists it.
            OSError: An annotation file cannot be read.
            ValueError: There is no such image folder, or none with VOC's XML files.
        """
        self.annotations = Path(annotations)
        self.images = Path(images)
        self.max_pixels = max_pixels
        self.index: CocoIndex = read_index(self.annotations, cache_dir)
        """The annotation file as arrays; `object_ids` of a sample are rows in it."""
        names = [self.index.file_name(row) for row in range(len(self.index))]
        faults = [*file_faults(self.images, names, self.index.image_ids.tolist()).values(), *self._too_large()]
        if faults:
            raise FaultyDataError(faults)
        num_objects = np.diff(self.index.object_offsets)
        kept = np.ones(len(self.index), bool)
        self.dropped: dict[str, int] = dict(self.index.dropped)
        """What is left out or changed, counted by what it is; to be told to the user."""
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
        """Objects, crowd regions not counted, of which only the box is known."""

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes by rising id, which is the order of their labels."""
        return self.index.categories

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """[N] int64, the annotation file's image ids."""
        return self.index.image_ids[self.rows]

    @property
    def image_sizes(self) -> NDArray[np.int32]:
        """[N, 2] int32, (height, width)."""
        return self.index.image_sizes[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Sample:
        """Decode the picture at a position.

        Raises:
            FaultyDataError: The file cannot be decoded, or is of another size than the annotation file states.
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
