"""Batches for training and for testing, built by worker processes.

One worker builds one whole batch, and gets nothing for it but its step: an epoch, a canvas and the pictures' positions.
What a worker holds is therefore the data set, which its processes share, and the batch in hand.
"""

from __future__ import annotations

import itertools
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from boxwright import structures
from boxwright.data.augment import Augment, Photometric, seeded
from boxwright.data.buckets import Resize, Scale, ScaleMode, plan_buckets, plan_scales, round_up
from boxwright.data.collate import PlacedSample, collate, slots_for
from boxwright.data.dataset import Dataset, Sample
from boxwright.data.proposals import ProposalFile
from boxwright.data.sampler import Step, TrainingSampler, group, image_seed
from boxwright.structures import Batch


class TrainingLoader:
    """Endless augmented batches, of which each depends on seed, step, rank and number of ranks alone.

    The ranks' batches of a step, joined, are the same for any number of ranks, so long as all of them together take
    the same number of pictures. All ranks' batches of a step have the same canvas.

    Transforms of torchvision v2 or albumentations plug in through `transform`, which gets and gives one sample as it
    is in the file, before it is resized. It must keep the picture's height and width; boxes may move or vanish.
    torch's, numpy's and random's global generators are seeded for each picture, so that what it draws is repeatable::

        from dataclasses import replace

        import torch
        from torchvision.transforms import v2

        blur = v2.RandomApply([v2.GaussianBlur(5)], p=0.2)

        def transform(sample: Sample) -> Sample:
            image = blur(torch.from_numpy(sample.image).permute(2, 0, 1))
            return replace(sample, image=image.permute(1, 2, 0).numpy())

        TrainingLoader(dataset, ..., transform=transform)

    Define it in a module rather than inside a function where workers start by "spawn", which pickles it.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        resize: Resize,
        scales: Sequence[tuple[int, int]] | None = None,
        scale_mode: ScaleMode = "list",
        flip: float = 0.5,
        scale_jitter: tuple[float, float] | None = None,
        crop: float | None = None,
        photometric: Photometric | None = None,
        transform: Callable[[Sample], Sample] | None = None,
        proposals: ProposalFile | None = None,
        masks: bool = False,
        seed: int,
        num_workers: int,
        rank: int = 0,
        world_size: int = 1,
        start_method: str | None = None,
    ) -> None:
        """Plan the batches of one rank.

        Args:
            dataset: the pictures.
            batch_size: pictures of this rank a step.
            resize: the size that pictures get before jitter.
            scales: sizes in place of `resize`, of which each step draws one for all ranks.
            scale_mode: whether these are all there are, or the two ends of a range (see `plan_scales`).
            flip: probability of swapping left and right.
            scale_jitter: least and largest factor on that size, see `Augment`.
            crop: least share of each side that is kept, see `Augment`.
            photometric: changes of colour; None for none.
            transform: changes a sample before anything else does.
            proposals: boxes that every batch brings with it. They follow what the loader does to a picture; what
                `transform` moves they do not.
            masks: whether targets hold masks, which cost time and memory.
            seed: of the run.
            num_workers: processes that build batches; 0 builds them in this one.
            rank: of this process among those that train together.
            world_size: how many processes train together.
            start_method: "fork", "spawn" or "forkserver"; None takes the platform's own.

        Raises:
            ValueError: an image has no row among the proposals, or a number is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        if proposals is not None:
            proposals.require(_image_ids(dataset))
        if masks:
            _require_masks(dataset)
        original_sizes, max_objects = _measure(dataset)
        planned = [Scale(resize, resize)] if scales is None else plan_scales(scales, scale_mode)
        buckets, canvases = plan_buckets(planned, original_sizes)
        num_sizes = [scale.high.short - scale.low.short + 1 for scale in planned]
        self._sampler = TrainingSampler(
            buckets, canvases, batch_size=batch_size * world_size, seed=seed, weights=num_sizes
        )
        self._builder = _Builder(
            dataset=dataset,
            scales=planned,
            augment=Augment(flip=flip, scale_jitter=scale_jitter, crop=crop),
            photometric=photometric,
            transform=transform,
            proposals=proposals,
            seed=seed,
            slots=slots_for(max_objects),
            masks=masks,
        )
        self._rank, self._world_size = rank, world_size
        self._num_workers, self._start_method = num_workers, start_method
        self.steps_per_epoch = self._sampler.steps_per_epoch
        """Steps until every picture was seen, the same in each epoch."""
        self.num_canvases = len({canvas for scales_of_bucket in canvases for canvas in scales_of_bucket})
        """Number of canvas shapes that batches have."""

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches from a step on, without end. Closing the iterator ends its workers."""
        steps = (self._sampler.step(step).share(self._rank, self._world_size) for step in itertools.count(start_step))
        return _batches(self._builder, steps, self._num_workers, self._start_method)


class EvaluationLoader:
    """Every picture once, over all ranks together, without targets or chance.

    Pictures of one bucket come together, whatever their order in the data set. The last batch of a bucket may be
    short, and ranks may differ by one batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        resize: Resize | None = None,
        native: bool = False,
        flipped: bool = False,
        proposals: ProposalFile | None = None,
        num_workers: int,
        rank: int = 0,
        world_size: int = 1,
        start_method: str | None = None,
    ) -> None:
        """Plan the batches of one rank.

        Args:
            dataset: the pictures.
            batch_size: most pictures in a batch.
            resize: the size that pictures get; leave it out with `native`.
            native: keep the pictures' own sizes, padded to the next multiple of 32.
            flipped: swap left and right in all of them.
            proposals: boxes that every batch brings with it.
            num_workers: processes that build batches; 0 builds them in this one.
            rank: of this process among those that test together.
            world_size: how many processes test together.
            start_method: "fork", "spawn" or "forkserver"; None takes the platform's own.

        Raises:
            ValueError: an image has no row among the proposals, or `resize` and `native` contradict each other.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        if proposals is not None:
            proposals.require(_image_ids(dataset))
        if (resize is None) != native:
            raise ValueError("give either resize or native=True")
        original_sizes, _ = _measure(dataset, objects=False)
        order = np.arange(len(original_sizes))
        if resize is not None:
            scales = [Scale(resize, resize)]
            buckets, canvases = plan_buckets(scales, original_sizes)
            batches = group(order, buckets, canvases, batch_size)
        else:
            scales = []
            own = [(round_up(int(height)), round_up(int(width))) for height, width in original_sizes]
            canvases = [(canvas,) for canvas in sorted(set(own))]
            buckets = np.array([canvases.index((canvas,)) for canvas in own])
            # Pictures of other shapes stay apart: native means no more padding than must be.
            batches = [
                batch
                for k in range(len(canvases))
                for batch in group(order[buckets == k], buckets, canvases, batch_size)
            ]
        self._steps = [Step(0, canvases[bucket][0], indices) for bucket, indices in batches][rank::world_size]
        augment = Augment(flip=float(flipped))
        self._builder = _Builder(dataset=dataset, scales=scales, augment=augment, proposals=proposals, seed=0)
        self._num_workers, self._start_method = num_workers, start_method

    def __len__(self) -> int:
        """The number of this rank's batches."""
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches, the same in each pass."""
        return _batches(self._builder, self._steps, self._num_workers, self._start_method)


@dataclass(frozen=True)
class _Builder(TorchDataset[Batch]):
    """Builds the batch of a step; what a worker process gets once, when it starts."""

    dataset: Dataset
    scales: Sequence[Scale]
    """What a step's number of a scale stands for; none: pictures keep their own sizes."""
    augment: Augment
    seed: int
    photometric: Photometric | None = None
    transform: Callable[[Sample], Sample] | None = None
    proposals: ProposalFile | None = None
    slots: int | None = None
    masks: bool = False

    def __getitem__(self, step: Step) -> Batch:
        placed = (self._placed_sample(int(index), step) for index in step.indices)
        proposal_slots = None if self.proposals is None else self.proposals.slots
        return collate(placed, len(step.indices), step.canvas, self.slots, proposal_slots, masks=self.masks)

    def _placed_sample(self, index: int, step: Step) -> PlacedSample:
        seed = image_seed(self.seed, step.epoch, index)
        rng = np.random.Generator(np.random.Philox(seed))
        sample = self.dataset[index]
        height, width = sample.image.shape[:2]
        resize = self.scales[step.scale].draw(seed) if self.scales else None
        placement = self.augment.draw((height, width), resize, rng)
        if self.transform is not None:
            with seeded(seed):
                sample = self.transform(sample)
            if sample.image.shape != (height, width, 3):
                raise ValueError(
                    f"{sample.file_name}: the transform made a picture of shape {sample.image.shape} from one of "
                    f"{(height, width, 3)}: it must keep the shape, resizing and cropping are the loader's"
                )
        if self.photometric is not None:
            sample = replace(sample, image=self.photometric(sample.image, rng))
        given = None if self.proposals is None else self.proposals.of(sample.image_id, (height, width))
        return PlacedSample(sample, placement, seed, given)


