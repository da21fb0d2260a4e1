from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from boxwright.heads.box_head import BoxConfig, BoxHead
from boxwright.heads.grid_convs import GridNorm, grid_convs
from boxwright.heads.mask_head import MaskConfig, MaskHead
from boxwright.layers.norm import FrozenBatchNorm2d

STRIDES = (4, 8, 16, 32)


@pytest.mark.parametrize("norm", [None, "gn", "frozen_bn"])
def test_convolutions_keep_the_grid_size_and_have_either_bias_or_norm(norm: GridNorm | None) -> None:
    convs = grid_convs(8, 64, 3, norm)
    grid = torch.rand(5, 8, 7, 7)
    for conv in convs:
        grid = conv(grid).relu()
    assert grid.shape == (5, 64, 7, 7)
    kinds = [type(layer) for layer in convs.modules() if isinstance(layer, (nn.GroupNorm, FrozenBatchNorm2d))]
    assert kinds == [] if norm is None else kinds == 3 * [nn.GroupNorm if norm == "gn" else FrozenBatchNorm2d]
    assert all((layer.bias is None) == (norm is not None) for layer in convs.modules() if isinstance(layer, nn.Conv2d))


def grid_of(convs: nn.ModuleList) -> list[torch.Tensor]:
    """List to which a hook appends the RoIAlign output when the head runs."""
    grids: list[torch.Tensor] = []
    convs[0].register_forward_pre_hook(lambda _, inputs: grids.append(inputs[0]))
    return grids


def normed(conv: Any, grid: torch.Tensor) -> torch.Tensor:
    """Convolution, GroupNorm with 8 groups and ReLU, written out in float64."""
    weight, norm = conv[0].weight.double(), conv[1]
    x = nn.functional.conv2d(grid.double(), weight, padding=1).unflatten(1, (8, -1))
    centred = x - x.mean((2, 3, 4), keepdim=True)
    x = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
    return (x * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]).clamp(min=0)


@torch.no_grad()
def test_a_box_head_with_four_normalised_convolutions_and_one_fully_connected_layer() -> None:
    torch.manual_seed(0)
    config = BoxConfig(num_convs=4, conv_width=8, norm="gn", num_fcs=1, width=16)
    head = BoxHead(6, STRIDES, 3, config)
    for conv in head.convs:
        nn.init.uniform_(conv[1].weight, 0.5, 1.5)
        nn.init.normal_(conv[1].bias)
    grids = grid_of(head.convs)
    boxes = torch.tensor([[[4.0, 8.0, 90.0, 70.0], [30.0, 20.0, 60.0, 110.0]]])
    maps = [torch.rand(1, 6, 128 // stride, 160 // stride) for stride in STRIDES]
    logits, deltas = head(maps, boxes, torch.ones(1, 2, dtype=torch.bool))
    hidden = grids[0]
    for conv in head.convs:
        hidden = normed(conv, hidden)
    hidden = (hidden.flatten(1) @ head.fc1.weight.double().T + head.fc1.bias.double()).clamp(min=0)
    expected = hidden @ head.class_logits.weight.double().T + head.class_logits.bias.double()
    torch.testing.assert_close(logits[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert deltas.shape == (1, 2, 3, 4)
    assert sum(parameter.numel() for parameter in head.parameters()) == (
        9 * 8 * (6 + 3 * 8) + 4 * 2 * 8 + (8 * 49 + 1) * 16 + 17 * 4 + 17 * 12
    )


@torch.no_grad()
def test_a_mask_head_with_norms() -> None:
    torch.manual_seed(0)
    head = MaskHead(6, STRIDES, 3, MaskConfig(width=8, num_convs=2, norm="gn", output_size=5))
    grids, last = grid_of(head.convs), list[torch.Tensor]()
    head.upsample.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    boxes = torch.tensor([[[4.0, 8.0, 90.0, 70.0]]])
    maps = [torch.rand(1, 6, 128 // stride, 160 // stride) for stride in STRIDES]
    head(maps, boxes, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(
        last[0].double(), normed(head.convs[1], normed(head.convs[0], grids[0])), rtol=1e-4, atol=1e-5
    )
