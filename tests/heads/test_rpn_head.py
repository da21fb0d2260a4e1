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


def test_every_answer_stands_at_its_anchor() -> None:
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


def test_anchors_over_the_border_are_left_out_of_training_only_where_asked() -> None:
    sizes = torch.tensor([[64, 96], [32, 32]])
    anchors = torch.tensor([[0.0, 0.0, 64.0, 64.0], [0.0, 0.0, 32.0, 32.0], [-1.0, 0.0, 20.0, 20.0]])
    strict = RPNHead(6, STRIDES, RPNConfig(border=0.0))
    assert strict._inside(anchors, sizes).tolist() == [[True, True, False], [False, True, False]]
    assert RPNHead(6, STRIDES, RPNConfig(border=None))._inside(anchors, sizes) is None


@pytest.mark.parametrize("training", [True, False])
def test_proposals_are_sorted_inside_the_picture_and_as_many_as_configured(training: bool) -> None:
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


def test_testing_may_take_padding_for_picture_and_training_never() -> None:
    torch.manual_seed(0)
    conventions = replace(CAFFE2, proposal_clip_multiple=32)
    head = RPNHead(6, STRIDES, RPNConfig(num_proposals=2000), conventions)
    sizes = torch.tensor([[50, 90], [64, 96]])
    output = head(features(), (64, 96))
    for training, corner in ((True, [89.0, 49.0]), (False, [95.0, 63.0])):
        proposals = head.proposals(output, sizes, training=training)
        boxes = proposals.boxes[0][proposals.valid[0]]
        assert boxes[:, 2:].amax(0).tolist() == corner


def test_more_convolutions_follow_the_first_each_with_a_relu() -> None:
    head = RPNHead(6, STRIDES, RPNConfig(num_convs=3))
    maps = features()
    torch.manual_seed(0)
    for conv in (head.conv, *head.more_convs):
        torch.nn.init.normal_(conv.weight, std=0.3)
    hidden = maps[0]
    for conv in (head.conv, *head.more_convs):
        hidden = torch.nn.functional.conv2d(hidden, conv.weight, conv.bias, padding=1).clamp(min=0)
    wanted = head.objectness(hidden)
    assert wanted.std() > 0
    assert torch.equal(head(maps, (64, 96)).objectness[:, : 16 * 24 * 3 : 3], wanted[:, 0].flatten(1))


def test_at_least_one_convolution_is_asked_for() -> None:
    with pytest.raises(ValueError, match="num_convs=0"):
        RPNConfig(num_convs=0)