@dataclass(frozen=True)
class _Parcel:
    """What a worker sends: a batch, or why there is none."""

    batch: Batch | None = None
    fault: str = ""
    trace: str = ""

    def pin_memory(self) -> _Parcel:
        """Called by torch's pinning thread."""
        return self if self.batch is None else _Parcel(structures.pin_memory(self.batch))


@dataclass(frozen=True)
class _ParcelBuilder(TorchDataset[_Parcel]):
    """Turns a user's fault in a worker into a parcel, because torch would bury its message under a traceback."""

    builder: _Builder

    def __getitem__(self, step: Step) -> _Parcel:
        try:
            return _Parcel(self.builder[step])
        except (ValueError, OSError) as error:
            return _Parcel(fault=str(error), trace=traceback.format_exc())


def _batches(
    builder: _Builder, steps: Iterable[Step], num_workers: int, start_method: str | None
) -> Generator[Batch, None, None]:
    loader: DataLoader[Any] = DataLoader(
        _ParcelBuilder(builder),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        multiprocessing_context=start_method if num_workers else None,
        # Its own generator, because torch draws the workers' seeds from it and the run's must not notice.
        generator=torch.Generator(),
    )
    for parcel in loader:
        if parcel.batch is None:
            raise ValueError(parcel.fault) from RuntimeError(f"while a batch was built:\n{parcel.trace}")
        yield parcel.batch


