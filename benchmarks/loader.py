"""Compare the speed of data loading with torchvision's reference scripts, on one core and with the same files.

    python benchmarks/loader.py ../shared/data/coco_mini

JPEG files of 640 x 480 and 480 x 640 pixels are loaded as batches with short side 800, flipped with probability 0.5,
with boxes and without masks. torchvision's references/detection decode with Pillow, flip and convert to float32; the
models then normalise, resize and pad with `GeneralizedRCNNTransform`. Boxwright's batches are uint8, and the detector
normalises them on its device. The row "to float32" includes the normalisation on this core. The row "in a worker"
builds batches in shared memory, as a worker process does.

All variants run in alternation within each round. Times are processor times of the whole process with one thread, which
other load on the machine affects least; images/s is for one fully used core. Each result is the median over the rounds.
The times of the stages come from a separate, profiled pass. All files are in the page cache of the operating system.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import functional as v1
from torchvision.transforms import v2

from boxwright.backbones.backbone import PYTORCH
from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize
from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.loader import TrainingLoader
from boxwright.detectors.detector import PixelNormalizer
from boxwright.structures import map_tensors

SHORT, LONG = 800, 1333
BATCH_SIZE = 2

Stages = dict[str, tuple[str, ...]]
OURS: Stages = {
    "decode": ("decode.py:decode_image",),
    "other work per sample": ("batch_builder.py:_placed_sample", "-decode.py:decode_image"),
    "resize and flip": ("augment.py:place_image",),
    "other work in collate": ("collate.py:collate", "-batch_builder.py:_placed_sample", "-augment.py:place_image"),
}
MODEL: Stages = {
    "normalise": ("transform.py:normalize",),
    "resize": ("transform.py:resize",),
    "pad into the batch": ("transform.py:batch_images",),
}
STAGES: dict[str, Stages] = {
    "boxwright": OURS,
    "boxwright, in a worker": OURS | {"to shared memory": ("loader.py:share_memory_",)},
    "boxwright, to float32": OURS | {"normalise": ("loader.py:normalize",)},
    "torchvision": {
        "decode": ("loader.py:decode",),
        "flip": ("functional.py:hflip",),
        "to float32": ("functional.py:pil_to_tensor", "functional.py:convert_image_dtype"),
    }
    | MODEL,
    "torchvision, v2": {
        "decode": ("loader.py:decode",),
        "flip, to float32, check boxes": ("loader.py:transform_v2",),
    }
    | MODEL,
}
"""Stages of each variant. The time of a stage is the sum over its functions (file:name); a leading - subtracts."""


class Boxwright:
    """Boxwright's training loader, in this process."""

    def __init__(self, dataset: IndexedDataset, *, worker: bool = False, normalized: bool = False) -> None:
        loader = TrainingLoader(
            dataset,
            augmentation=Augmentation(resize=Resize(SHORT, LONG), flip=0.5),
            batch_size=BATCH_SIZE,
            seed=0,
            num_workers=0,
        )
        self.batches = loader.batches()
        self.worker, self.normalized = worker, normalized
        self.normalizer = PixelNormalizer(PYTORCH)

    def __call__(self) -> None:
        """Build one batch."""
        with patch("boxwright.data.collate.get_worker_info", lambda: self.worker or None):
            batch = next(self.batches)
        if self.worker:  # torch's workers pass tensors to the main process in shared memory
            map_tensors(batch, share_memory_)
        if self.normalized:
            normalize(self.normalizer, batch.images, batch.image_sizes)


def share_memory_(tensor: Tensor) -> Tensor:
    """Move a tensor to shared memory."""
    return tensor.share_memory_()


def normalize(normalizer: PixelNormalizer, images: Tensor, image_sizes: Tensor) -> Tensor:
    """The first step of every detector; a function so that the profiler can attribute its time."""
    return normalizer(images, image_sizes)


class Torchvision:
    """torchvision's pipeline: references/detection (presets.DetectionPresetTrain, hflip) and the models' transform."""

    def __init__(self, dataset: IndexedDataset, transform: Callable[[Image.Image, dict], tuple[Tensor, dict]]) -> None:
        objects = [dataset.index.objects(int(row)) for row in dataset.rows]
        # Boxes are read in advance, since parsing annotations is not measured.
        self.samples = [
            (
                dataset.images / dataset.index.file_name(int(row)),
                torch.tensor(dataset.index.boxes[rows]),
                torch.tensor(dataset.index.labels[rows].astype(np.int64)),
            )
            for row, rows in zip(dataset.rows, objects, strict=True)
        ]
        self.transform = transform
        mean, std = ([value / 255 for value in values] for values in (PYTORCH.mean, PYTORCH.std))
        self.model_transform = GeneralizedRCNNTransform(SHORT, LONG, mean, std)
        self.order = self._order(dataset.image_sizes)

    def _order(self, sizes: np.ndarray) -> Iterator[int]:
        """Indices grouped by shape, which avoids padding in the same way as torchvision's GroupedBatchSampler."""
        order = np.argsort(sizes[:, 0], kind="stable").tolist()
        while True:
            yield from order

    def __call__(self) -> None:
        """Build one batch."""
        images, targets = [], []
        for index in islice(self.order, BATCH_SIZE):
            path, boxes, labels = self.samples[index]
            image, target = self.transform(decode(path), {"boxes": boxes, "labels": labels})
            images.append(image)
            targets.append(target)
        self.model_transform(images, targets)


