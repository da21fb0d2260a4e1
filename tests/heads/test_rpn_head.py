from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from boxwright.geometry.conventions import CAFFE2
from boxwright.heads.rpn_head import RPNConfig, RPNHead

STRIDES = (4, 8)


def features(num_images: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(num_images, 6, 64 // s, 96 // s, generator=generator) for s in STRIDES]


def test_objectness_and_deltas_have_the_order_of_the_anchors() -> None:
    head = RPNHead(6, STRIDES, RPNConfig(ratios=(0.5, 1.0)))
    maps = features()
    output = head(maps, (64, 96))
    assert output.level_lengths == (16 * 24 * 2, 8 * 12 * 2)
    level, y, x, ratio = 1, 3, 5, 1
    index = output.level_lengths[0] + (y * 12 + x) * 2 + ratio
    hidden = head.conv(maps[level]).relu()
    assert torch.equal(output.objectness[:, index], head.objectness(hidden)[:, ratio, y, x])
    assert torch.equal(output.deltas[:, index], head.deltas(hidden)[:, 4 * ratio : 4 * ratio + 4, y, x])
    assert output.anchors[index].tolist() == [5 * 8 - 32, 3 * 8 - 32, 5 * 8 + 32, 3 * 8 + 32]


def test_the_border_setting_excludes_anchors_that_cross_the_image_border() -> None:
    sizes = torch.tensor([[64, 96], [32, 32]])
    anchors = torch.tensor([[0.0, 0.0, 64.0, 64.0], [0.0, 0.0, 32.0, 32.0], [-1.0, 0.0, 20.0, 20.0]])
    strict = RPNHead(6, STRIDES, RPNConfig(border=0.0))
    assert strict._inside(anchors, sizes).tolist() == [[True, True, False], [False, True, False]]
    assert RPNHead(6, STRIDES, RPNConfig(border=None))._inside(anchors, sizes) is None


@pytest.mark.parametrize("training", [True, False])
def test_proposals_are_sorted_clipped_and_limited_in_number(training: bool) -> None:
    torch.manual_seed(0)
    config = RPNConfig(pre_nms_per_level=50, num_proposals=30, test_pre_nms_per_level=20, test_num_proposals=10)
    head = RPNHead(6, STRIDES, config)
    sizes = torch.tensor([[60, 90], [64, 96]])
    output = head(features(), (64, 96))
    proposals = head.proposals(output, sizes, training=training)
    assert proposals.valid.shape == (2, 30 if training else 10)
    assert (proposals.scores.diff(dim=1)[proposals.valid[:, 1:]] <= 0).all()
    boxes = proposals.boxes[0][proposals.valid[0]]
    assert len(boxes)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([90, 60, 90, 60])).all()
    scores = output.objectness.sigmoid().gather(1, proposals.sources)
    assert torch.equal(scores[proposals.valid], proposals.scores[proposals.valid])


@pytest.mark.parametrize("num_convs", [1, 3])
def test_at_anchors_equals_the_dense_output_and_its_gradient(num_convs: int) -> None:
    torch.manual_seed(0)
    head = RPNHead(6, STRIDES, RPNConfig(ratios=(0.5, 1.0), num_convs=num_convs)).double()
    maps = [feature.double().requires_grad_() for feature in features()]
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    output = head(maps, (64, 96))
    # Corners and edges of both levels, where the convolution reads padding, and random anchors.
    total = sum(output.level_lengths)
    corners = torch.tensor([0, 1, 47, 767, output.level_lengths[0], total - 1])
    indices = torch.stack([torch.cat([corners, torch.randint(total, (40,))]) for _ in range(2)])
    objectness, deltas = head.at_anchors(maps, (64, 96), indices)
    dense = output.objectness.gather(1, indices), output.deltas.gather(1, indices[..., None].expand(-1, -1, 4))
    weights = torch.randn_like(dense[0]), torch.randn_like(dense[1])
    inputs = [*maps, *head.parameters()]

    def gradients(objectness: torch.Tensor, deltas: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((objectness * weights[0]).sum() + (deltas * weights[1]).sum(), inputs)

    torch.testing.assert_close((objectness, deltas), dense, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(objectness, deltas), gradients(*dense), rtol=0, atol=1e-10)


def test_proposal_clip_multiple_applies_only_to_testing() -> None:
    torch.manual_seed(0)
    conventions = replace(CAFFE2, proposal_clip_multiple=32)
    head = RPNHead(6, STRIDES, RPNConfig(num_proposals=2000), conventions)
    sizes = torch.tensor([[50, 90], [64, 96]])
    output = head(features(), (64, 96))
    for training, corner in ((True, [89.0, 49.0]), (False, [95.0, 63.0])):
        proposals = head.proposals(output, sizes, training=training)
        boxes = proposals.boxes[0][proposals.valid[0]]
        assert boxes[:, 2:].amax(0).tolist() == corner


def test_each_of_several_convolutions_is_followed_by_a_relu() -> None:
    head = RPNHead(6, STRIDES, RPNConfig(num_convs=3))
    maps = features()
    torch.manual_seed(0)
    for conv in (head.conv, *head.more_convs):
        torch.nn.init.normal_(conv.weight, std=0.3)
    hidden = maps[0]
    for conv in (head.conv, *head.more_convs):
        hidden = torch.nn.functional.conv2d(hidden, conv.weight, conv.bias, padding=1).clamp(min=0)
    expected = head.objectness(hidden)
    assert expected.std() > 0
    assert torch.equal(head(maps, (64, 96)).objectness[:, : 16 * 24 * 3 : 3], expected[:, 0].flatten(1))


def test_num_convs_of_0_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"num_convs\S*: expected a whole number, at least 1"):
        RPNConfig(num_convs=0)
