from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from boxwright.assign.sample import Sampled, hardest, sample


def labels_of(positives: int, negatives: int, ignored: int) -> Tensor:
    """[1, N] labels in random order."""
    labels = torch.cat([torch.full((n,), v) for n, v in ((positives, 1), (negatives, 0), (ignored, -1))])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))][None]


SEED = torch.tensor([7])


@pytest.mark.parametrize(
    ("positives", "negatives", "drawn_positive", "drawn_negative"),
    [(100, 500, 32, 96), (5, 500, 5, 123), (0, 500, 0, 128), (100, 20, 32, 20), (0, 0, 0, 0), (3, 2, 3, 2)],
)
def test_positives_come_first_and_negatives_fill_the_sample(
    positives: int, negatives: int, drawn_positive: int, drawn_negative: int
) -> None:
    labels = labels_of(positives, negatives, 200)
    drawn = sample(labels, SEED, num=128, positive_fraction=0.25)
    assert drawn.positive[0].tolist() == [True] * drawn_positive + [False] * (128 - drawn_positive)
    total = drawn_positive + drawn_negative
    assert drawn.valid[0].tolist() == [True] * total + [False] * (128 - total)
    selected = drawn.indices[drawn.valid]
    assert len(selected.unique()) == total
    assert labels[0, selected].tolist() == [1] * drawn_positive + [0] * drawn_negative
    assert (drawn.indices[~drawn.valid] == 0).all()


def test_a_large_sample_contains_all_candidates() -> None:
    labels = labels_of(3, 4, 2)
    drawn = sample(labels, SEED, num=100, positive_fraction=0.5)
    assert drawn.indices.shape == (1, 9)
    assert drawn.valid.sum() == 7
    assert set(drawn.indices[drawn.valid].tolist()) == set((labels[0] >= 0).nonzero()[:, 0].tolist())


def test_the_sample_of_an_image_does_not_depend_on_its_batch() -> None:
    labels = torch.cat([labels_of(50, 500, 100), labels_of(50, 500, 100).flip(1)])
    seeds = torch.tensor([3, -(2**62)])
    together = sample(labels, seeds, num=64, positive_fraction=0.5)
    alone = sample(labels[1:], seeds[1:], num=64, positive_fraction=0.5)
    assert torch.equal(together.indices[1:], alone.indices)


@pytest.mark.parametrize(("seed", "salt"), [(8, 0), (7 + 2**32, 0), (7, 1)])
def test_samples_differ_between_seeds_and_salts(seed: int, salt: int) -> None:
    labels = labels_of(0, 4096, 0)
    first = sample(labels, SEED, num=256, positive_fraction=0.5).indices[0].tolist()
    second = sample(labels, torch.tensor([seed]), num=256, positive_fraction=0.5, salt=salt).indices[0].tolist()
    assert len(set(first) & set(second)) < 48  # expected by chance: 16, standard deviation 3.8


def test_samples_are_a_fixed_function_of_the_seed() -> None:
    # Changing these values changes every training run, so resuming a checkpoint would no longer be bit-exact.
    drawn = sample(labels_of(0, 1000, 0), SEED, num=5, positive_fraction=0.5)
    assert drawn.indices.tolist() == [[895, 455, 35, 462, 6]]


@pytest.mark.parametrize("spread", [1, 2**32, 2**31 + 12345])
def test_every_candidate_is_equally_likely(spread: int) -> None:
    # Consecutive seeds without hashing, in the low or in the high bits, as a careless caller might use.
    images, count, num = 4000, 512, 64
    seeds = torch.arange(images) * spread
    drawn = sample(torch.zeros(images, count, dtype=torch.int64), seeds, num=num, positive_fraction=0.5)
    frequency = torch.bincount(drawn.indices.flatten(), minlength=count).double()
    expected = images * num / count
    chi_square = ((frequency - expected) ** 2 / (expected * (1 - num / count))).sum()
    assert abs(chi_square - count) < 5 * (2 * count) ** 0.5
    # Neighbouring candidates are drawn together as often as expected by chance.
    selected = torch.zeros(images, count).scatter_(1, drawn.indices, 1.0)
    pairs = (selected[:, 1:] * selected[:, :-1]).sum()
    mean = images * (count - 1) * num * (num - 1) / (count * (count - 1))
    assert abs(pairs - mean) < 5 * mean**0.5


def draw(labels: Tensor, seeds: Tensor) -> Sampled:
    return sample(labels, seeds, num=256, positive_fraction=0.5, salt=1)


def test_sample_compiles_to_one_graph_and_runs_on_fake_tensors() -> None:
    labels = torch.cat([labels_of(300, 5000, 50), labels_of(10, 5300, 40)])
    seeds = torch.tensor([2**63 - 1, -5])
    ours = draw(labels, seeds)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(labels, seeds)
    assert torch.equal(ours.indices, compiled.indices)
    assert torch.equal(ours.positive, compiled.positive)
    assert torch.equal(ours.valid, compiled.valid)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert draw(labels, seeds).indices.shape == (2, 256)


def random_losses(shape: tuple[int, ...]) -> Tensor:
    """Losses of 0, 0.25, 0.5, 0.75 and 1, so that many tie."""
    return (torch.rand(shape) * 8).round().clamp(max=4) / 4


def expected_hardest(labels: Tensor, losses: Tensor, identities: Tensor, num: int, fraction: float) -> list[int]:
    """Indices of the hardest candidates of one image, by definition: sort, truncate, concatenate."""
    candidates = (labels >= 0).nonzero().flatten().tolist()
    ranked = sorted(candidates, key=lambda index: (-losses[index].item(), identities[index].item()))
    positives = [index for index in ranked if labels[index] == 1][: int(num * fraction)]
    return positives + [index for index in ranked if labels[index] == 0][: num - len(positives)]


@pytest.mark.parametrize(("positives", "negatives"), [(100, 500), (5, 500), (0, 500), (100, 20), (0, 0)])
def test_hardest_selects_the_highest_losses_and_breaks_ties_by_identity(positives: int, negatives: int) -> None:
    labels = labels_of(positives, negatives, 200)
    losses = torch.where(labels >= 0, random_losses(labels.shape), torch.nan)
    losses = torch.where(losses == 0, torch.tensor([0.0, -0.0])[torch.randint(2, labels.shape)], losses)
    identities = (torch.randperm(labels.shape[1]) * 5 + 2**32 - 5000)[None]
    selected = hardest(labels, losses, identities, num=128, positive_fraction=0.25)
    expected = expected_hardest(labels[0], losses[0], identities[0], 128, 0.25)
    assert selected.indices[0].tolist() == expected + [0] * (128 - len(expected))
    assert selected.positive[0].sum() == min(positives, 32)
    assert selected.valid[0].sum() == len(expected)


def test_hardest_does_not_depend_on_the_order_of_candidates() -> None:
    labels = labels_of(300, 5000, 50)
    losses, identities = random_losses(labels.shape), torch.randperm(labels.shape[1])[None]
    order = torch.randperm(labels.shape[1])
    reordered = hardest(labels[:, order], losses[:, order], identities[:, order], num=256, positive_fraction=0.5)
    expected = hardest(labels, losses, identities, num=256, positive_fraction=0.5)
    assert torch.equal(order[reordered.indices], expected.indices)