def decode(path: Path) -> Image.Image:
    """Open an image as torchvision's CocoDetection does."""
    return Image.open(path).convert("RGB")


def transform_v1(image: Image.Image, target: dict) -> tuple[Tensor, dict]:
    """RandomHorizontalFlip, PILToTensor and ToDtype of transforms.py in references/detection."""
    if torch.rand(1) < 0.5:
        image = v1.hflip(image)
        target["boxes"] = target["boxes"].clone()
        target["boxes"][:, [0, 2]] = image.width - target["boxes"][:, [2, 0]]
    return v1.convert_image_dtype(v1.pil_to_tensor(image)), target


_PRESET_V2 = v2.Compose(
    [
        v2.ToImage(),
        v2.RandomHorizontalFlip(0.5),
        v2.ToDtype(torch.float32, scale=True),
        v2.ConvertBoundingBoxFormat(tv_tensors.BoundingBoxFormat.XYXY),
        v2.SanitizeBoundingBoxes(),
        v2.ToPureTensor(),
    ]
)


def transform_v2(image: Image.Image, target: dict) -> tuple[Tensor, dict]:
    """The same preset with torchvision.transforms.v2."""
    boxes = tv_tensors.BoundingBoxes(
        target["boxes"], format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=(image.height, image.width)
    )
    return _PRESET_V2(image, target | {"boxes": boxes})


def profile(build: Callable[[], None], stages: Stages, num_batches: int) -> None:
    """Print the processor time of each stage per image."""
    profiler = cProfile.Profile(time.process_time)
    profiler.enable()
    for _ in range(num_batches):
        build()
    profiler.disable()
    spent: dict[str, float] = {}
    for (file, _, name), (_, _, _, seconds, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        function = f"{Path(file).name}:{name}"
        spent[function] = spent.get(function, 0.0) + seconds
    milliseconds = 1000 / (num_batches * BATCH_SIZE)
    for stage, names in stages.items():
        total = sum(-spent[name[1:]] if name.startswith("-") else spent[name] for name in names)
        print(f"| | {stage} | {total * milliseconds:.2f} |")


def main() -> None:
    """Measure all variants and print tables of their rates and stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with COCO images and annotations")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--num-batches", type=int, default=16, help="batches per variant and round (default: 16)")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    split = find_layout(arguments.data)["train"]
    dataset = IndexedDataset(split.annotations, split.images)
    dataset.rows = dataset.rows[(np.sort(dataset.image_sizes, axis=1) == (480, 640)).all(axis=1)]

    systems: dict[str, Callable[[], None]] = {
        "boxwright": Boxwright(dataset),
        "boxwright, in a worker": Boxwright(dataset, worker=True),
        "boxwright, to float32": Boxwright(dataset, normalized=True),
        "torchvision": Torchvision(dataset, transform_v1),
        "torchvision, v2": Torchvision(dataset, transform_v2),
    }
    times: dict[str, list[float]] = {name: [] for name in systems}
    for round_index in range(-1, arguments.rounds):
        for name, build in systems.items():
            start = time.process_time()
            for _ in range(arguments.num_batches):
                build()
            if round_index >= 0:  # round -1 is the warm-up
                times[name].append((time.process_time() - start) / arguments.num_batches / BATCH_SIZE)

    packages = ["opencv-python-headless", "torch", "torchvision", "pillow"]
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{package} {version(package)}" for package in packages))
    print(f"{len(dataset)} images, batch size {BATCH_SIZE}, {arguments.rounds} rounds, ", end="")
    print(f"{arguments.num_batches} batches per round\n")
    print("| variant | ms/image | images/s on one core | rate / torchvision's |\n| --- | --- | --- | --- |")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(theirs / ours for theirs, ours in zip(times["torchvision"], seconds, strict=True))
        rate = f"{1 / median:.0f} ({1 / max(seconds):.0f}-{1 / min(seconds):.0f})"
        print(f"| {name} | {median * 1000:.2f} | {rate} | {ratio:.2f} |")
    print("\n| variant | stage | ms/image |\n| --- | --- | --- |")
    for name, build in systems.items():
        print(f"| {name} | | |")
        profile(build, STAGES[name], arguments.num_batches)


if __name__ == "__main__":
    main()
