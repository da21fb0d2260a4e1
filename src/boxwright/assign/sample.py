"""Sample the positives and negatives of an image for the losses, at random or by loss (hard example mining).

B images, N candidates, S sampled candidates. The random order is a hash of (seed of the image, stage, candidate), so
the sample of an image is the same in eager and compiled code, on any device, in any batch and for any number of ranks.
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
    """A sample of S candidates per image: first the positives, then the negatives, then unused slots."""

    indices: Tensor
    """[B, S] int64, index of the candidate; 0 in unused slots."""
    positive: Tensor
    """[B, S] bool, slots that hold a positive: the first slots, at most int(num * positive_fraction)."""
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
    """Draw positives and negatives without replacement. All candidates with the same label are equally likely.

    Args:
        labels: [B, N] int64 from `match`; ignored candidates are not drawn.
        seeds: [B] int64, one seed per image and step.
        num: number of candidates per image; negatives fill the slots that positives leave.
        positive_fraction: maximum fraction of positives in `num`.
        salt: number of the stage of the detector; each stage draws an independent sample.
        identities: [B, N] int64 in 0..2^32 - 1, which identify the candidates independently of their order; None for
            the index of the candidate. Proposals need identities: they are sorted by score, and rounding can swap two
            of them.

    Returns:
        S = min(num, N) slots.
    """
    return _highest(_random_keys(seeds, salt, labels.shape[1], identities), labels, num, positive_fraction)


@torch.no_grad()
def hardest(labels: Tensor, losses: Tensor, identities: Tensor, *, num: int, positive_fraction: float) -> Sampled:
    """Select the positives and the negatives with the highest loss: online hard example mining (OHEM).

    Source: Shrivastava et al., Training Region-based Object Detectors with Online Hard Example Mining (2016), section
    4. As in mmdetection 0.5 (2018), positives and negatives are ranked separately, without NMS of near-duplicates.

    Args:
        labels: [B, N] int64 from `match`; ignored candidates are not selected.
        losses: [B, N] float32, at least 0, any value for ignored candidates. Non-finite losses rank last, but are not
            excluded: otherwise a model whose losses are all NaN would seem to have a loss of 0.
        identities: [B, N] int64 in 0..2^32 - 1, unique among the candidates of an image that are not ignored. Of equal
            losses the candidate with the lower identity is selected first, regardless of its index.
        num: number of candidates per image; negatives fill the slots that positives leave.
        positive_fraction: maximum fraction of positives in `num`.

    Returns:
        S = min(num, N) slots; positives and negatives are each sorted by descending loss.
    """
    # The bits of non-negative floats sort like the floats. abs() because -0.0 has its sign bit set.
    rank = losses.float().abs().view(torch.int32).to(torch.int64) + 1
    rank = torch.where(losses.isfinite(), rank, 0)
    return _highest(rank << 32 | (_32_BITS - identities), labels, num, positive_fraction)


def _highest(keys: Tensor, labels: Tensor, num: int, positive_fraction: float) -> Sampled:
    """Select the positives with the highest keys (up to their fraction), then the negatives; keys are at least 0."""
    size = min(num, labels.shape[1])
    slots = torch.arange(size, device=labels.device)
    drawn_positive = _first(keys, labels == POSITIVE, min(int(num * positive_fraction), size))
    drawn_negative = _first(keys, labels == NEGATIVE, size)
    num_positive = (drawn_positive >= 0).sum(1, keepdim=True)
    positive = slots < num_positive
    # Shift the negatives to follow the last positive; slots after the last negative read -1.
    shifted = drawn_negative.gather(1, (slots - num_positive).clamp(min=0))
    padded = torch.nn.functional.pad(drawn_positive, (0, size - drawn_positive.shape[1]))
    drawn = torch.where(positive, padded, shifted)
    return Sampled(indices=drawn.clamp(min=0), positive=positive, valid=drawn >= 0)


def _first(keys: Tensor, eligible: Tensor, count: int) -> Tensor:
    """[B, count] indices of the eligible candidates with the highest keys, padded with -1."""
    highest = torch.where(eligible, keys, -1).topk(count, dim=1)
    return torch.where(highest.values >= 0, highest.indices, -1)


def _random_keys(seeds: Tensor, salt: int, count: int, identities: Tensor | None) -> Tensor:
    """[B, count] int64 keys, at least 0: 32 random bits, determined by the identity, above 30 bits of the index."""
    assert count <= _INDEX_BITS
    image = _mix(_mix((seeds & _32_BITS) ^ salt) ^ (seeds >> 32 & _32_BITS))
    index = torch.arange(count, device=seeds.device)
    return _mix(_mix(index if identities is None else identities) ^ image[:, None]) << 30 | index


def _mix(bits: Tensor) -> Tensor:
    """Hash 32-bit numbers; the mapping is one to one.

    The constants are from the "lowbias32" construction with factors below 2**31 (hash-prospector, [16 21f0aaad 15
    735a2d97 15]). No product exceeds int64, so overflow cannot differ between devices or compilers.
    """
    bits = bits ^ bits >> 16
    bits = bits * 0x21F0AAAD & _32_BITS
    bits = bits ^ bits >> 15
    bits = bits * 0x735A2D97 & _32_BITS
    return bits ^ bits >> 15