def _as_it_is(parcel: Any) -> Any:
    return parcel


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process saves first and then ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _image_ids(dataset: Dataset) -> np.ndarray:
    """The pictures' ids [N], by a pass over the samples where not stated."""
    ids = getattr(dataset, "image_ids", None)
    return np.array([dataset[index].image_id for index in range(len(dataset))] if ids is None else ids, np.int64)


def _measure(dataset: Dataset, *, objects: bool = True) -> tuple[np.ndarray, int]:
    """The pictures' sizes [N, 2] and the objects of the fullest one, by a pass over the samples where not stated."""
    if len(dataset) == 0:
        raise ValueError("the data set holds no pictures")
    sizes, most = getattr(dataset, "image_sizes", None), getattr(dataset, "max_objects", None)
    if sizes is None or (most is None and objects):
        facts = [
            (sample.image.shape[:2], len(sample.boxes)) for sample in map(dataset.__getitem__, range(len(dataset)))
        ]
        sizes, most = [size for size, _ in facts], max(count for _, count in facts)
    return np.asarray(sizes, dtype=np.int64), int(most or 0)


def _require_masks(dataset: Dataset) -> None:
    """Check that there are masks to learn, by a look at the samples up to the first one where it is not stated."""
    known = getattr(dataset, "num_masks", None)
    if known is None:
        samples = (dataset[position] for position in range(len(dataset)))
        known = any(mask is not None for sample in samples for mask in sample.masks or ())
    if not known:
        parts = getattr(dataset, "parts", [dataset])
        names = ", ".join(str(getattr(part, "annotations", type(part).__name__)) for part in parts)
        raise ValueError(
            f"{names}: no object has a mask, which this model learns "
            "besides boxes: add them (`segmentation` in a COCO file), or train a model of boxes alone"
        )
