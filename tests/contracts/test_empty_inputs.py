"""Operators accept zero images, zero boxes, zero candidates and zero object slots."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from boxwright.assign.match import IGNORED, NEGATIVE, match
from boxwright.assign.sample import hardest, sample
from boxwright.evaluation.paste import paste_masks
from boxwright.ops import roi_align
from boxwright.ops.mask_target import mask_target
from boxwright.ops.nms import nms
from boxwright.ops.roi_align import multilevel_roi_align, pool_every_level
from boxwright.ops.soft_nms import every_box_a_round, soft_nms
from boxwright.structures import MaskGrids, Targets

EMPTY = [(0, 0), (0, 5), (2, 0)]
"""Number of images and number of boxes per image."""


def targets_of(num_images: int, num_slots: int) -> Targets:
    return Targets(
        boxes=torch.tensor([10.0, 10, 30, 30]).repeat(num_images, num_slots, 1),
        labels=torch.zeros(num_images, num_slots, dtype=torch.int64),
        valid=torch.ones(num_images, num_slots, dtype=torch.bool),
        crowd=torch.zeros(num_images, num_slots, dtype=torch.bool),
    )


@pytest.mark.parametrize("form", ["cpu", "gpu"])
@pytest.mark.parametrize(("num_images", "num_boxes"), EMPTY)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align(
    form: str, num_images: int, num_boxes: int, sampling_ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "gpu":
        monkeypatch.setattr(roi_align, "pool_own_level", pool_every_level)
    maps = [torch.rand(num_images, 3, 16 >> level, 24 >> level, requires_grad=True) for level in range(2)]
    boxes = torch.zeros(num_images, num_boxes, 4)
    pooled = multilevel_roi_align(
        maps, boxes, boxes[..., 0] == 0, strides=(4, 8), output_size=7, sampling_ratio=sampling_ratio
    )
    assert pooled.shape == (num_images, num_boxes, 3, 7, 7)
    pooled.sum().backward()
    if num_images:  # torchvision does not accept a batch without images
        theirs = [level.detach().requires_grad_() for level in maps]
        pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
        features = OrderedDict(zip("01", theirs, strict=True))
        expected = pool(features, list(boxes), [(64, 96)] * num_images)
        assert expected.shape == pooled.flatten(0, 1).shape
    for level in maps:
        assert level.grad is not None
        assert torch.equal(level.grad, torch.zeros_like(level))


def test_roi_align_without_feature_maps_is_refused() -> None:
    with pytest.raises(ValueError, match="no feature maps"):
        multilevel_roi_align([], torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), strides=(), output_size=7)


@pytest.mark.parametrize("max_keep", [0, 3])
@pytest.mark.parametrize(("num_images", "num_boxes"), EMPTY)
def test_nms(num_images: int, num_boxes: int, max_keep: int) -> None:
    boxes, scores = torch.zeros(num_images, num_boxes, 4), torch.ones(num_images, num_boxes)
    groups, valid = scores.long(), scores.bool()
    results = [
        nms(boxes, scores, groups, valid, iou_threshold=0.5, max_keep=max_keep),
        every_box_a_round(boxes, scores, groups, valid, True, 0.5, 0.5, 0.0, max_keep, 0.0),
        soft_nms(
            *(boxes, scores, groups, valid),
            decay="linear",
            iou_threshold=0.5,
            sigma=0.5,
            min_score=0,
            max_keep=max_keep,
        ),
    ]
    for indices, *_, keep in results:
        assert indices.shape == keep.shape == (num_images, max_keep)
        assert not keep.any()


@pytest.mark.parametrize("form", ["operator", "tiles"])
@pytest.mark.parametrize("low_quality", [None, 0.0, 0.3])
@pytest.mark.parametrize("shared", [False, True], ids=["per image", "shared"])
@pytest.mark.parametrize(
    ("num_images", "num_slots", "num_candidates"), [(0, 0, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)]
)
def test_match(
    form: str,
    low_quality: float | None,
    shared: bool,
    num_images: int,
    num_slots: int,
    num_candidates: int,
) -> None:
    device = "meta" if form == "tiles" else "cpu"
    candidates = torch.rand((num_candidates, 4) if shared else (num_images, num_candidates, 4), device=device)
    targets = targets_of(num_images, num_slots)
    if device == "meta":  # the meta device takes the code path of GPUs
        targets = Targets(**{n: getattr(targets, n).to("meta") for n in ("boxes", "labels", "valid", "crowd")})
    thresholds: dict[str, Any] = {"positive_iou": 0.7, "negative_iou": 0.3, "low_quality": low_quality}
    matches = match(candidates, targets, **thresholds)
    assert matches.labels.shape == matches.matched.shape == (num_images, num_candidates)
    if device == "meta":
        return
    assert (matches.labels == NEGATIVE).all()
    assert (matches.matched == 0).all()
    left_out = torch.zeros(num_images, num_candidates, dtype=torch.bool)
    assert (match(candidates, targets, **thresholds, candidates_valid=left_out).labels == IGNORED).all()


@pytest.mark.parametrize(("num_images", "num_candidates"), EMPTY)
def test_sampling(num_images: int, num_candidates: int) -> None:
    labels = torch.zeros(num_images, num_candidates, dtype=torch.int64)
    for num in (0, 3):
        size = min(num, num_candidates)
        seeds = torch.zeros(num_images, dtype=torch.int64)
        for sampled in (
            sample(labels, seeds, num=num, positive_fraction=0.5),
            hardest(labels, labels.float(), labels, num=num, positive_fraction=0.5),
        ):
            assert sampled.indices.shape == sampled.valid.shape == sampled.positive.shape == (num_images, size)


@pytest.mark.parametrize("num_slots", [0, 3])
@pytest.mark.parametrize(("num_images", "num_boxes"), [*EMPTY, (2, 5)])
def test_mask_targets(num_slots: int, num_images: int, num_boxes: int) -> None:
    def full(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(num_images, *shape, dtype=dtype)

    masks = MaskGrids(
        bitmaps=full(num_slots, 8, 8, dtype=torch.uint8),
        frames=full(num_slots, 4),
        valid=full(num_slots, dtype=torch.bool),
    )
    target = mask_target(
        masks,
        full(num_boxes, 4),
        full(num_boxes, dtype=torch.int64),
        full(num_boxes, dtype=torch.bool),
        output_size=7,
    )
    assert target.shape == (num_images, num_boxes, 7, 7)
    assert target.dtype == torch.bool
    assert not target.any()


def test_pasting() -> None:
    nothing = paste_masks(np.zeros((0, 7, 7), np.float32), np.zeros((0, 4)), np.zeros((0, 2), np.int64))
    assert len(nothing) == 0
    boxes, sizes = np.array([[3.0, 3, 3, 3], [0, 0, 9, 9]]), np.array([[10, 10], [0, 0]])
    pasted = paste_masks(np.ones((2, 7, 7), np.float32), boxes, sizes)
    assert [int(mask.sum()) for mask in pasted] == [0, 0]
