"""The few positives and negatives of an image that a loss looks at, chosen at random or by how badly they are judged.

B images, N candidates, S sampled. The random order is a hash of (seed of the image, stage, candidate), so an image
draws the same sample compiled or not, on any device, in any batch and on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from boxwright.assign.match import NEGATIVE, POSITIVE

_32_BITS = 2**32 - 1
_INDEX_BITS = 2**30 - 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """A sample of S candidates an image: its positives, then its negatives, then unused slots."""

    indices: Tensor
    """[B, S] int64, which candidate; 0 in unused slots."""
    positive: Tensor
    """[B, S] bool, slots that hold a positive: the first ones, at most int(num * positive_fraction)."""
    valid: Tensor
    """[B, S] bool, slots that hold a candidate."""


@torch.no_grad()
def sample(
    labels: Tensor,
    seeds: Tensor,
    *,
    num: int,
    positive_fraction: float,
    salt: int = 0,
    identities: Tensor | None = None,
) -> Sampled:
    """Draw positives and negatives without replacement, each label's candidates being equally likely.

    Args:
        labels: [B, N] int64 from `match`; ignored candidates are not drawn.
        seeds: [B] int64, one a image and step.
        num: candidates to draw an image; negatives fill what positives leave.
        positive_fraction: share of `num` that positives may take.
        salt: tells the stages of a detector apart, so that they draw independently.
        identities: [B, N] int64 in 0..2^32 - 1, by which a candidate is drawn wherever it stands; None for its index.
            Proposals are sorted by score, and rounding alone can make two of them change places.

    Returns:
        S = min(num, N) slots.
    """
    return _highest(_random_keys(seeds, salt, labels.shape[1], identities), labels, num, positive_fraction)


@torch.no_grad()
def hardest(labels: Tensor, losses: Tensor, identities: Tensor, *, num: int, positive_fraction: float) -> Sampled:
    """Take the positives and the negatives of highest loss: online hard example mining (OHEM).

    Source: Shrivastava et al., Training Region-based Object Detectors with Online Hard Example Mining (2016), section
    4. As in the 2018 toolbox, positives and negatives are ranked apart, and nothing suppresses near-copies.

    Args:
        labels: [B, N] int64 from `match`; ignored candidates are not taken.
        losses: [B, N] float32, at least 0; those of ignored candidates may be anything. Losses that are not finite
            rank last. They are not left out, or a model whose losses are all NaN would seem to have a loss of 0.
        identities: [B, N] int64 in 0..2^32 - 1, different for all candidates of an image that are not ignored: of
            equal losses the lower identity is taken first, wherever it stands.
        num: candidates to take an image; negatives fill what positives leave.
        positive_fraction: share of `num` that positives may take.

    Returns:
        S = min(num, N) slots; positives and negatives each by falling loss.
    """
    # The bits of floats that are not negative rank as the floats do. abs() because -0.0 has a negative number's bits.
    rank = losses.float().abs().view(torch.int32).to(torch.int64) + 1
    rank = torch.where(losses.isfinite(), rank, 0)
    return _highest(rank << 32 | (_32_BITS - identities), labels, num, positive_fraction)


def _highest(keys: Tensor, labels: Tensor, num: int, positive_fraction: float) -> Sampled:
    """The positives of highest key (at most their share of `num`), then the negatives of highest key; keys are >= 0."""
    size = min(num, labels.shape[1])
    slots = torch.arange(size, device=labels.device)
    drawn_positive = _first(keys, labels == POSITIVE, min(int(num * positive_fraction), size))
    drawn_negative = _first(keys, labels == NEGATIVE, size)
    num_positive = (drawn_positive >= 0).sum(1, keepdim=True)
    positive = slots < num_positive
    # Negatives move up behind the last positive; a slot past the last negative reads -1.
    shifted = drawn_negative.gather(1, (slots - num_positive).clamp(min=0))
    padded = torch.nn.functional.pad(drawn_positive, (0, size - drawn_positive.shape[1]))
    drawn = torch.where(positive, padded, shifted)
    return Sampled(indices=drawn.clamp(min=0), positive=positive, valid=drawn >= 0)


def _first(keys: Tensor, wanted: Tensor, count: int) -> Tensor:
    """[B, count] the wanted candidates with the highest keys, then -1."""
    highest = torch.where(wanted, keys, -1).topk(count, dim=1)
    return torch.where(highest.values >= 0, highest.indices, -1)


def _random_keys(seeds: Tensor, salt: int, count: int, identities: Tensor | None) -> Tensor:
    """[B, count] int64 >= 0: 32 random bits, which differ where identities do, above 30 bits of the index."""
    assert count <= _INDEX_BITS
    image = _mix(_mix((seeds & _32_BITS) ^ salt) ^ (seeds >> 32 & _32_BITS))
    index = torch.arange(count, device=seeds.device)
    return _mix(_mix(index if identities is None else identities) ^ image[:, None]) << 30 | index


def _mix(bits: Tensor) -> Tensor:
    """Scramble numbers of 32 bits, one to one.

    The constants are the "lowbias32" construction's with factors below 2**31 (hash-prospector, [16 21f0aaad 15 735a2d97
    15]): no product leaves int64, so no device or compiler can disagree about overflow.
    """
    bits = bits ^ bits >> 16
    bits = bits * 0x21F0AAAD & _32_BITS
    bits = bits ^ bits >> 15
    bits = bits * 0x735A2D97 & _32_BITS
    return bits ^ bits >> 15
