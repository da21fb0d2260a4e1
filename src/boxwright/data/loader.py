"""Loaders that plan the batches of training and evaluation; `workers.py` builds the batches in worker processes."""

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
    """An endless stream of augmented batches. A batch depends only on seed, step, rank and number of ranks.

    The batches of all ranks in a step have the same canvas. Concatenated, they do not depend on the number of ranks if
    the total batch size is the same.

    `Augmentation.transform` adds transforms of torchvision v2 or albumentations. It is a function of a sample before
    resizing, in pixels of the file. It must keep the height and width of the image; it may move and remove boxes. The
    global generators of torch, numpy and random are seeded for each image, so that results are repeatable::

        from dataclasses import replace

        import torch
        from torchvision.transforms import v2

        blur = v2.RandomApply([v2.GaussianBlur(5)], p=0.2)

        def transform(sample: Sample) -> Sample:
            image = blur(torch.from_numpy(sample.image).permute(2, 0, 1))
            return replace(sample, image=image.permute(1, 2, 0).numpy())

        TrainingLoader(dataset, augmentation=Augmentation(transform=transform), ...)

    The start method "spawn" pickles the transform, so define it in a module, not inside another function.
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
            proposals: Proposals to add to every batch. Geometric augmentation transforms them, `transform` does not.
            masks: Whether targets include masks, which cost time and memory.
            seed: Seed of the run.
            num_workers: Number of worker processes that build batches; 0 for the main process.
            rank: Rank of this process.
            world_size: Number of training processes.
            start_method: "fork", "spawn" or "forkserver"; None for the default of the platform.
            **deprecated: Fields of `Augmentation`, formerly arguments of this class.

        Raises:
            ValueError: An image has no proposals in the file, masks are missing, or a setting is out of range.
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
        """Number of steps in which every image occurs, the same in each epoch."""
        self.num_canvases = len({canvas for scales_of_bucket in canvases for canvas in scales_of_bucket})
        """Number of different canvas shapes."""

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Endless stream of batches from `start_step`. Closing the generator ends its workers."""
        steps = (self._sampler.step(step).share(self._rank, self._world_size) for step in itertools.count(start_step))
        return iterate_batches(self._builder, steps, self._num_workers, self._start_method)


class EvaluationLoader:
    """Batches that contain every image once, over all ranks, without targets and random augmentation.

    A batch contains images of one bucket, so images are not in the order of the data set. The last batch of a bucket
    may be smaller, and the number of batches per rank may differ by one.
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
            dataset: Images to evaluate.
            batch_size: Maximum number of images per batch.
            resize: Size of the images; None with `native`.
            native: Whether to keep the original image sizes, padded to multiples of 32.
            flipped: Whether to flip all images horizontally.
            proposals: Proposals to add to every batch.
            num_workers: Number of worker processes that build batches; 0 for the main process.
            rank: Rank of this process.
            world_size: Number of evaluation processes.
            start_method: "fork", "spawn" or "forkserver"; None for the default of the platform.

        Raises:
            ValueError: An image has no proposals in the file, or not exactly one of `resize` and `native` is set.
        """
        _check_processes(batch_size, num_workers, rank, world_size, start_method)
        info = _describe(dataset)
        if proposals is not None:
            proposals.require(info.image_ids)
        if (resize is None) != native:
            got = "neither" if resize is None else "both"
            raise ValueError(f"evaluation image size: expected either resize or native=True, got {got}")
        original_sizes = info.image_sizes
        order = np.arange(len(original_sizes))
        if resize is not None:
            scales = [Scale(resize, resize)]
            buckets, canvases = plan_buckets(scales, original_sizes)
            batches = group(order, buckets, canvases, batch_size)
        else:
            scales = []
            padded = [(round_up(int(height)), round_up(int(width))) for height, width in original_sizes]
            canvases = [(canvas,) for canvas in sorted(set(padded))]
            buckets = np.array([canvases.index((canvas,)) for canvas in padded])
            # Group each bucket separately, so that no image moves to a larger canvas.
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
        """Number of batches of this rank."""
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of this rank, the same in every iteration."""
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
        raise ValueError("the data set has no images. Add images to the split, or use another folder")
    return DatasetInfo(dataset)


def _require_masks(info: DatasetInfo) -> None:
    if not info.has_masks:
        raise ValueError(
            f"{info.source}: no object has a mask, but the model is trained on masks. Add masks (`segmentation` in a "
            "COCO file), or train a model without a mask head"
        )
