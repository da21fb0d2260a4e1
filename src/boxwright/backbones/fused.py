"""A convolution on a CPU with what comes behind it in the same call.

oneDNN, which computes PyTorch's convolutions on a CPU, can add a shortcut and clamp while its result is in the cache.
PyTorch's compiler makes use of that for detection; here it is used without one, and in training as well.

B images, C channels, H x W positions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def fused_dtype(convolution: nn.Conv2d, x: Tensor) -> torch.dtype | None:
    """What a convolution of `x` is computed in here and now; None where it cannot be fused."""
    # The compiler fuses by itself, as far as it can; and tensors that only know their shape have no oneDNN.
    if x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
        return None
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if can_fuse(dtype) else None


@cache
def can_fuse(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has oneDNN, and this CPU what oneDNN needs to compute in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def fused_convolution(
    convolution: nn.Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    add: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """A convolution with other weights than its own, plus `add`, clamped at 0 where `relu`, with its gradient.

    Args:
        convolution: tells padding, stride, dilation and groups.
        weight: [C, inputs / groups, K, K] of a `fused_dtype`; without gradient also as oneDNN lays it out.
        bias: [C], or None.
        x: [B, inputs, H, W].
        add: [B, C, H', W'], or None.
        relu: whether what is below 0 becomes 0.

    Returns:
        [B, C, H', W'] of the dtype of `weight`.
    """
    places = convolution.padding, convolution.stride, convolution.dilation, convolution.groups
    bias, add = (None if tensor is None else tensor.to(weight.dtype) for tensor in (bias, add))
    y: Tensor = _Fused.apply(x.to(weight.dtype), weight, bias, add, places, relu)
    return y


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, places: Any, relu: bool
    ) -> Tensor:
        y = _call(x, weight, bias, add, places, relu)
        # Of y the backward pass has to know where it is above 0.
        ctx.save_for_backward(x, weight, y if relu else None)
        ctx.places, ctx.bias_sizes = places, None if bias is None else list(bias.shape)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        if y is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        padding, stride, dilation, groups = ctx.places
        needed = list(ctx.needs_input_grad[:3])
        found: tuple[Tensor | None, ...] = (None, None, None)
        if any(needed):
            found = torch.ops.aten.convolution_backward(
                gradient, x, weight, ctx.bias_sizes, stride, padding, dilation, False, [0, 0], groups, needed
            )
        return *found, gradient if ctx.needs_input_grad[3] else None, None, None


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, places: Any, relu: bool) -> Tensor:
    operator: Any = torch.ops.mkldnn._convolution_pointwise
    y: Tensor
    if add is None:
        y = operator(x, weight, bias, *places, "relu" if relu else "none", [], "")
        return y
    # Of other maps the operator does one after the other, and then it has no sum that is clamped in bfloat16.
    fuses = places[-1] == 1 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y = operator.binary(x, add, weight, bias, *places, "add", 1.0, "relu" if relu and fuses else None, [], "")
    return y.relu_() if relu and not fuses else y
