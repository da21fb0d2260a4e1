"""Direct calls of oneDNN, which computes PyTorch's convolutions on a CPU.

oneDNN can add a shortcut and apply a ReLU while the output of a convolution is in the cache. PyTorch's compiler uses
that for detection; here it is used without a compiler, and in training too.

B images, C channels, H x W positions.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def fused_dtype(conv: nn.Conv2d, x: Tensor) -> torch.dtype | None:
    """Dtype of `conv(x)` under the current autocast state; None if the fused operator cannot be used."""
    # Fake and traced tensors have no memory, and the compiler fuses on its own.
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if can_fuse(dtype) else None


@cache
def can_fuse(dtype: torch.dtype) -> bool:
    """Whether PyTorch has oneDNN, and oneDNN supports `dtype` on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def fused_operator() -> Any:
    """OneDNN's convolution with add and ReLU. PyTorch's FLOP counters do not count it."""
    return torch.ops.mkldnn._convolution_pointwise


def fused_convolution(
    conv: nn.Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    add: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """Compute `relu(convolution(x) + add)` in one call of oneDNN, with gradients.

    Args:
        conv: convolution whose padding, stride, dilation and groups are used; its weights are not.
        weight: [C, inputs / groups, K, K] in a `fused_dtype`. If no gradient is needed, it may be in oneDNN's blocks.
        bias: [C], or None.
        x: [B, inputs, H, W].
        add: [B, C, H', W'], or None.
        relu: whether a ReLU follows.

    Returns:
        [B, C, H', W'] of the dtype of `weight`.
    """
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    bias, add = (None if tensor is None else tensor.to(weight.dtype) for tensor in (bias, add))
    y: Tensor = _Fused.apply(x.to(weight.dtype), weight, bias, add, geometry, relu)
    return y


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, geometry: Any, relu: bool
    ) -> Tensor:
        y = _call(x, weight, bias, add, geometry, relu)
        # The gradient of the ReLU is 0 where y is 0.
        ctx.save_for_backward(x, weight, y if relu else None)
        ctx.geometry, ctx.bias_sizes = geometry, None if bias is None else list(bias.shape)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        if y is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        padding, stride, dilation, groups = ctx.geometry
        mask = list(ctx.needs_input_grad[:3])
        gradients: tuple[Tensor | None, ...] = (None, None, None)
        if any(mask):
            gradients = torch.ops.aten.convolution_backward(
                gradient, x, weight, ctx.bias_sizes, stride, padding, dilation, False, [0, 0], groups, mask
            )
        return *gradients, gradient if ctx.needs_input_grad[3] else None, None, None


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, geometry: Any, relu: bool) -> Tensor:
    operator = fused_operator()
    y: Tensor
    if add is None:
        y = operator(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
        return y
    if add.shape[2:] == (1, 1):  # PyTorch 2.11 rejects the fused add for channels-last maps of one position.
        y = operator(x, weight, bias, *geometry, "none", [], "") + add
        return y.relu_() if relu else y
    # For other memory layouts oneDNN runs convolution, add and ReLU separately; it has no fused add + ReLU in bfloat16.
    fuses = geometry[-1] == 1 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y = operator.binary(x, add, weight, bias, *geometry, "add", 1.0, "relu" if relu and fuses else None, [], "")
    return y.relu_() if relu and not fuses else y


def to_blocks(conv: nn.Conv2d, weight: Tensor) -> Tensor:
    """Reorder a weight to the blocks that oneDNN prefers when it does not know the size of the map.

    Other sizes may need other blocks. oneDNN then reorders the weight in every call, which can take ten times as long
    as the convolution: see `blocks_are_faster`.

    Args:
        conv: convolution whose padding, stride, dilation and groups are used.
        weight: [C, inputs / groups, K, K] bfloat16.
    """
    reorder: Any = torch.ops.mkldnn._reorder_convolution_weight
    blocks: Tensor = reorder(weight, conv.padding, conv.stride, conv.dilation, conv.groups)
    return blocks


_CLEARLY_FASTER = 0.9
_ROUNDS = 2


@cache
@torch.no_grad()
def blocks_are_faster() -> bool:
    """Whether this processor computes bfloat16 convolutions at least 10% faster from `to_blocks`.

    This is measured once per process, in less than 0.1 s, on a 1x1 convolution of ResNet's third stage. Its map is
    small, and for small maps the best blocks depend on the processor: an AMD EPYC with AVX-512 bf16 takes 12 times as
    long with blocks. The output is bit-identical with and without blocks.
    """
    conv = nn.Conv2d(256, 1024, 1, bias=False, dtype=torch.bfloat16)
    x = torch.rand(1, 256, 20, 20, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    plain = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    weights = plain, to_blocks(conv, plain)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + _ROUNDS):  # The first round is a warm-up.
        for weight, times in zip(weights, seconds, strict=True):
            start = time.perf_counter()
            fused_convolution(conv, weight, None, x)
            times.append(time.perf_counter() - start)
    return min(seconds[1][1:]) < _CLEARLY_FASTER * min(seconds[0][1:])
