"""Loaders that plan the batches of training and of evaluation; `workers.py` has them built in worker processes."""

from __future__ import annotations

import itertools
import multiprocessing
import warnings
from collections.abc import Generator, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np

from boxwright.checks import check_choice, check_count, check_number
from boxwright.data.augment import Augment
from boxwright.data.augmentation import Augmentation
from boxwright.data.batch_builder import BatchBuilder
from boxwright.data.buckets import Resize, Scale, plan_buckets, round_up
from boxwright.data.collate import slots_for
from boxwright.data.dataset import Dataset, DatasetInfo
from boxwright.data.proposals import ProposalFile
from boxwright.data.sampler import Step, TrainingSampler, group
from boxwright.data.workers import iterate_batches
from boxwright.structures import Batch


class TrainingLoader:
    """Endless augmented batches; each depends only on seed, step, rank and number of ranks.

    The batches of all ranks of a step, joined, are the same for any number of ranks, as long as all ranks together take
    the same number of images. All ranks' batches of a step have the same canvas.

    Transforms of torchvision v2 or albumentations plug in through `Augmentation.transform`, a function of one sample as
    it is in the file, before resizing. It must keep the image's height and width; boxes may move or vanish. The global
    generators of torch, numpy and random are seeded for each image, so that its random numbers are repeatable::

        from dataclasses import replace

        import torch
        from torchvision.transforms import v2

        blur = v2.RandomApply([v2.GaussianBlur(5)], p=0.2)

        def transform(sample: Sample) -> Sample:
            image = blur(torch.from_numpy(sample.image).permute(2, 0, 1))
            return replace(sample, image=image.permute(1, 2, 0).numpy())

        TrainingLoader(dataset, augmentation=Augmentation(transform=transform), ...)

    Define it in a module rather than inside a function where workers start by "spawn", which pickles it.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        augmentation: Augmentation | None = None,
        batch_size: int,
        proposals: ProposalFile | None = None,
        masks: bool = False,
        seed: int,
        num_workers: int,
        rank: int = 0,
        world_size: int = 1,
        start_method: str | None = None,
        **deprecated: Any,
    ) -> None:
        """Plan the batches of one rank.

        Args:
            dataset: Training images with their annotations.
            augmentation: Size and augmentation of the images; None for `Augmentation()`.
            batch_size: Images per step on this rank.
            proposals: Boxes that every batch carries. They follow the geometric augmentation, but not `transform`.
            masks: Whether targets hold masks, which cost time and memory.
            seed: Of the run.
            num_workers: Processes that build batches; 0 builds them in this one.
            rank: Of this process among those that train together.
            world_size: Number of processes that train together.
            start_method: "fork", "spawn" or "forkserver"; None for the platform's own.
            **deprecated: The fields of `Augmentation`, which were arguments of their own before.

        Raises:
            ValueError: An image has no row among the proposals, or a setting is out of range.
        """
        unknown = set(deprecated) - {field.name for field in fields(Augmentation)}
        if unknown:
            raise TypeError(f"TrainingLoader() got an unexpected keyword argument {min(unknown)!r}")
        if deprecated:
            names = ", ".join(f"{name}=..." for name in sorted(deprecated))
            warnings.warn(
                f"TrainingLoader({names}) is deprecated: use TrainingLoader(augmentation=Augmentation(...))",
                DeprecationWarning,
                stacklevel=2,
            )
        augmentation = replace(augmentation or Augmentation(), **deprecated)
        _check_processes(batch_size, num_workers, rank, world_size, start_method)
        info = _describe(dataset)
        if proposals is not None:
            proposals.require(info.image_ids)
        if masks:
            _require_masks(info)
        scales = augmentation.plan()
        buckets, canvases = plan_buckets(scales, info.image_sizes)
        num_sizes = [scale.high.short - scale.low.short + 1 for scale in scales]
        self._sampler = TrainingSampler(
            buckets, canvases, batch_size=batch_size * world_size, seed=seed, weights=num_sizes
        )
        self._builder = BatchBuilder(
            dataset=dataset,
            scales=scales,
            augment=augmentation.geometric(),
            photometric=augmentation.photometric,
            transform=augmentation.transform,
            proposals=proposals,
            seed=seed,
            slots=slots_for(info.max_objects),
            masks=masks,
        )
        self._rank, self._world_size = rank, world_size
        self._num_workers, self._start_method = num_workers, start_method
        self.steps_per_epoch = self._sampler.steps_per_epoch
        """Number of steps that show every image, the same in each epoch."""
        self.num_canvases = len({canvas for scales_of_bucket in canvases for canvas in scales_of_bucket})
        """Number of canvas shapes that batches have."""

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches from a step on, without end. Closing the generator ends its workers."""
        steps = (self._sampler.step(step).share(self._rank, self._world_size) for step in itertools.count(start_step))
        return iterate_batches(self._builder, steps, self._num_workers, self._start_method)


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
        _check_processes(batch_size, num_workers, rank, world_size, start_method)
        info = _describe(dataset)
        if proposals is not None:
            proposals.require(info.image_ids)
        if (resize is None) != native:
            raise ValueError("give either resize or native=True")
        original_sizes = info.image_sizes
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
        self._builder = BatchBuilder(dataset=dataset, scales=scales, augment=augment, proposals=proposals, seed=0)
        self._num_workers, self._start_method = num_workers, start_method

    def __len__(self) -> int:
        """The number of this rank's batches."""
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches, the same in each pass."""
        return iterate_batches(self._builder, self._steps, self._num_workers, self._start_method)


def _check_processes(batch_size: int, num_workers: int, rank: int, world_size: int, start_method: str | None) -> None:
    check_count("batch_size", batch_size)
    check_count("num_workers", num_workers, least=0)
    check_count("world_size", world_size)
    check_number("rank", rank, 0, world_size - 1)
    if start_method is not None:
        check_choice("start_method", start_method, multiprocessing.get_all_start_methods())


def _describe(dataset: Dataset) -> DatasetInfo:
    if len(dataset) == 0:
        raise ValueError("the data set holds no pictures")
    return DatasetInfo(dataset)


def _require_masks(info: DatasetInfo) -> None:
    if not info.has_masks:
        raise ValueError(
            f"{info.source}: no object has a mask, but this model is trained on masks: add them (`segmentation` in a "
            "COCO file), or train a model without a mask head"
        )
