from __future__ import annotations

import pytest
import torch
from torch import nn

from boxwright.backbones.packed import PackedConv2d
from boxwright.backbones.resnet import ResNet
from boxwright.detectors.inference import can_pack, pack_convolutions
from factory import DETECTORS, random_batch, small_detector

pytestmark = pytest.mark.skipif(not can_pack(), reason="this CPU has no bfloat16 for oneDNN")


@pytest.mark.parametrize("kind", DETECTORS)
@torch.no_grad()
def test_packed_detectors_detect_as_autocast_does_and_keep_their_parameters(kind: str) -> None:
    detector, packed = small_detector(kind).eval(), small_detector(kind).eval()
    packed.load_state_dict(detector.state_dict())
    pack_convolutions(packed)
    assert any(isinstance(module, PackedConv2d) for module in packed.modules())
    assert list(packed.state_dict()) == list(detector.state_dict())
    assert all(p.dtype == torch.float32 for p in packed.parameters())
    batch = random_batch()
    wanted = detector.backbone(detector.normalize(batch.images, batch.image_sizes))
    with torch.autocast("cpu", torch.bfloat16):
        given = packed.backbone(packed.normalize(batch.images, batch.image_sizes))
        plain = detector.backbone(detector.normalize(batch.images, batch.image_sizes))
        packed.detect(batch)
    for ours, autocasts, exact in zip(given, plain, wanted, strict=True):
        error, allowed = (ours.float() - exact).norm(), (autocasts.float() - exact).norm()
        assert error < 1.1 * allowed + 1e-6, "as near float32 as without packing"


@pytest.mark.parametrize("groups", [1, 32])
@torch.no_grad()
def test_norms_of_a_resnet_are_folded_in(groups: int) -> None:
    torch.manual_seed(0)
    body = ResNet(50, groups=groups, width_per_group=64 if groups == 1 else 4).eval()
    for module in body.modules():
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.2, 0.5)
    x = torch.randn(1, 3, 64, 64)
    wanted = body(x)
    pack_convolutions(body)
    for ours, exact in zip(body(x), wanted, strict=True):
        assert (ours.float() - exact).norm() < 0.02 * exact.norm()


@torch.no_grad()
def test_changed_weights_are_laid_out_anew() -> None:
    convolution = nn.Conv2d(4, 8, 3, padding=1)
    holder = nn.Sequential(convolution)
    pack_convolutions(holder)
    x = torch.randn(1, 4, 8, 8)
    before = holder(x)
    convolution.weight.mul_(2)
    convolution.bias.mul_(2)
    torch.testing.assert_close(holder(x), 2 * before)


def test_convolutions_made_in_inference_mode_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        holder = nn.Sequential(nn.Conv2d(4, 8, 3))
        plain = holder[0]
        pack_convolutions(holder)
        x = torch.randn(1, 4, 9, 9)
        for _ in range(2):
            torch.testing.assert_close(holder(x).float(), plain(x), rtol=2e-2, atol=2e-2)
            plain.weight.mul_(2)
