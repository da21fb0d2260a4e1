"""What is measured on: pictures with objects, generated or from a data set, and the batches made of them."""

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
from boxwright.data.proposals import GivenProposals, ProposalFile, write_proposals
from boxwright.data.shapes import draw_picture
from boxwright.structures import Batch
from boxwright.training.experiment import Experiment

NUM_CLASSES = 80
"""As many as COCO has."""
NUM_PICTURES = 1024
"""Of the generated data set, enough for every phase to go on without starting anew."""
_NUM_DRAWN = 16
NUM_BATCHES = 4
"""Batches that are kept in memory and taken in turns."""
_LONG_SIDE = 640
_QUALITY = 95


class GeneratedPictures:
    """A data set of coloured shapes in JPEG files, as large as COCO's; the same at every call.

    Few are drawn and come again and again, each time as another picture.
    """

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        """Draw pictures of `size`, (height, width), into a folder."""
        height, width = size
        self.categories = [Category(number + 1, f"class {number + 1}") for number in range(NUM_CLASSES)]
        self.image_sizes = np.tile(np.array(size, np.int64), (NUM_PICTURES, 1))
        self.image_ids = np.arange(NUM_PICTURES, dtype=np.int64) + 1
        self._files = [folder / f"{index:06d}.jpg" for index in range(_NUM_DRAWN)]
        self._labels: list[np.ndarray] = []
        self._polygons: list[list[np.ndarray]] = []
        for index in range(_NUM_DRAWN):
            image, shapes = draw_picture(0, 0, index)
            factors = np.array([width / image.shape[1], height / image.shape[0]])
            drawn = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            written, data = cv2.imencode(".jpg", drawn[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
            assert written
            self._files[index].write_bytes(data.tobytes())
            labels = [(kind + 3 * (index + number)) % NUM_CLASSES for number, (kind, _) in enumerate(shapes)]
            self._labels.append(np.array(labels, np.int64))
            self._polygons.append([polygon * factors for _, polygon in shapes])
        counts = [len(labels) for labels in self._labels]
        self.max_objects, self.num_masks = max(counts), sum(counts) * NUM_PICTURES // _NUM_DRAWN

    def __len__(self) -> int:
        """The number of pictures."""
        return NUM_PICTURES

    def __getitem__(self, position: int, /) -> Sample:
        """Decode a picture."""
        drawn = position % _NUM_DRAWN
        polygons = self._polygons[drawn]
        boxes = np.array([[*polygon.min(0), *polygon.max(0)] for polygon in polygons], np.float32)
        return Sample(
            image=decode_image(self._files[drawn]),
            image_id=position + 1,
            file_name=self._files[drawn].name,
            boxes=boxes,
            labels=self._labels[drawn],
            crowd=np.zeros(len(boxes), bool),
            object_ids=np.arange(len(boxes)),
            masks=[[polygon] for polygon in polygons],
        )


@contextmanager
def open_pictures(plan: Plan) -> Iterator[Dataset]:
    """The pictures of a plan; generated ones are there until the context ends.

    Raises:
        ValueError: its folder holds no data set.
    """
    if plan.data:
        layout = find_layout(Path(plan.data))
        yield IndexedDataset(*(layout["train"] if "train" in layout else next(iter(layout.values()))))
        return
    height, width = plan.size or (3 * _LONG_SIDE // 4, _LONG_SIDE)
    factor = _LONG_SIDE / max(height, width)
    with TemporaryDirectory() as folder:
        yield GeneratedPictures(Path(folder), (round(height * factor), round(width * factor)))


@contextmanager
def given_proposals(dataset: Dataset, experiment: Experiment, needed: bool) -> Iterator[ProposalFile | None]:
    """Random boxes as proposals, for a detector that needs them; None for any other."""
    if not needed:
        yield None
        return
    info = DatasetInfo(dataset)
    count = experiment.given_proposals
    with TemporaryDirectory() as folder:
        path = Path(folder) / "random.proposals"
        page = {"splits": [{"name": "all", "images": len(dataset)}]}
        write_proposals(
            path,
            image_ids=info.image_ids,
            counts=[count] * len(dataset),
            images=(_random_boxes(size, count) for size in info.image_sizes),
            page=page,
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
    """The loader that a training run of the experiment would have."""
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
    """The loader that `boxwright test` would have."""
    return EvaluationLoader(
        dataset,
        batch_size=plan.batch_size(experiment, training=False),
        resize=experiment.resize,
        proposals=proposals,
        num_workers=num_workers,
    )


def kept_batches(
    plan: Plan,
    experiment: Experiment,
    dataset: Dataset,
    *,
    training: bool,
    masks: bool,
    proposals: ProposalFile | None,
) -> Sequence[Batch]:
    """A few batches, built beforehand."""
    if training:
        batches: Iterator[Batch] = training_loader(
            plan, experiment, dataset, masks=masks, proposals=proposals, num_workers=0
        ).batches()
    else:
        batches = iter(inference_loader(plan, experiment, dataset, proposals=proposals, num_workers=0))
    return list(islice(batches, NUM_BATCHES))


def _random_boxes(size: np.ndarray, count: int) -> GivenProposals:
    """Boxes of any size and place in a picture of `size`, (height, width)."""
    rng = np.random.Generator(np.random.PCG64(0))
    limits = np.array([size[1], size[0]], np.float64)
    sides = 16 * (limits / 16) ** rng.random((count, 2))
    corners = rng.random((count, 2)) * (limits - sides)
    boxes = np.concatenate([corners, corners + sides], 1).astype(np.float32)
    return GivenProposals(boxes, np.linspace(1, 0, count, dtype=np.float32))
