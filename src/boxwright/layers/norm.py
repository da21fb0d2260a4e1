"""Normalisation layers.

B images, C channels, H x W positions.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with constant statistics, also in training; scale and bias are parameters.

    Detectors train with few images per GPU, too few to estimate statistics from.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, train_affine: bool = True) -> None:
        """Start as the identity, apart from `eps`.

        Args:
            channels: channels of the input.
            eps: added to the variance.
            train_affine: whether scale and bias are trained.
        """
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=train_affine)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=train_affine)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`; the output has the dtype of `x`.

        `F.batch_norm` applies the folded `x * scale + bias` in one pass. Its arithmetic is float32 for bfloat16, too.
        """
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # nn.BatchNorm2d counts the batches that updated its statistics. Frozen statistics are never updated.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


FOLDED_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d)
"""Norms that fold into the convolution before them, if stock and if their statistics are constant."""


def has_untrained_statistics(model: nn.Module) -> bool:
    """Whether a frozen norm of the model still has the initial statistics, with which training fails.

    A norm that was folded into a scale and a bias also has a mean of 0, but its variance is 1 - eps.
    """
    return any(
        isinstance(m, FrozenBatchNorm2d) and not m.running_mean.any() and bool((m.running_var == 1).all())
        for m in model.modules()
    )


def make_norm(norm: Norm, channels: int, *, train_affine: bool = True) -> nn.Module:
    """Build a normalisation layer.

    Args:
        norm: "frozen_bn" constant statistics; "bn" statistics of this process's images; "sync_bn" statistics of all
            processes' images (CUDA only; in one process it is "bn"); "gn" 32 groups, fewer where 32 does not divide
            the channels.
        channels: channels of the input.
        train_affine: whether scale and bias of "frozen_bn" are trained; the other norms always train theirs.
    """
    if norm == "frozen_bn":
        return FrozenBatchNorm2d(channels, train_affine=train_affine)
    if norm == "bn":
        return nn.BatchNorm2d(channels)
    if norm == "sync_bn":
        return nn.SyncBatchNorm(channels)
    if norm == "gn":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    raise ValueError(f"norm: expected frozen_bn, bn, sync_bn or gn, got {norm!r}")


def fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [C, inputs / groups, K, K] and bias [C] of the convolution that equals `norm(conv(x))`.

    Args:
        conv: any convolution.
        norm: batch norm with constant statistics, see `has_constant_statistics`.
    """
    assert isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale[:, None, None, None], norm.bias - mean * scale


def has_constant_statistics(norm: nn.Module) -> bool:
    """Whether the norm is one learned scale and shift per channel, independent of its input."""
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None and norm.affine
