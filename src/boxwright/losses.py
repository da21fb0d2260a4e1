"""Losses, element by element, and the one mean that all of them are reduced with.

Losses come back in float32 (float64 for float64 input), under autocast too. Where `valid` is False, inputs are replaced
before any arithmetic: the loss there is 0 and no NaN that padding holds can come back through the gradient, as it would
if only the finished loss were masked.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def weighted_mean(loss: Tensor, weight: Tensor) -> Tensor:
    """The sum of weighted losses over the sum of weights, a denominator below 1 counting as 1.

    Where torch.distributed is initialised, the denominator is the mean of all ranks' weight sums, so that averaging
    gradients over ranks (as DDP does) gives what one process would compute on all their images. Every rank must call
    this equally often.

    Args:
        loss: [...] finite losses.
        weight: [...] bool or float, not negative, of the same shape.

    Returns:
        Scalar in the dtype of `loss`; 0 where all weights are 0.
    """
    weight = weight.to(loss.dtype)
    total = weight.detach().sum()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        ranks = dist.get_world_size()
    return (loss * weight).sum() / (total.clamp(min=1) / ranks)


def binary_cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy of independent yes/no predictions.

    Args:
        logits: [...] unbounded.
        targets: [...] bool or float in 0..1.
        valid: [...] bool (broadcast), which elements count; None for all.

    Returns:
        [...] losses.
    """
    logits, targets = _keep_valid(_at_least_float32(logits), valid), _keep_valid(targets, valid)
    return _keep_valid(F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none"), valid)


def cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy of one choice among C classes.

    Args:
        logits: [..., C] unbounded.
        labels: [...] int64 in 0..C-1.
        valid: [...] bool, which rows count; None for all.

    Returns:
        [...] losses.
    """
    logits = _keep_valid(_at_least_float32(logits), None if valid is None else valid[..., None])
    labels = _keep_valid(labels, valid)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return _keep_valid(loss.view(labels.shape), valid)


def smooth_l1(predictions: Tensor, targets: Tensor, beta: float, valid: Tensor | None = None) -> Tensor:
    """Absolute error that turns quadratic below `beta` (Fast R-CNN, arXiv 1504.08083, eq. 3, for beta = 1).

    Args:
        predictions: [...].
        targets: [...] of the same shape.
        beta: where the two forms meet; 0 for plain L1.
        valid: [...] bool (broadcast), which elements count; None for all.

    Returns:
        [...] losses.
    """
    predictions = _keep_valid(_at_least_float32(predictions), valid)
    targets = _keep_valid(targets, valid).to(predictions.dtype)
    return F.smooth_l1_loss(predictions, targets, beta=beta, reduction="none")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _keep_valid(tensor: Tensor, valid: Tensor | None) -> Tensor:
    return tensor if valid is None else torch.where(valid, tensor, torch.zeros_like(tensor))
