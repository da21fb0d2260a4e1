"""Which pictures make up which batch: a pure function of seed and step, the same on every rank.

N pictures, K buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from boxwright.data.buckets import Canvas, Canvases, holds


@dataclass(frozen=True)
class Step:
    """The pictures of one batch, whole or one rank's share."""

    epoch: int
    """How often the data set was gone through before."""
    canvas: Canvas
    """(height, width) that all of them fit."""
    indices: np.ndarray
    """int64 [B], positions in the data set."""
    scale: int = 0
    """Which of the scales all of them have."""

    def share(self, rank: int, world_size: int) -> Step:
        """The part of one rank; the parts of all ranks, joined, are the step again."""
        per_rank = len(self.indices) // world_size
        return replace(self, indices=self.indices[rank * per_rank : (rank + 1) * per_rank])


def image_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit seed for all that is random about one picture in one epoch, whoever works on it."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def group(
    order: np.ndarray, buckets: np.ndarray, canvases: Sequence[Canvases], batch_size: int
) -> list[tuple[int, np.ndarray]]:
    """Group pictures into batches of one bucket each, every picture once.

    What is left over of a bucket after its full batches joins the next larger bucket in use that holds it, so that
    only buckets that no other holds (landscape and portrait) end on a short batch. A canvas for both would be two
    thirds larger than any other, and set the memory that training needs.

    Args:
        order: int64 [n], the pictures in the order in which they fill batches.
        buckets: int64 [N], each picture's bucket.
        canvases: [K], one or more of each bucket.
        batch_size: pictures in a full batch.

    Returns:
        (bucket, pictures) of each batch.
    """
    in_use = sorted(set(buckets[order].tolist()), key=lambda k: (sum(h * w for h, w in canvases[k]), k))
    pools = {k: order[buckets[order] == k] for k in in_use}
    batches = []
    for position, k in enumerate(in_use):
        pool = pools[k]
        full = len(pool) // batch_size * batch_size
        batches += [(k, pool[start : start + batch_size]) for start in range(0, full, batch_size)]
        rest = pool[full:]
        larger = next((j for j in in_use[position + 1 :] if holds(canvases[j], canvases[k])), None)
        if larger is not None:
            pools[larger] = np.concatenate([rest, pools[larger]])
        elif len(rest):
            batches.append((k, rest))
    return batches


class TrainingSampler:
    """The batches of endless epochs, each reachable by its step alone.

    Every picture comes at least once an epoch. Short batches are filled up with pictures that come twice, so that
    all batches have one size. The number of steps in an epoch never changes.
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
        """Plan over N pictures.

        Args:
            buckets: int64 [N], each picture's bucket.
            canvases: [K], one for each scale.
            batch_size: pictures of a step over all ranks together.
            seed: of the run, not negative.
            weights: how often a step has each scale, in proportion.
        """
        if len(buckets) == 0:
            raise ValueError("the data set holds no pictures to train on")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed}: give a seed that is not negative")
        self._buckets = buckets
        self._canvases = canvases
        self._batch_size = batch_size
        self._seed = seed
        self._weights = np.array(weights) / np.sum(weights)
        self._epoch = 0
        self._batches = self._batches_of(0)
        self.steps_per_epoch = len(self._batches)

    def step(self, step: int) -> Step:
        """The batch of a step, counted from 0 over all epochs."""
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
        fits = np.array([holds(self._canvases[bucket], canvases) for canvases in self._canvases])
        others = order[fits[self._buckets[order]] & ~np.isin(order, indices)]
        # np.resize starts over where even all pictures together do not fill a batch.
        return np.resize(np.concatenate([indices, others]), self._batch_size)
