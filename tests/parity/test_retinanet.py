"""RetinaNet equals torchvision's with the same weights on the same real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet

from boxwright.backbones.fpn import resnet_fpn
from boxwright.detectors.retinanet import RetinaNet, retinanet
from boxwright.geometry.conventions import TORCHVISION
from boxwright.heads.retina_head import RetinaConfig
from boxwright.structures import Batch, map_tensors
from parity.peer import NUM_CLASSES, converted, converted_gradients, in_float64, peer_inputs, peer_retinanet, real_batch


@pytest.fixture(scope="module")
def batch(data_dir: Path) -> Batch:
    return real_batch(data_dir)


@pytest.fixture(scope="module")
def peer(batch: Batch) -> TorchvisionRetinaNet:
    return peer_retinanet(batch)


@pytest.fixture(scope="module")
def detector(peer: TorchvisionRetinaNet) -> RetinaNet:
    detector = retinanet(
        backbone=resnet_fpn(
            depth=50, frozen_stages=0, train_norm_affine=False, out_stages=(3, 4, 5), extra="p5", extra_relu=True
        ),
        num_classes=NUM_CLASSES,
        conventions=TORCHVISION,
        retina=RetinaConfig(smooth_l1_beta=0.0, max_detections=300),
    )
    detector = in_float64(detector)
    missing, unexpected = detector.load_state_dict(converted(peer.state_dict()), strict=False)
    assert not unexpected
    assert not missing
    return detector


@torch.inference_mode()
def test_detections_equal(batch: Batch, peer: TorchvisionRetinaNet, detector: RetinaNet) -> None:
    expected = peer.eval()(peer_inputs(batch)[0])
    actual = detector.detect(batch)
    for index, theirs in enumerate(expected):
        valid = actual.valid[index]
        assert len(theirs["boxes"]) == valid.sum() > 50, "too few detections for a meaningful comparison"
        assert len(theirs["labels"].unique()) > 3
        assert (actual.scores[index][valid] - theirs["scores"]).abs().max() < 1e-9
        assert (actual.boxes[index][valid] - theirs["boxes"]).abs().max() < 1e-7
        assert torch.equal(actual.labels[index][valid], theirs["labels"])


def test_losses_and_gradients_equal(batch: Batch, peer: TorchvisionRetinaNet, detector: RetinaNet) -> None:
    """Boxwright's losses are computed per image and averaged, because torchvision normalises by image, not by batch."""
    peer.train().backbone.eval()
    expected = peer(*peer_inputs(batch, first_label=0))
    images = [map_tensors(batch, lambda tensor, i=i: tensor[i : i + 1]) for i in range(len(batch.images))]
    separate = [detector.losses(image) for image in images]
    actual = {name: torch.stack([losses[name] for losses in separate]).mean() for name in separate[0]}
    for ours, theirs in {"retina_class": "classification", "retina_box": "bbox_regression"}.items():
        assert actual[ours].item() == pytest.approx(expected[theirs].item(), rel=1e-6), ours
        assert actual[ours] > 0
    sum(expected.values()).backward()
    sum(actual.values()).backward()
    gradients = converted_gradients(peer)
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 1e-6, f"{name}: {error:.1e}"
