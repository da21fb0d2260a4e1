from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from boxwright.backbones.resnet import ResNet
from boxwright.layers.conv_norm import ConvNorm, conv_norm
from boxwright.layers.fused import blocks_are_faster, can_fuse
from boxwright.layers.optimize import optimize_for_cpu
from boxwright.layers.packed import PackedConv2d
from boxwright.precision import Precision, autocast
from factory import DETECTORS, random_batch, small_detector

PRECISIONS = [
    pytest.param(
        name, marks=pytest.mark.skipif(not can_fuse(dtype), reason=f"oneDNN does not support {name} on this CPU")
    )
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items()
]


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_optimized_detectors_have_the_same_detections_and_parameters(kind: str, precision: Precision) -> None:
    detector, packed = small_detector(kind).eval(), small_detector(kind).eval()
    packed.load_state_dict(detector.state_dict())
    optimize_for_cpu(packed)
    assert all(isinstance(module, PackedConv2d) for module in packed.modules() if isinstance(module, nn.Conv2d))
    assert list(packed.state_dict()) == list(detector.state_dict())
    assert all(p.dtype == torch.float32 for p in packed.parameters())
    batch = random_batch()
    exact_maps = detector.backbone(detector.normalize(batch.images, batch.image_sizes))
    with autocast(torch.device("cpu"), precision):
        packed_maps = packed.backbone(packed.normalize(batch.images, batch.image_sizes))
        plain_maps = detector.backbone(detector.normalize(batch.images, batch.image_sizes))
        actual, expected = packed.detect(batch), detector.detect(batch)
    if precision == "float32":
        for name in ("boxes", "scores", "valid"):
            torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-3, atol=1e-3)
    for level, plain_level, exact_level in zip(packed_maps, plain_maps, exact_maps, strict=True):
        error, allowed = (level.float() - exact_level).norm(), (plain_level.float() - exact_level).norm()
        assert error < 1.1 * allowed + 1e-5 * exact_level.norm(), "the error must not be larger than without packing"


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
    expected = body.double()(x.double())
    optimize_for_cpu(body.float())
    with autocast(torch.device("cpu"), precision):
        maps = body(x)
    for level, expected_level in zip(maps, expected, strict=True):
        assert (level - expected_level).norm() < (1e-5 if precision == "float32" else 0.02) * expected_level.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_packed_weights_are_cached_until_the_parameters_change(precision: Precision) -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    optimize_for_cpu(holder)
    packed, x = holder[0], torch.randn(1, 4, 8, 8)
    with autocast(torch.device("cpu"), precision):
        before = holder(x)
        cached = packed.packed(before.dtype)
        holder(x)
        assert packed.packed(before.dtype)[0] is cached[0]
        for parameter in packed.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(holder(x), 2 * before)
        for parameter in packed.parameters():
            parameter.data = 2 * parameter.data
        torch.testing.assert_close(holder(x), 4 * before)
    assert holder(x).dtype == torch.float32, "the packed weights depend on the precision"


@torch.no_grad()
def test_changed_statistics_are_folded_again() -> None:
    torch.manual_seed(0)
    body, x = ResNet(18, norm="bn"), torch.randn(2, 3, 32, 32)
    optimize_for_cpu(body.eval())
    body(x)
    body.train()(x)
    expected = ResNet(18, norm="bn").eval()
    expected.load_state_dict(body.state_dict())
    torch.testing.assert_close(body.eval()(x), expected(x))


@pytest.mark.skipif(not can_fuse(torch.bfloat16), reason="oneDNN does not support bfloat16 on this CPU")
@pytest.mark.parametrize(
    ("outputs", "dtype", "in_blocks"), [(256, "bfloat16", True), (720, "bfloat16", False), (256, "float32", False)]
)
@pytest.mark.parametrize("faster", [True, False])
def test_weights_are_in_blocks_only_if_blocks_are_full_and_faster(
    outputs: int, dtype: str, in_blocks: bool, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("boxwright.layers.packed.blocks_are_faster", lambda: faster)
    packed = PackedConv2d.of(nn.Conv2d(8, outputs, 3))
    assert packed.packed(getattr(torch, dtype))[0].is_mkldnn == (in_blocks and faster)


@pytest.mark.skipif(not can_fuse(torch.bfloat16), reason="oneDNN does not support bfloat16 on this CPU")
@pytest.mark.parametrize(("seconds_in_blocks", "faster"), [(0.5, True), (0.95, False), (5.0, False)])
def test_blocks_are_faster_if_ten_percent_are_saved(
    seconds_in_blocks: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def timed_conv(conv: nn.Conv2d, weight: torch.Tensor, *_: object) -> None:
        clock[0] += seconds_in_blocks if weight.is_mkldnn else 1.0

    monkeypatch.setattr("boxwright.layers.fused.fused_convolution", timed_conv)
    monkeypatch.setattr("boxwright.layers.fused.time.perf_counter", lambda: clock[0])
    assert blocks_are_faster.__wrapped__() == faster


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_created_in_inference_mode_are_not_cached(precision: Precision) -> None:
    torch.manual_seed(0)
    with torch.inference_mode(), autocast(torch.device("cpu"), precision):
        holder = nn.Sequential(nn.Conv2d(4, 8, 3))
        plain = holder[0]
        optimize_for_cpu(holder)
        x = torch.randn(1, 4, 9, 9)
        for _ in range(2):
            torch.testing.assert_close(holder(x), plain(x), rtol=2e-2, atol=2e-2)
            plain.weight.mul_(2)


def test_a_packed_convolution_that_is_called_has_gradients() -> None:
    holder = nn.Sequential(nn.Conv2d(4, 6, 1))
    optimize_for_cpu(holder)
    holder(torch.randn(1, 4, 5, 5)).sum().backward()
    assert holder[0].weight.grad is not None


def test_an_optimized_backbone_still_trains() -> None:
    torch.manual_seed(0)
    plain = ResNet(18, frozen_stages=0)
    packed = ResNet(18, frozen_stages=0)
    packed.load_state_dict(plain.state_dict())
    optimize_for_cpu(packed.eval())
    with torch.no_grad():
        packed(torch.randn(1, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    for body in (plain, packed):
        body.train()(x)[-1].square().sum().backward()
    for (name, actual), expected in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert (actual.grad - expected.grad).norm() <= 1e-3 * expected.grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("padding", [1, "same"])
@torch.no_grad()
def test_other_convolutions_have_the_same_output(padding: int | str, padding_mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=padding_mode, dtype=dtype)
    holder, x = nn.Sequential(convolution), torch.randn(1, 4, 5, 5, dtype=dtype)
    optimize_for_cpu(holder)
    torch.testing.assert_close(holder(x), convolution(x))
    torch.testing.assert_close(conv_norm(holder[0], None, x, relu=True), convolution(x).relu())


class _RaisingNorm:
    """Replacement of a batch norm's `forward` that must not be called."""

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("the norm was called")


@torch.no_grad()
def test_repr_names_exactly_the_norms_that_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    folded = ConvNorm(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    expected = {module: module(x) for module in (folded, plain)}
    for module in (folded, plain):
        optimize_for_cpu(module)
    assert "folds 1" in repr(folded)
    assert "packed" in repr(plain)
    assert "folds" not in repr(plain)
    torch.testing.assert_close(plain(x), expected[plain])
    monkeypatch.setattr(nn.BatchNorm2d, "forward", _RaisingNorm())
    torch.testing.assert_close(folded(x), expected[folded])
    with pytest.raises(AssertionError, match="the norm was called"):
        plain(x)
