"""How fast images reach the GPU: copies between host and device, and the data loader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import synchronize
from boxwright.data.buckets import Resize
from boxwright.data.dataset import Category, Sample
from boxwright.data.decode import decode_image
from boxwright.data.loader import TrainingLoader
from boxwright.data.shapes import draw_image

_REPEATS = 5


def copies(scale: Scale) -> Iterator[dict[str, Any]]:
    """Bandwidth of copies of several sizes, from pinned and unpinned memory, in both directions."""
    rows = []
    for mib in scale.copy_mib:
        on_device = torch.zeros(mib << 20, dtype=torch.uint8, device=scale.device)
        for pinned in (False, True) if scale.device == "cuda" else (False,):
            on_host = torch.zeros(mib << 20, dtype=torch.uint8, pin_memory=pinned)
            pairs = {"host to device": (on_device, on_host), "device to host": (on_host, on_device)}
            for direction, (target, source) in pairs.items():
                seconds = []
                for _ in range(1 + _REPEATS):
                    synchronize(scale)
                    start = time.perf_counter()
                    target.copy_(source, non_blocking=pinned)
                    synchronize(scale)
                    seconds.append(time.perf_counter() - start)
                rate = (mib << 20) / min(seconds[1:])
                rows.append({"direction": direction, "mib": mib, "pinned": pinned, "gb_per_s": rate / 1e9})
    yield {"copies": rows}


class JpegDataset:
    """Images of coloured shapes as JPEG files of 640 x 480, the usual size of COCO's images."""

    def __init__(self, folder: Path, *, drawn: int = 16, length: int = 4096) -> None:
        """Draw `drawn` images; they repeat, each time as another image."""
        self.categories = [Category(1, "circle"), Category(2, "square"), Category(3, "triangle")]
        self.image_sizes = np.tile(np.array((480, 640), np.int64), (length, 1))
        self.image_ids = np.arange(length, dtype=np.int64) + 1
        self._files: list[Path] = []
        self._objects: list[tuple[np.ndarray, np.ndarray]] = []
        for index in range(drawn):
            image, shapes = draw_image(0, 0, index)
            scale = np.array([640 / image.shape[1], 480 / image.shape[0]])
            polygons = [polygon * scale for _, polygon in shapes]
            boxes = np.array([[*polygon.min(0), *polygon.max(0)] for polygon in polygons], np.float32)
            self._objects.append((boxes, np.array([kind for kind, _ in shapes], np.int64)))
            self._files.append(folder / f"{index}.jpg")
            cv2.imwrite(str(self._files[-1]), cv2.resize(image, (640, 480))[..., ::-1])
        self.max_objects = max(len(labels) for _, labels in self._objects)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __getitem__(self, position: int, /) -> Sample:
        """Decode an image."""
        file, (boxes, labels) = self._files[position % len(self._files)], self._objects[position % len(self._files)]
        return Sample(
            image=decode_image(file),
            image_id=position + 1,
            file_name=file.name,
            boxes=boxes,
            labels=labels,
            crowd=np.zeros(len(boxes), bool),
            object_ids=np.arange(len(boxes)),
        )


def loader(scale: Scale) -> Iterator[dict[str, Any]]:
    """Images per second of the training loader alone, resized for the canvas of the scale."""
    batch_size = scale.train_batches[-1]
    with TemporaryDirectory() as folder:
        training = TrainingLoader(
            JpegDataset(Path(folder)),
            batch_size=batch_size,
            resize=Resize(short=min(scale.canvas), long=max(scale.canvas)),
            seed=0,
            num_workers=scale.workers,
        )
        start = time.perf_counter()
        with closing(training.batches()) as batches:
            next(batches)
            first, count = time.perf_counter() - start, 0
            start = time.perf_counter()
            while not count or time.perf_counter() - start < scale.loader_seconds:
                count += len(next(batches).images)
            rate = count / (time.perf_counter() - start)
    yield {"loader": {"workers": scale.workers, "batch": batch_size, "images_per_s": rate, "first_batch_s": first}}
