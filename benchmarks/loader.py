"""Training batches made on one core: ours beside those of torchvision's reference scripts, of the same files.

    python benchmarks/loader.py ../shared/data/coco_mini

JPEG files of 640 x 480 and 480 x 640 pixels become batches of short side 800, flipped with probability 0.5, boxes with
them, no masks. torchvision's references/detection decode with Pillow, flip, and make float32; its models then
normalise, resize and pad (`GeneralizedRCNNTransform`, called as it is installed). Our batch is uint8, which the
detector normalises on its device: one row does that on this core, too. Another builds the batch as a worker does, in
shared memory.

All take turns within each round. A time is processor time of the whole process, with one thread, so that other work on
the machine counts as little as can be; images/s are for one core kept busy. A figure is the median over the rounds. The
stages come from a pass of their own under the profiler; files are in the system's cache.
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
    "the sample apart from that": ("batch_builder.py:_placed_sample", "-decode.py:decode_image"),
    "resize and flip": ("augment.py:place_image",),
    "the rest of collating": ("collate.py:collate", "-batch_builder.py:_placed_sample", "-augment.py:place_image"),
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
"""What each way spends its time on: functions as file:name, less those in them that are told apart."""


class Ours:
    """The training loader, in this process, over and over."""

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
        if self.worker:  # as torch does to hand it over
            map_tensors(batch, share_memory_)
        if self.normalized:
            normalize(self.normalizer, batch.images, batch.image_sizes)


def share_memory_(tensor: Tensor) -> Tensor:
    """Move a tensor to shared memory."""
    return tensor.share_memory_()


def normalize(normalizer: PixelNormalizer, images: Tensor, image_sizes: Tensor) -> Tensor:
    """What every detector does first."""
    return normalizer(images, image_sizes)


class Torchvision:
    """The pipeline of references/detection (presets.DetectionPresetTrain with hflip) and of the detectors."""

    def __init__(self, dataset: IndexedDataset, transform: Callable[[Image.Image, dict], tuple[Tensor, dict]]) -> None:
        objects = [dataset.index.objects(int(row)) for row in dataset.rows]
        # Boxes are read beforehand: parsing annotations is not what is measured.
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
        """Pictures of one shape after another, which spares the padding that its own sampler spares, too."""
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
    """Open a picture as torchvision's CocoDetection does."""
    return Image.open(path).convert("RGB")


def transform_v1(image: Image.Image, target: dict) -> tuple[Tensor, dict]:
    """RandomHorizontalFlip, PILToTensor and ToDtype of the reference scripts' own transforms.py."""
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
    """The same preset made of transforms.v2, on tensors."""
    boxes = tv_tensors.BoundingBoxes(
        target["boxes"], format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=(image.height, image.width)
    )
    return _PRESET_V2(image, target | {"boxes": boxes})


def profile(build: Callable[[], None], stages: Stages, num_batches: int) -> None:
    """Print the processor time that each stage takes an image."""
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
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with COCO images and annotations")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--num-batches", type=int, default=16, help="of each in a round")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    split = find_layout(arguments.data)["train"]
    dataset = IndexedDataset(split.annotations, split.images)
    dataset.rows = dataset.rows[(np.sort(dataset.image_sizes, axis=1) == (480, 640)).all(axis=1)]

    systems: dict[str, Callable[[], None]] = {
        "boxwright": Ours(dataset),
        "boxwright, in a worker": Ours(dataset, worker=True),
        "boxwright, to float32": Ours(dataset, normalized=True),
        "torchvision": Torchvision(dataset, transform_v1),
        "torchvision, v2": Torchvision(dataset, transform_v2),
    }
    times: dict[str, list[float]] = {name: [] for name in systems}
    for measured in range(-1, arguments.rounds):
        for name, build in systems.items():
            start = time.process_time()
            for _ in range(arguments.num_batches):
                build()
            if measured >= 0:  # the first round warms up
                times[name].append((time.process_time() - start) / arguments.num_batches / BATCH_SIZE)

    packages = ["opencv-python-headless", "torch", "torchvision", "pillow"]
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{package} {version(package)}" for package in packages))
    print(f"{len(dataset)} pictures, batches of {BATCH_SIZE}, {arguments.rounds} rounds of {arguments.num_batches}\n")
    print("| way | ms an image | images/s on one core | times torchvision's rate |\n| --- | --- | --- | --- |")
    for name, each in times.items():
        middle = statistics.median(each)
        ratio = statistics.median(theirs / ours for theirs, ours in zip(times["torchvision"], each, strict=True))
        rate = f"{1 / middle:.0f} ({1 / max(each):.0f}-{1 / min(each):.0f})"
        print(f"| {name} | {middle * 1000:.2f} | {rate} | {ratio:.2f} |")
    print("\n| way | stage | ms an image |\n| --- | --- | --- |")
    for name, build in systems.items():
        print(f"| {name} | | |")
        profile(build, STAGES[name], arguments.num_batches)


if __name__ == "__main__":
    main()
