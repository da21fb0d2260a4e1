"""Inputs of the benchmarks: a generated or given dataset, random proposals, loaders and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np

from boxwright.benchmark.plan import Plan
from boxwright.data.dataset import Category, Dataset, DatasetInfo, Sample
from boxwright.data.decode import decode_image
from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.loader import EvaluationLoader, TrainingLoader
from boxwright.data.proposals import ImageProposals, ProposalFile, write_proposals
from boxwright.data.shapes import draw_image
from boxwright.structures import Batch
from boxwright.training.experiment import Experiment

NUM_CLASSES = 80
"""The number of classes of COCO."""
NUM_IMAGES = 1024
"""Length of the generated dataset, large enough that a phase with the default iterations stays within one epoch."""
_NUM_FILES = 16
NUM_BATCHES = 4
"""Number of batches that are kept in memory and used in rotation."""
_LONG_SIDE = 640
_JPEG_QUALITY = 95


class GeneratedDataset:
    """A dataset of coloured shapes in JPEG files, identical on every call.

    Only `_NUM_FILES` files are written. They repeat under different image ids.
    """

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        """Write images of `size`, (height, width), into a folder."""
        height, width = size
        self.categories = [Category(label + 1, f"class {label + 1}") for label in range(NUM_CLASSES)]
        self.image_sizes = np.tile(np.array(size, np.int64), (NUM_IMAGES, 1))
        self.image_ids = np.arange(NUM_IMAGES, dtype=np.int64) + 1
        self._files = [folder / f"{index:06d}.jpg" for index in range(_NUM_FILES)]
        self._labels: list[np.ndarray] = []
        self._polygons: list[list[np.ndarray]] = []
        for index in range(_NUM_FILES):
            image, shapes = draw_image(0, 0, index)
            scale = np.array([width / image.shape[1], height / image.shape[0]])
            resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            encoded, data = cv2.imencode(".jpg", resized[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            assert encoded
            self._files[index].write_bytes(data.tobytes())
            labels = [(label + 3 * (index + position)) % NUM_CLASSES for position, (label, _) in enumerate(shapes)]
            self._labels.append(np.array(labels, np.int64))
            self._polygons.append([polygon * scale for _, polygon in shapes])
        counts = [len(labels) for labels in self._labels]
        self.max_objects, self.num_masks = max(counts), sum(counts) * NUM_IMAGES // _NUM_FILES

    def __len__(self) -> int:
        """Number of images."""
        return NUM_IMAGES

    def __getitem__(self, position: int, /) -> Sample:
        """Decode an image."""
        file_index = position % _NUM_FILES
        polygons = self._polygons[file_index]
        boxes = np.array([[*polygon.min(0), *polygon.max(0)] for polygon in polygons], np.float32)
        return Sample(
            image=decode_image(self._files[file_index]),
            image_id=position + 1,
            file_name=self._files[file_index].name,
            boxes=boxes,
            labels=self._labels[file_index],
            crowd=np.zeros(len(boxes), bool),
            object_ids=np.arange(len(boxes)),
            masks=[[polygon] for polygon in polygons],
        )


@contextmanager
def open_dataset(plan: Plan) -> Iterator[Dataset]:
    """Open the plan's dataset, or generate one in a temporary folder that exists until the context ends.

    Raises:
        ValueError: the plan's folder does not hold a dataset.
    """
    if plan.data:
        layout = find_layout(Path(plan.data))
        yield IndexedDataset(*(layout["train"] if "train" in layout else next(iter(layout.values()))))
        return
    height, width = plan.size or (3 * _LONG_SIDE // 4, _LONG_SIDE)
    scale = _LONG_SIDE / max(height, width)
    with TemporaryDirectory() as folder:
        yield GeneratedDataset(Path(folder), (round(height * scale), round(width * scale)))


@contextmanager
def random_proposals(dataset: Dataset, experiment: Experiment) -> Iterator[ProposalFile]:
    """Write a proposal file of random boxes, for detectors that are trained on precomputed proposals."""
    info = DatasetInfo(dataset)
    count = experiment.given_proposals
    with TemporaryDirectory() as folder:
        path = Path(folder) / "random.proposals"
        metadata = {"splits": [{"name": "all", "images": len(dataset)}]}
        write_proposals(
            path,
            image_ids=info.image_ids,
            counts=[count] * len(dataset),
            images=(_random_boxes(size, count) for size in info.image_sizes),
            metadata=metadata,
        )
        yield ProposalFile(path, limit=count)


def training_loader(
    plan: Plan,
    experiment: Experiment,
    dataset: Dataset,
    *,
    masks: bool,
    proposals: ProposalFile | None,
    num_workers: int,
) -> TrainingLoader:
    """Build the loader that `boxwright train` uses for the experiment."""
    return TrainingLoader(
        dataset,
        augmentation=experiment.augmentation,
        batch_size=plan.batch_size(experiment, training=True),
        proposals=proposals,
        masks=masks,
        seed=experiment.seed,
        num_workers=num_workers,
    )


def inference_loader(
    plan: Plan, experiment: Experiment, dataset: Dataset, *, proposals: ProposalFile | None, num_workers: int
) -> EvaluationLoader:
    """Build the loader that `boxwright test` uses for the experiment."""
    return EvaluationLoader(
        dataset,
        batch_size=plan.batch_size(experiment, training=False),
        resize=experiment.resize,
        proposals=proposals,
        num_workers=num_workers,
    )


def make_batches(
    plan: Plan,
    experiment: Experiment,
    dataset: Dataset,
    *,
    training: bool,
    masks: bool,
    proposals: ProposalFile | None,
) -> Sequence[Batch]:
    """Build `NUM_BATCHES` batches in this process."""
    if training:
        batches: Iterator[Batch] = training_loader(
            plan, experiment, dataset, masks=masks, proposals=proposals, num_workers=0
        ).batches()
    else:
        batches = iter(inference_loader(plan, experiment, dataset, proposals=proposals, num_workers=0))
    return list(islice(batches, NUM_BATCHES))


def _random_boxes(size: np.ndarray, count: int) -> ImageProposals:
    """Boxes with random positions and log-uniform sides from 16 pixels, in an image of `size`, (height, width)."""
    rng = np.random.Generator(np.random.PCG64(0))
    image_size = np.array([size[1], size[0]], np.float64)
    box_sizes = 16 * (image_size / 16) ** rng.random((count, 2))
    corners = rng.random((count, 2)) * (image_size - box_sizes)
    boxes = np.concatenate([corners, corners + box_sizes], 1).astype(np.float32)
    return ImageProposals(boxes, np.linspace(1, 0, count, dtype=np.float32))
