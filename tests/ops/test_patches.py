from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from boxwright.ops.patches import convolve_patches


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolve_patches_equals_the_interior_of_a_padded_convolution(size: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3, padding=1).double()
    patches = torch.randn(7, 4, size, size, dtype=torch.float64)
    if channels_last:
        patches = patches.contiguous(memory_format=torch.channels_last)
        convolution = convolution.to(memory_format=torch.channels_last)
    inputs = [patches.requires_grad_(), *convolution.parameters()]

    def with_gradients(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    actual = with_gradients(convolve_patches(patches, convolution.weight, convolution.bias))
    expected = with_gradients(convolution(patches)[..., 1:-1, 1:-1])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
