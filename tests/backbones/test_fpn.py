from __future__ import annotations

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from boxwright.backbones.backbone import Backbone
from boxwright.backbones.fpn import FPN, resnet_fpn
from boxwright.backbones.resnet import ResNet


@pytest.mark.parametrize("extra", ["pool", "p5", "c5"])
def test_fpn_equals_torchvision(extra: str) -> None:
    torch.manual_seed(0)
    ours = FPN(ResNet(18), channels=32, extra=extra, extra_relu=True).eval()
    # LastLevelP6P7 computes P6 from P5 (RetinaNet v2 of torchvision) or from C5 (v1). It decides by the channels.
    extra_blocks = LastLevelMaxPool() if extra == "pool" else LastLevelP6P7(32 if extra == "p5" else 512, 32)
    theirs = FeaturePyramidNetwork(ours.body.channels, 32, extra_blocks=extra_blocks)
    pairs = [(ours.lateral[i], theirs.inner_blocks[i][0]) for i in range(4)]
    pairs += [(ours.output[i], theirs.layer_blocks[i][0]) for i in range(4)]
    pairs += zip(ours.extra_output, extra_blocks.children(), strict=True)
    with torch.no_grad():
        for layer, other in pairs:
            layer.bias.normal_()
            other.load_state_dict(layer.state_dict())
        images = torch.randn(2, 3, 64, 96)
        expected = theirs(dict(enumerate(ours.body(images)))).values()
        levels = ours(images)
    assert ours.channels == [32] * len(levels)
    assert ours.strides == [4, 8, 16, 32, 64, 128][: len(levels)]
    for level, other in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_without_extra_relu_p7_is_a_convolution_of_p6() -> None:
    torch.manual_seed(0)
    model = resnet_fpn(depth=18, channels=16, out_stages=(3, 4, 5), extra="c5")
    assert model.strides == [8, 16, 32, 64, 128]
    images = torch.randn(1, 3, 128, 160)
    c5, (*_, p6, p7) = model.body(images)[-1], model(images)
    assert (p6 < 0).any()
    assert torch.equal(p6, model.extra_output[0](c5))
    assert torch.equal(p7, model.extra_output[1](p6))
    assert [tuple(level.shape[2:]) for level in (p6, p7)] == [(2, 3), (1, 2)]


def test_an_unknown_extra_level_is_an_error_that_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="'pool', 'c5', 'p5' or None"):
        FPN(ResNet(18), extra="c4")


def test_an_fpn_is_a_backbone_with_one_map_per_stride() -> None:
    model = resnet_fpn(depth=18, channels=64)
    assert isinstance(model, Backbone)
    shapes = [tuple(level.shape) for level in model(torch.zeros(1, 3, 96, 160))]
    # The height of the coarsest map is rounded up: 96 / 64 = 1.5.
    assert shapes == [(1, 64, 24, 40), (1, 64, 12, 20), (1, 64, 6, 10), (1, 64, 3, 5), (1, 64, 2, 3)]


def test_an_fpn_without_extra_levels() -> None:
    model = FPN(ResNet(18), channels=32, extra=None)
    assert model.strides == [4, 8, 16, 32]
    assert len(model(torch.zeros(1, 3, 32, 32))) == 4


def test_group_norm_replaces_the_bias() -> None:
    model = resnet_fpn(depth=18, norm="gn", fpn_norm="gn", frozen_stages=0, channels=64)
    names = {name for name, _ in model.named_parameters()}
    assert "lateral.0.1.weight" in names
    assert "lateral.0.0.bias" not in names
    sum(level.square().sum() for level in model.train()(torch.randn(1, 3, 32, 32))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("norm", ["frozen_bn", "gn"])
def test_an_fpn_compiles_to_one_graph(norm: str) -> None:
    model = resnet_fpn(depth=18, channels=32, norm=norm).train()
    explained = torch._dynamo.explain(model)(torch.randn(1, 3, 64, 64))
    assert explained.graph_break_count == 0
