from __future__ import annotations

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from boxwright.backbones.backbone import Backbone
from boxwright.backbones.fpn import FPN, resnet_fpn
from boxwright.backbones.resnet import ResNet


def test_equals_torchvision() -> None:
    torch.manual_seed(0)
    ours = FPN(ResNet(18), channels=32).eval()
    theirs = FeaturePyramidNetwork(ours.body.channels, 32, extra_blocks=LastLevelMaxPool())
    with torch.no_grad():
        for i in range(4):
            for layer, inner in (
                (ours.lateral[i], theirs.inner_blocks[i][0]),
                (ours.output[i], theirs.layer_blocks[i][0]),
            ):
                layer.bias.normal_()
                inner.load_state_dict(layer.state_dict())
        images = torch.randn(2, 3, 64, 96)
        expected = theirs(dict(enumerate(ours.body(images)))).values()
        levels = ours(images)
    assert ours.channels == [32] * 5
    assert ours.strides == [4, 8, 16, 32, 64]
    for level, other in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, other, atol=1e-5, rtol=1e-5)


def test_is_a_backbone_with_a_map_for_each_stride() -> None:
    model = resnet_fpn(depth=18, channels=64)
    assert isinstance(model, Backbone)
    shapes = [tuple(level.shape) for level in model(torch.zeros(1, 3, 96, 160))]
    # The coarsest is rounded up: 96 / 64 = 1.5.
    assert shapes == [(1, 64, 24, 40), (1, 64, 12, 20), (1, 64, 6, 10), (1, 64, 3, 5), (1, 64, 2, 3)]


def test_without_extra_level() -> None:
    model = FPN(ResNet(18), channels=32, extra=None)
    assert model.strides == [4, 8, 16, 32]
    assert len(model(torch.zeros(1, 3, 32, 32))) == 4


def test_group_norm_takes_the_bias_place() -> None:
    model = resnet_fpn(depth=18, norm="gn", fpn_norm="gn", frozen_stages=0, channels=64)
    names = {name for name, _ in model.named_parameters()}
    assert "lateral.0.1.weight" in names
    assert "lateral.0.0.bias" not in names
    sum(level.square().sum() for level in model.train()(torch.randn(1, 3, 32, 32))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("norm", ["frozen_bn", "gn"])
def test_is_one_graph(norm: str) -> None:
    model = resnet_fpn(depth=18, channels=32, norm=norm).train()
    explained = torch._dynamo.explain(model)(torch.randn(1, 3, 64, 64))
    assert explained.graph_break_count == 0
