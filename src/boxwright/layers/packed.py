"""Convolutions that keep, for detection on a CPU, the weights that the CPU computes with.

B images, C channels, H x W positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from boxwright.layers.fused import blocks_are_faster, fused_convolution, fused_dtype, to_blocks
from boxwright.layers.norm import FrozenBatchNorm2d, fold, has_constant_statistics
from boxwright.layers.stock import is_stock


@dataclass(eq=False)
class Pair:
    """A convolution and the norm that its container registers right after it.

    Neighbours are not always applied one after the other. So the convolution folds the norm only after the norm has
    been called with the convolution's output once.
    """

    container: nn.Module
    conv: str
    """Name of the convolution in the container."""
    norm: str
    """Name of the norm in the container."""
    proven: bool = False
    """Whether the norm was called with the convolution's output."""

    def foldable_norm(self) -> nn.Module | None:
        """The norm, if it could be folded into this call; None if gradients, hooks or replaced modules forbid it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        conv, norm = self.container._modules.get(self.conv), self.container._modules.get(self.norm)
        if not (is_stock(conv, PackedConv2d) and is_stock(norm, PackedBatchNorm2d, PackedFrozenBatchNorm2d)):
            return None
        assert isinstance(conv, PackedConv2d)
        assert isinstance(norm, _PackedNorm)
        return norm if conv.pair is norm.pair is self and has_constant_statistics(norm) else None


@dataclass(frozen=True)
class _Origin:
    """Where a convolution's output comes from; set on the tensor as the attribute `origin`."""

    pair: Pair
    normalised: bool


class PackedConv2d(nn.Conv2d):
    """A convolution that keeps the product of its weights and the norm after it while no gradient is needed.

    It has the parameters of the convolution that it was made from, and trains as that one does.
    """

    pair: Pair | None
    _packed: tuple[tuple[object, ...], Tensor, Tensor | None] | None

    @classmethod
    def of(cls, conv: nn.Conv2d, pair: Pair | None = None) -> PackedConv2d:
        """Make one that shares the parameters of a convolution; `pair` names the norm to fold."""
        packed = cls.__new__(cls)
        packed.__dict__.update(conv.__dict__, pair=pair, _packed=None)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, C, H', W'], already normalised if the norm that follows is a proven `Pair`'s."""
        norm = None if self.pair is None else self.pair.foldable_norm()
        y = self._forward(x, norm if norm is not None and self.pair and self.pair.proven else None)
        if norm is not None and self.pair is not None:
            y.origin = _Origin(self.pair, self.pair.proven)  # type: ignore[attr-defined]
        return y

    def _forward(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        dtype = fused_dtype(self, x)
        if dtype is not None and not torch.is_grad_enabled():
            return fused_convolution(self, *self.packed(dtype, norm), x)
        if norm is not None:
            return self._conv_forward(x, *self.packed(self.weight.dtype, norm))
        return super().forward(x)

    def packed(self, dtype: torch.dtype, norm: nn.Module | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias without gradient, the norm folded in; computed again after any of their tensors changed."""
        tensors = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        if norm is not None:
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]  # type: ignore[list-item]
        # Tensors made in inference mode have no version, so that a change of them cannot be seen.
        versioned = not any(tensor.is_inference() for tensor in tensors)
        state = dtype, *((tensor.data_ptr(), tensor._version) for tensor in tensors if versioned)
        if self._packed is None or self._packed[0] != state or not versioned:
            weight, bias = (self.weight, self.bias) if norm is None else fold(self, norm)
            weight = weight.detach().to(dtype, memory_format=torch.channels_last)
            # oneDNN has blocks of 64 outputs. Weights that do not fill them would be reordered again in every call.
            if dtype == torch.bfloat16 and self.out_channels % 64 == 0 and blocks_are_faster():
                weight = to_blocks(self, weight)
            self._packed = state, weight, None if bias is None else bias.detach().to(dtype)
        return self._packed[1], self._packed[2]

    def train(self, mode: bool = True) -> PackedConv2d:
        """As in any module; training frees the weights that only detection uses."""
        if mode:
            self._packed = None
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """Those of a convolution, and the norm that is folded in."""
        return f"{super().extra_repr()}, packed" + (f", folds {self.pair.norm}" if self.pair else "")


class _PackedNorm(nn.Module):
    """A norm that `PackedConv2d` folds: it returns tensors that the convolution has normalised already as they are."""

    pair: Pair

    @classmethod
    def of(cls, norm: nn.Module, pair: Pair) -> _PackedNorm:
        """Make one that shares the tensors of a norm."""
        packed = cls.__new__(cls)
        packed.__dict__.update(norm.__dict__, pair=pair)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        origin: Any = getattr(x, "origin", None)
        if isinstance(origin, _Origin) and origin.pair is self.pair:
            if origin.normalised:
                return x
            self.pair.proven = True
        y: Tensor = super().forward(x)
        return y

    def extra_repr(self) -> str:
        """Those of the norm, and the convolution that it is folded into."""
        own = super().extra_repr()
        return f"{own}, " * bool(own) + f"folded into {self.pair.conv}"


class PackedBatchNorm2d(_PackedNorm, nn.BatchNorm2d):
    """A folded `nn.BatchNorm2d`."""


class PackedFrozenBatchNorm2d(_PackedNorm, FrozenBatchNorm2d):
    """A folded `FrozenBatchNorm2d`."""


def pack_norm(norm: nn.Module, pair: Pair) -> nn.Module:
    """The packed form of a stock norm."""
    assert type(norm) in (nn.BatchNorm2d, FrozenBatchNorm2d)
    return (PackedBatchNorm2d if type(norm) is nn.BatchNorm2d else PackedFrozenBatchNorm2d).of(norm, pair)
