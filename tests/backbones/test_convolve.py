from __future__ import annotations

import pytest
import torch
from torch import nn

from boxwright.backbones.convolve import convolve
from boxwright.backbones.norm import FrozenBatchNorm2d


def with_statistics(norm: nn.Module) -> nn.Module:
    for tensor in (norm.weight, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    for tensor in (norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    return norm.double().eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_a_folded_norm_is_the_norm_and_so_are_its_gradients(norm: type[nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias).double()
    behind = with_statistics(norm(6))
    x, add = torch.randn(2, 4, 9, 7, dtype=torch.float64), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    inputs = [x.requires_grad_(), add.requires_grad_(), *convolution.parameters(), *behind.parameters()]
    given = convolve(convolution, behind, x, add, relu=True)
    wanted = (
        nn.functional.batch_norm(
            convolution(x), behind.running_mean, behind.running_var, behind.weight, behind.bias, eps=behind.eps
        )
        + add
    ).relu()
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad((given * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        rtol=1e-10,
        atol=1e-10,
    )


def test_a_norm_that_learns_statistics_is_not_folded() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6).train()
    x = torch.randn(2, 4, 8, 8)
    y = convolve(nn.Conv2d(4, 6, 1), norm, x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-5)
    assert norm.num_batches_tracked == 1
