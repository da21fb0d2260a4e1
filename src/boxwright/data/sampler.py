"""Compose batches of images: a pure function of seed and step, equal on every rank.

N images, K buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from boxwright.data.buckets import Canvas, Canvases, contains


@dataclass(frozen=True)
class Step:
    """The images of one training step: all of them, or the share of one rank."""

    epoch: int
    """Number of completed passes over the data set."""
    canvas: Canvas
    """(height, width) of the canvas of all images."""
    indices: np.ndarray
    """int64 [B], indices into the data set."""
    scale: int = 0
    """Index of the scale of all images."""

    def share(self, rank: int, world_size: int) -> Step:
        """Share of one rank. The shares of all ranks, concatenated, are the step."""
        per_rank = len(self.indices) // world_size
        return replace(self, indices=self.indices[rank * per_rank : (rank + 1) * per_rank])


def image_seed(seed: int, epoch: int, index: int) -> int:
    """63-bit seed for all randomness of one image in one epoch, independent of the worker that loads the image."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def group(
    order: np.ndarray, buckets: np.ndarray, canvases: Sequence[Canvases], batch_size: int
) -> list[tuple[int, np.ndarray]]:
    """Group images into batches from one bucket each; every image is used once.

    The images that remain after the full batches of a bucket are moved to the next larger bucket in use that fits them.
    So only buckets that no other bucket contains (landscape and portrait) end with an incomplete batch. A common canvas
    for both would be two thirds larger than any other canvas and determine the memory that training needs.

    Args:
        order: int64 [n], images in the order in which they fill batches.
        buckets: int64 [N], bucket of each image.
        canvases: [K], one or more canvases of each bucket.
        batch_size: Number of images in a full batch.

    Returns:
        (bucket, images) of each batch.
    """
    in_use = sorted(set(buckets[order].tolist()), key=lambda k: (sum(h * w for h, w in canvases[k]), k))
    pools = {k: order[buckets[order] == k] for k in in_use}
    batches = []
    for position, k in enumerate(in_use):
        pool = pools[k]
        full = len(pool) // batch_size * batch_size
        batches += [(k, pool[start : start + batch_size]) for start in range(0, full, batch_size)]
        rest = pool[full:]
        larger = next((j for j in in_use[position + 1 :] if contains(canvases[j], canvases[k])), None)
        if larger is not None:
            pools[larger] = np.concatenate([rest, pools[larger]])
        elif len(rest):
            batches.append((k, rest))
    return batches


class TrainingSampler:
    """The batches of an endless sequence of epochs. The batch of a step depends only on the seed and the step.

    Every epoch contains every image at least once. Incomplete batches are filled with images that occur twice, so that
    all batches have the same size. The number of steps per epoch is constant.
    """

    def __init__(
        self,
        buckets: np.ndarray,
        canvases: Sequence[Canvases],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        """Create a sampler for N images.

        Args:
            buckets: int64 [N], bucket of each image.
            canvases: Canvases of the K buckets, one per scale.
            batch_size: Number of images per step, over all ranks.
            seed: Seed of the run, not negative.
            weights: Relative frequency of each scale.
        """
        if len(buckets) == 0:
            raise ValueError("the training set contains no images")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        self._buckets = buckets
        self._canvases = canvases
        self._batch_size = batch_size
        self._seed = seed
        self._weights = np.array(weights) / np.sum(weights)
        self._epoch = 0
        self._batches = self._batches_of(0)
        self.steps_per_epoch = len(self._batches)

    def step(self, step: int) -> Step:
        """The batch of a step; steps are counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._batches_of(epoch)
        bucket, indices, scale = self._batches[position]
        return Step(epoch, self._canvases[bucket][scale], indices, scale)

    def _batches_of(self, epoch: int) -> list[tuple[int, np.ndarray, int]]:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch))))
        order = rng.permutation(len(self._buckets))
        batches = group(order, self._buckets, self._canvases, self._batch_size)
        filled = [(bucket, self._fill(bucket, indices, order)) for bucket, indices in batches]
        shuffled = [filled[i] for i in rng.permutation(len(filled))]
        scales = rng.choice(len(self._weights), len(shuffled), p=self._weights).tolist()
        return [(bucket, indices, scale) for (bucket, indices), scale in zip(shuffled, scales, strict=True)]

    def _fill(self, bucket: int, indices: np.ndarray, order: np.ndarray) -> np.ndarray:
        if len(indices) == self._batch_size:
            return indices
        fits = np.array([contains(self._canvases[bucket], canvases) for canvases in self._canvases])
        others = order[fits[self._buckets[order]] & ~np.isin(order, indices)]
        # np.resize repeats the images if the whole data set does not fill a batch.
        return np.resize(np.concatenate([indices, others]), self._batch_size)
