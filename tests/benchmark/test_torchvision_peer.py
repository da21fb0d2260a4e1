"""The torchvision peer has the same architecture and weights, so that its layers compute the same outputs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from boxwright.backbones.backbone import CAFFE
from boxwright.backbones.fpn import resnet_fpn
from boxwright.benchmark.random_weights import settle
from boxwright.benchmark.torchvision_models import family_of
from boxwright.benchmark.torchvision_peer import (
    TorchvisionDetector,
    TorchvisionSystem,
    object_bitmaps,
    torchvision_peer,
    unpadded_images,
)
from boxwright.detectors.proposal_network import proposal_network
from boxwright.detectors.rcnn import fast_rcnn, faster_rcnn, mask_rcnn
from boxwright.detectors.retinanet import retinanet
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.structures import Batch
from boxwright.training.experiment import SGD, build
from factory import SMALL_BOX, SMALL_MASK, SMALL_RETINA, SMALL_RPN, random_batch
from training.own_parts import ScaledBoxHead

CPU = torch.device("cpu")
R18: Any = partial(resnet_fpn, depth=18, channels=32)
MODELS: dict[str, Any] = {
    "rpn": partial(proposal_network, backbone=R18, rpn=SMALL_RPN),
    "faster_rcnn": partial(
        faster_rcnn, backbone=partial(R18, norm="gn", fpn_norm="gn", frozen_stages=0), rpn=SMALL_RPN, box=SMALL_BOX
    ),
    "mask_rcnn": partial(
        mask_rcnn,
        backbone=partial(resnet_fpn, depth=50, channels=32, style="caffe", groups=32, width_per_group=4),
        pixel_stats=CAFFE,
        rpn=SMALL_RPN,
        # Low, so that some detections pass with only 3 classes.
        box=replace(SMALL_BOX, score_threshold=0.001),
        mask=SMALL_MASK,
    ),
    "retinanet": partial(
        retinanet,
        backbone=partial(R18, channels=64, out_stages=(3, 4, 5), extra="c5"),
        retina=RetinaConfig(num_convs=2, norm="gn", score_threshold=0.001),
    ),
    "retinanet of P2 to P6": partial(retinanet, backbone=R18, retina=SMALL_RETINA),
}


@pytest.fixture(scope="module")
def batch() -> Batch:
    torch.manual_seed(0)
    return random_batch(canvas=(64, 96))


def pair(name: str, batch: Batch) -> tuple[nn.Module, TorchvisionDetector]:
    torch.manual_seed(0)
    ours = build(MODELS[name], num_classes=3).eval()
    settle(ours, batch)
    return ours, torchvision_peer(MODELS[name], ours).eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_layer_computes_the_same_as_torchvision(name: str, batch: Batch) -> None:
    ours, peer = pair(name, batch)
    model = peer.model
    images, _ = model.transform(unpadded_images(batch))
    peer_features = list(model.backbone(images.tensors).values())
    features = ours.backbone(ours.normalize(batch.images, batch.image_sizes))
    if ours.backbone.extra == "c5":  # torchvision has a ReLU between P6 and P7; mmdetection 0.5 and Boxwright do not
        features[-1] = ours.backbone.extra_output[1](features[-2].relu())
    assert_close(peer_features, features)
    if name.startswith("retinanet"):
        output, peer_output = ours.head(features, (64, 96)), model.head(peer_features)
        assert_close([peer_output["cls_logits"]], [torch.cat(output.logits, 1)])
        assert_close([peer_output["bbox_regression"]], [output.deltas])
        return
    objectness, _ = model.rpn.head(peer_features)
    assert_close(
        [torch.cat([o.permute(0, 2, 3, 1).flatten(1) for o in objectness], 1)],
        [ours.rpn(features, (64, 96)).objectness],
    )
    if name == "rpn":
        return
    rois = torch.rand(5, 32, 7, 7)
    logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(rois))
    hidden = ours.box_head.fc2(ours.box_head.fc1(rois.flatten(1)).relu()).relu()
    assert_close(
        [logits.roll(-1, 1), deltas[:, 4:]], [ours.box_head.class_logits(hidden), ours.box_head.box_deltas(hidden)]
    )
    if name == "mask_rcnn":
        hidden = rois
        for conv in ours.mask_head.convs:
            hidden = conv(hidden).relu()
        mask_logits = ours.mask_head.mask_logits(ours.mask_head.upsample(hidden).relu())
        assert_close([model.roi_heads.mask_predictor(model.roi_heads.mask_head(rois))[:, 1:]], [mask_logits])


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        assert expected_tensor.std() > 0
        atol = 1e-3 * expected_tensor.abs().max().item()
        torch.testing.assert_close(actual_tensor, expected_tensor, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", ["rpn", "mask_rcnn", "retinanet"])
def test_training_steps_compute_gradients_but_change_no_weights(name: str, batch: Batch) -> None:
    _, peer = pair(name, batch)
    system = TorchvisionSystem(peer, SGD(), device=CPU, precision="float32", training=True)
    before = {key: tensor.clone() for key, tensor in peer.state_dict().items()}
    system.train_step(system.prepare(batch))
    trained = [p for p in peer.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert all(torch.equal(tensor, before[key]) for key, tensor in peer.state_dict().items())
    inference = TorchvisionSystem(peer, SGD(), device=CPU, precision="float32", training=False)
    inference.infer(inference.prepare(batch))
    assert peer.detect(batch).valid.any()


def test_detections_are_in_pixel_coordinates_of_the_files(batch: Batch) -> None:
    _, peer = pair("mask_rcnn", batch)
    with torch.inference_mode():
        peer.model.transform.file_sizes = [(112, 160)] * 2  # twice the resized image, 56 x 80
        in_file = peer.model(unpadded_images(batch))
        peer.model.transform.file_sizes = None
        resized = peer.model(unpadded_images(batch))
    assert in_file[0]["masks"].shape[-2:] == (112, 160)
    torch.testing.assert_close(in_file[0]["boxes"], 2 * resized[0]["boxes"])


def test_object_bitmaps_cover_the_frames_of_their_grids(batch: Batch) -> None:
    masks, targets = batch.targets.masks, batch.targets
    masks.bitmaps[0, 0] = 255
    masks.frames[0, 0] = torch.tensor([8.0, 16.0, 40.0, 32.0])
    masks.bitmaps[1, 0] = 0
    bitmaps = object_bitmaps(batch, targets.valid)
    expected = torch.zeros(56, 80, dtype=torch.uint8)
    expected[16:32, 8:40] = 1
    assert (bitmaps[0][0] != expected).sum() <= 4  # only the corners may differ
    assert not bitmaps[1][0].any()
    assert bitmaps[0].shape[0] == targets.valid[0].sum()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (partial(fast_rcnn, backbone=R18), "no equivalent of fast_rcnn"),
        (partial(faster_rcnn, backbone=R18, box=BoxConfig(class_agnostic=True)), "class_agnostic=True"),
        (partial(faster_rcnn, backbone=partial(R18, extra=None)), "always has an extra level"),
    ],
)
def test_models_without_a_torchvision_equivalent_are_rejected(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchvision_peer(model, build(model, num_classes=3))


def test_the_family_follows_from_the_model_factory() -> None:
    assert [family_of(model) for model in MODELS.values()] == [name.partition(" ")[0] for name in MODELS]


def test_a_model_with_a_head_of_a_user_has_no_peer() -> None:
    with pytest.raises(ValueError, match=r"peers have no training\.own_parts\.ScaledBoxHead"):
        family_of(partial(faster_rcnn, backbone=resnet_fpn, box_head=ScaledBoxHead))
