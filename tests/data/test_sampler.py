"""Every image occurs in each epoch, in batches with one canvas that depend only on seed and step."""

from __future__ import annotations

import numpy as np
import pytest

from boxwright.data.buckets import Canvases, Resize, Scale, contains, plan_buckets, plan_scales
from boxwright.data.sampler import TrainingSampler, group, image_seed

RESIZE = Resize(800, 1333)


def planned(count: int, seed: int = 0) -> tuple[np.ndarray, list[Canvases]]:
    sizes = np.random.default_rng(seed).integers(200, 800, (count, 2))
    return plan_buckets([Scale(RESIZE, RESIZE)], sizes)


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 100, 421])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_every_image_occurs_in_each_epoch_and_few_occur_twice(count: int, batch_size: int) -> None:
    buckets, canvases = planned(count)
    sampler = TrainingSampler(buckets, canvases, batch_size=batch_size, seed=3)
    for epoch in range(3):
        steps = [sampler.step(epoch * sampler.steps_per_epoch + i) for i in range(sampler.steps_per_epoch)]
        assert {step.epoch for step in steps} == {epoch}
        seen = np.concatenate([step.indices for step in steps])
        assert set(seen.tolist()) == set(range(count))
        # At most one landscape and one portrait batch are filled with repeated images.
        assert len(seen) - count < 2 * batch_size
        for step in steps:
            assert len(step.indices) == batch_size
            assert all(contains((step.canvas,), canvases[buckets[index]]) for index in step.indices)


def test_batches_are_filled_with_images_they_do_not_contain_yet() -> None:
    sampler = TrainingSampler(np.zeros(20, int), [((32, 32),)], batch_size=16, seed=0)
    for step in range(4):
        assert len(set(sampler.step(step).indices.tolist())) == 16


def test_remaining_images_move_to_the_next_larger_bucket() -> None:
    canvases = [((32, 32),), ((32, 64),), ((64, 32),), ((32, 96),)]
    buckets = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    batches = group(np.arange(8), buckets, canvases, 2)
    assert [(canvases[bucket][0], indices.tolist()) for bucket, indices in batches] == [
        ((32, 32), [0, 1]),
        ((32, 64), [2, 3]),
        ((64, 32), [5]),
        ((32, 96), [4, 6]),
        ((32, 96), [7]),
    ]


def test_remaining_images_do_not_move_to_an_unused_bucket() -> None:
    canvases = [((32, 32),), ((32, 64),)]
    assert group(np.arange(3), np.zeros(3, int), canvases, 2)[-1][0] == 0


def test_a_step_does_not_depend_on_previous_calls() -> None:
    buckets, canvases = planned(50)
    forward = TrainingSampler(buckets, canvases, batch_size=4, seed=1)
    steps = [forward.step(i) for i in range(40)]
    backward = TrainingSampler(buckets, canvases, batch_size=4, seed=1)
    for i in reversed(range(40)):
        repeated = backward.step(i)
        assert (repeated.epoch, repeated.canvas) == (steps[i].epoch, steps[i].canvas)
        np.testing.assert_array_equal(repeated.indices, steps[i].indices)


def test_order_differs_between_epochs_and_seeds() -> None:
    buckets, canvases = planned(50)
    one, two = (TrainingSampler(buckets, canvases, batch_size=50, seed=seed) for seed in (1, 2))
    assert (one.step(0).indices != one.step(one.steps_per_epoch).indices).any()
    assert (one.step(0).indices != two.step(0).indices).any()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_concatenated_shares_of_all_ranks_are_the_step(world_size: int) -> None:
    buckets, canvases = planned(50)
    step = TrainingSampler(buckets, canvases, batch_size=8, seed=1).step(3)
    shares = [step.share(rank, world_size) for rank in range(world_size)]
    assert {share.canvas for share in shares} == {step.canvas}
    np.testing.assert_array_equal(np.concatenate([share.indices for share in shares]), step.indices)


def test_image_seeds_have_63_bits_and_differ() -> None:
    seeds = {image_seed(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(100)}
    assert len(seeds) == 900
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert image_seed(1, 2, 3) == image_seed(1, 2, 3)


@pytest.mark.parametrize(
    ("count", "batch_size", "seed", "message"),
    [(0, 1, 0, "no images"), (3, 0, 0, "batch_size"), (3, 1, -1, "seed")],
)
def test_invalid_arguments_are_an_error(count: int, batch_size: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSampler(np.zeros(count, int), [((32, 32),)], batch_size=batch_size, seed=seed)


def test_scales_are_drawn_by_weight_independently_of_previous_calls() -> None:
    buckets, canvases = planned(50)
    canvases = [(canvas[0], (64, 96)) for canvas in canvases]
    one, two = (
        TrainingSampler(buckets, canvases, batch_size=4, seed=1, weights=weights) for weights in ((1, 0), (1, 3))
    )
    steps = [two.step(i) for i in range(4000)]
    assert np.mean([step.scale for step in steps]) == pytest.approx(0.75, abs=0.03)
    assert {step.canvas for step in steps if step.scale == 1} == {(64, 96)}
    for i in (3999, 0, 1234):
        repeated, unscaled = two.step(i), one.step(i)
        assert (repeated.scale, repeated.canvas) == (steps[i].scale, steps[i].canvas)
        # The images of a step do not depend on its scale.
        np.testing.assert_array_equal(repeated.indices, unscaled.indices)
        assert unscaled.scale == 0
    assert {step.share(1, 2).scale for step in steps} == {0, 1}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batch_fits_its_canvas_at_every_scale(batch_size: int) -> None:
    rng = np.random.default_rng(0)
    # Various shapes, shapes that are square up to rounding, and elongated ones.
    sizes = np.concatenate([rng.integers(200, 800, (150, 2)), rng.integers(300, 305, (100, 2)), [[30, 400], [400, 30]]])
    scales = plan_scales(((600, 1000), (610, 1000), (1333, 1333), (1600, 2000)), "list")
    scales += plan_scales(((470, 1000), (801, 1333)), "range")
    buckets, canvases = plan_buckets(scales, sizes)
    sampler = TrainingSampler(buckets, canvases, batch_size=batch_size, seed=2, weights=[1] * len(scales))
    seen = set()
    for i in range(4 * sampler.steps_per_epoch):
        step = sampler.step(i)
        seen.update(step.indices.tolist())
        assert (scales[step.scale].high.sizes(sizes[step.indices]) <= step.canvas).all()
        assert (scales[step.scale].low.sizes(sizes[step.indices]) <= step.canvas).all()
    assert seen == set(range(len(sizes)))
