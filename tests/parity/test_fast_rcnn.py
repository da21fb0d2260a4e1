"""Fast R-CNN equals torchvision's box head with the same weights on the same real images and the same proposals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from boxwright.backbones.fpn import resnet_fpn
from boxwright.detectors.rcnn import RCNN, fast_rcnn
from boxwright.geometry.conventions import TORCHVISION
from boxwright.heads.box_head import BoxConfig
from boxwright.structures import Batch, Proposals
from parity.peer import EVERYTHING, NUM_CLASSES, converted, in_float64, peer_faster_rcnn, peer_inputs, real_batch

NUM_PROPOSALS = (120, 75)
NUM_SLOTS = 128


@pytest.fixture(scope="module")
def batch(data_dir: Path) -> Batch:
    """Half of the proposals of each image are near its objects, half are random. Unused slots are NaN."""
    batch = real_batch(data_dir)
    generator = torch.Generator().manual_seed(1)
    boxes = torch.full((2, NUM_SLOTS, 4), torch.nan, dtype=torch.float64)
    for image, count in enumerate(NUM_PROPOSALS):
        height, width = batch.image_sizes[image].tolist()
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width - 20, height - 20])
        anywhere = torch.cat([corner, corner + 10 + 400 * torch.rand(count, 2, generator=generator)], 1)
        objects = batch.targets.boxes[image, torch.arange(count) % 6]
        around = objects + 16 * torch.rand(count, 4, generator=generator) - 8
        limits = torch.tensor([width, height, width, height])
        corners = torch.where((torch.arange(count) % 2 == 0)[:, None], around, anywhere)
        boxes[image, :count] = torch.minimum(corners.clamp(min=0), limits)
    valid = torch.arange(NUM_SLOTS) < torch.tensor(NUM_PROPOSALS)[:, None]
    scores = torch.linspace(1, 0, NUM_SLOTS).expand(2, NUM_SLOTS)
    sources = torch.arange(NUM_SLOTS).expand(2, NUM_SLOTS)
    return replace(batch, proposals=Proposals(boxes=boxes, scores=scores, valid=valid, sources=sources))


@pytest.fixture(scope="module")
def peer(batch: Batch) -> FasterRCNN:
    return peer_faster_rcnn(batch)


@pytest.fixture(scope="module")
def detector(peer: FasterRCNN) -> RCNN:
    detector = fast_rcnn(
        backbone=resnet_fpn(depth=50, frozen_stages=0, train_norm_affine=False),
        num_classes=NUM_CLASSES,
        conventions=TORCHVISION,
        box=BoxConfig(num_sampled=EVERYTHING, smooth_l1_beta=1 / 9),
    )
    detector = in_float64(detector)
    detector.load_state_dict({k: v for k, v in converted(peer.state_dict()).items() if not k.startswith("rpn.")})
    return detector


def peer_features(batch: Batch, peer: FasterRCNN) -> tuple[dict[str, Tensor], list[Tensor], list[tuple[int, int]]]:
    """Inputs of torchvision's box head: feature maps, proposals and image sizes."""
    images: ImageList = peer.transform(peer_inputs(batch)[0])[0]
    proposals = [boxes[valid] for boxes, valid in zip(batch.proposals.boxes, batch.proposals.valid, strict=True)]
    return peer.backbone(images.tensors), proposals, images.image_sizes


@torch.inference_mode()
def test_detections_equal(batch: Batch, peer: FasterRCNN, detector: RCNN) -> None:
    peer.eval()
    expected, _ = peer.roi_heads(*peer_features(batch, peer))
    actual = detector.detect(batch)
    for index, theirs in enumerate(expected):
        valid = actual.valid[index]
        assert len(theirs["boxes"]) == valid.sum() > 50, "too few detections for a meaningful comparison"
        assert (actual.scores[index][valid] - theirs["scores"]).abs().max() < 1e-9
        assert (actual.boxes[index][valid] - theirs["boxes"]).abs().max() < 1e-7
        assert torch.equal(actual.labels[index][valid] + 1, theirs["labels"])


def test_losses_and_gradients_equal(batch: Batch, peer: FasterRCNN, detector: RCNN) -> None:
    peer.train().backbone.eval()
    features, proposals, sizes = peer_features(batch, peer)
    _, expected = peer.roi_heads(features, proposals, sizes, peer_inputs(batch)[1])
    actual = detector.losses(batch)
    assert set(actual) == {"box_class", "box_regression"}
    for ours, theirs in {"box_class": "loss_classifier", "box_regression": "loss_box_reg"}.items():
        assert actual[ours].item() == pytest.approx(expected[theirs].item(), rel=1e-6), ours
        assert actual[ours] > 0
    sum(expected.values()).backward()
    sum(actual.values()).backward()
    parameters = dict(peer.named_parameters())
    gradients = converted(
        {
            name: torch.zeros_like(tensor)
            if name not in parameters or parameters[name].grad is None
            else parameters[name].grad
            for name, tensor in peer.state_dict().items()
        }
    )
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            if name.startswith("backbone.output.3"):
                continue  # no gradient: the boxes of these images are too small for the coarsest level
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 1e-6, f"{name}: {error:.1e}"
