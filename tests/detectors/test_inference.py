from __future__ import annotations

import pytest
import torch
from torch import nn

from boxwright.backbones.convolve import convolve
from boxwright.backbones.fused import FusedConv2d
from boxwright.backbones.resnet import ResNet
from boxwright.detectors.inference import can_fuse, fuse_convolutions
from boxwright.evaluation.evaluate import Precision, autocast
from factory import DETECTORS, random_batch, small_detector

PRECISIONS = [
    pytest.param(precision, marks=pytest.mark.skipif(not can_fuse(precision), reason=f"no {precision} for oneDNN here"))
    for precision in ("float32", "bfloat16")
]


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_fused_detectors_detect_as_plain_ones_and_keep_their_parameters(kind: str, precision: Precision) -> None:
    detector, fused = small_detector(kind).eval(), small_detector(kind).eval()
    fused.load_state_dict(detector.state_dict())
    fuse_convolutions(fused, precision)
    assert all(isinstance(module, FusedConv2d) for module in fused.modules() if isinstance(module, nn.Conv2d))
    assert list(fused.state_dict()) == list(detector.state_dict())
    assert all(p.dtype == torch.float32 for p in fused.parameters())
    batch = random_batch()
    exact = detector.backbone(detector.normalize(batch.images, batch.image_sizes))
    with autocast(torch.device("cpu"), precision):
        ours = fused.backbone(fused.normalize(batch.images, batch.image_sizes))
        plain = detector.backbone(detector.normalize(batch.images, batch.image_sizes))
        found, wanted = fused.detect(batch), detector.detect(batch)
    if precision == "float32":
        for name in ("boxes", "scores", "valid"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=1e-3)
    for level, plain_level, exact_level in zip(ours, plain, exact, strict=True):
        error, allowed = (level.float() - exact_level).norm(), (plain_level.float() - exact_level).norm()
        assert error < 1.1 * allowed + 1e-5 * exact_level.norm(), "as near as without fusing"


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_norms_of_a_resnet_are_folded_in(precision: Precision, groups: int) -> None:
    torch.manual_seed(0)
    body = ResNet(50, groups=groups, width_per_group=64 if groups == 1 else 4).eval()
    for module in body.modules():
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.2, 0.5)
    x = torch.randn(1, 3, 64, 64)
    wanted = body(x)
    fuse_convolutions(body, precision)
    for ours, exact in zip(body(x), wanted, strict=True):
        assert (ours.float() - exact).norm() < (1e-5 if precision == "float32" else 0.02) * exact.norm()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_sum_and_relu_are_those_asked_for(precision: Precision, adds: bool, relu: bool) -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    x, added = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8, 8) if adds else None
    wanted = convolve(holder[0], None, x, added, relu=relu)
    before = None if added is None else added.clone()
    fuse_convolutions(holder, precision)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if precision == "bfloat16" else {}
    torch.testing.assert_close(convolve(holder[0], None, x, added, relu=relu).float(), wanted, **tolerance)
    assert added is None or torch.equal(added, before), "what is added is not written to"


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_changed_weights_are_read_anew(precision: Precision) -> None:
    convolution = nn.Conv2d(4, 8, 3, padding=1)
    holder = nn.Sequential(convolution)
    fuse_convolutions(holder, precision)
    x = torch.randn(1, 4, 8, 8)
    before = holder(x)
    convolution.weight.mul_(2)
    convolution.bias.mul_(2)
    torch.testing.assert_close(holder(x), 2 * before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_convolutions_made_in_inference_mode_are_read_as_they_are(precision: Precision) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        holder = nn.Sequential(nn.Conv2d(4, 8, 3))
        plain = holder[0]
        fuse_convolutions(holder, precision)
        x = torch.randn(1, 4, 9, 9)
        for _ in range(2):
            torch.testing.assert_close(holder(x).float(), plain(x), rtol=2e-2, atol=2e-2)
            plain.weight.mul_(2)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 8, 3, padding="same"),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 8, 3).double(),
    ],
    ids=["padding by name", "reflected", "float64"],
)
def test_convolutions_of_other_kinds_stay_as_they_are(convolution: nn.Conv2d) -> None:
    holder = nn.Sequential(convolution)
    fuse_convolutions(holder, "float32")
    assert holder[0] is convolution
