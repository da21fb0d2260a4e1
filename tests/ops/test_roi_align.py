from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import MultiScaleRoIAlign

from boxwright.ops import roi_align
from boxwright.ops.roi_align import multilevel_roi_align, pool_every_level
from boxwright.ops.roi_align_cpu import pool_own_level

STRIDES = [4, 8, 16, 32]
CANVAS = (256, 320)


def pyramid(num_images: int = 2, channels: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    height, width = CANVAS
    return [torch.randn(num_images, channels, height // s, width // s, dtype=dtype).requires_grad_() for s in STRIDES]


def boxes_of_all_sizes(num_images: int = 2, num_boxes: int = 40) -> Tensor:
    corner = torch.rand(num_images, num_boxes, 2) * 200 - 20
    return torch.cat([corner, corner + 2 ** (1 + 7.5 * torch.rand(num_images, num_boxes, 2))], -1)


def reference(
    features: list[Tensor], box: list[float], level: int, size: int, samples: int, aligned: bool, plus_one: float
) -> Tensor:
    """RoIAlign of one box in image 0, [C, S, S]: the average of bilinear samples, in float64 with plain loops."""
    feature, scale = features[level][0].detach().double(), 1 / STRIDES[level]
    _, height, width = feature.shape
    shift = 0.5 if aligned else 0.0
    x1, y1 = box[0] * scale - shift, box[1] * scale - shift
    box_width = (box[2] + plus_one) * scale - shift - x1
    box_height = (box[3] + plus_one) * scale - shift - y1
    if not aligned and not plus_one:
        box_width, box_height = max(box_width, 1.0), max(box_height, 1.0)
    result = torch.zeros(len(feature), size, size, dtype=torch.float64)
    for row in range(size * samples):
        for column in range(size * samples):
            y = y1 + (row + 0.5) * box_height / (size * samples)
            x = x1 + (column + 0.5) * box_width / (size * samples)
            if not (-1 <= y <= height and -1 <= x <= width):
                continue
            y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = feature[:, top, left] * (1 - x + left) + feature[:, top, right] * (x - left)
            lower = feature[:, bottom, left] * (1 - x + left) + feature[:, bottom, right] * (x - left)
            result[:, row // samples, column // samples] += upper * (1 - y + top) + lower * (y - top)
    return result / samples**2


@pytest.mark.parametrize("every_level", [False, True], ids=["cpu_form", "gpu_form"])
def test_roi_align_equals_torchvision(every_level: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if every_level:
        monkeypatch.setattr(roi_align, "pool_own_level", pool_every_level)
    torch.manual_seed(0)
    features, boxes = pyramid(), boxes_of_all_sizes()
    boxes[0, :3] = torch.tensor(
        [[8.0, 8, 120, 120], [0, 0, 224, 224], [5, 5, 5, 5]]
    )  # On and off the boundary between levels.
    ours = multilevel_roi_align(
        features,
        boxes,
        torch.ones(2, 40, dtype=torch.bool),
        strides=STRIDES,
        output_size=7,
        sampling_ratio=2,
        aligned=False,
    )
    named = OrderedDict((str(index), feature) for index, feature in enumerate(features))
    theirs = MultiScaleRoIAlign(list(named), 7, 2)(named, list(boxes), [CANVAS, CANVAS])
    # float32 rounds the position of a sample, and so the weights of the cells around it, to 1e-5 of a cell.
    largest = max(feature.abs().max().item() for feature in features)
    torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=0, atol=1e-5 * largest)
    weight = torch.randn_like(theirs)
    ours_gradients = torch.autograd.grad((ours.flatten(0, 1) * weight).sum(), features)
    theirs_gradients = torch.autograd.grad((theirs * weight).sum(), features)
    for gradient, expected in zip(ours_gradients, theirs_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("aligned", "plus_one", "pool_plus_one"),
    [(True, 0.0, True), (False, 0.0, True), (False, 1.0, True), (False, 1.0, False)],
)
def test_roi_align_equals_the_definition(aligned: bool, plus_one: float, pool_plus_one: bool) -> None:
    torch.manual_seed(1)
    features = pyramid(1)
    boxes = [[10.3, 20.1, 11.9, 21.4], [-12.0, 3.0, 90.7, 260.2], [0.0, 0.0, 111.0, 111.0], [33.3, 8.2, 311.0, 250.9]]
    # A box near the boundary between levels: plus_one changes its level.
    boxes += [[3.0, 5.0, 114.5, 116.5]]
    pooled = multilevel_roi_align(
        features,
        torch.tensor([boxes]),
        torch.ones(1, 5, dtype=torch.bool),
        strides=STRIDES,
        output_size=5,
        sampling_ratio=2,
        aligned=aligned,
        plus_one=plus_one,
        pool_plus_one=pool_plus_one,
    )
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        area = (x2 - x1 + plus_one) * (y2 - y1 + plus_one)
        level = min(max(math.floor(math.log2(math.sqrt(area) / 56) + 1e-6), 0), 3)
        expected = reference(features, boxes[index], level, 5, 2, aligned, plus_one * pool_plus_one)
        largest = max(feature.abs().max().item() for feature in features)
        torch.testing.assert_close(pooled[0, index].double(), expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("plus_one", [0.0, 1.0])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gpu_form_equals_cpu_form(aligned: bool, plus_one: float, sampling_ratio: int) -> None:
    torch.manual_seed(2)
    features, boxes = pyramid(), boxes_of_all_sizes()
    level = torch.randint(len(STRIDES) + 1, boxes.shape[:2])
    arguments = (STRIDES, 4, sampling_ratio, aligned, not aligned and bool(plus_one))
    cpu = pool_own_level(features, boxes, level, *arguments)
    gpu = pool_every_level(features, boxes, level, *arguments)
    largest = max(feature.abs().max().item() for feature in features)
    torch.testing.assert_close(cpu, gpu, rtol=0, atol=1e-5 * largest)  # The order of summation differs.
    weight = torch.randn_like(cpu)
    torch.testing.assert_close(
        torch.autograd.grad((cpu * weight).sum(), features), torch.autograd.grad((gpu * weight).sum(), features)
    )


def test_padding_does_not_change_outputs_and_gradients() -> None:
    torch.manual_seed(3)
    features, boxes = pyramid(), boxes_of_all_sizes()
    valid = torch.rand(2, 40) < 0.5
    for form in (pool_own_level, pool_every_level):
        results = []
        for padding in (torch.nan, 1e9, 3.0):
            filled = torch.where(valid[..., None], boxes, padding).requires_grad_()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(roi_align, "pool_own_level", form)
                pooled = multilevel_roi_align(features, filled, valid, strides=STRIDES, output_size=3, aligned=True)
            assert not pooled[~valid].any()
            results.append((pooled, *torch.autograd.grad((pooled - 1).square().sum(), features)))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("every_level", [False, True], ids=["cpu_form", "gpu_form"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_in_half_precision_sums_are_not_rounded_on_the_way(
    channels_last: bool, every_level: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if every_level:
        monkeypatch.setattr(roi_align, "pool_own_level", pool_every_level)
    torch.manual_seed(4)
    half, boxes = pyramid(channels=64, dtype=torch.bfloat16), boxes_of_all_sizes()
    if channels_last:
        half = [feature.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for feature in half]
    exact = [feature.detach().double().requires_grad_() for feature in half]
    valid, gradient = torch.ones(2, 40, dtype=torch.bool), torch.randn(2, 40, 64, 7, 7).bfloat16()
    results = []
    for features in (half, exact):
        pooled = multilevel_roi_align(features, boxes, valid, strides=STRIDES, output_size=7, aligned=True)
        results.append((pooled, *torch.autograd.grad(pooled, features, gradient.to(pooled.dtype))))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        rounding = (expected.bfloat16() - expected).norm()
        assert (ours - expected).norm() <= 2 * rounding, "only inputs and outputs are rounded"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by opcheck
@pytest.mark.parametrize("num_valid", [0, 6])
def test_roi_align_is_a_valid_operator_and_compiles_to_one_graph(num_valid: int) -> None:
    torch.manual_seed(5)
    features, boxes = pyramid(), boxes_of_all_sizes(num_boxes=6)
    valid = (torch.arange(6) < num_valid).expand(2, 6)
    level = torch.where(valid, torch.randint(4, (2, 6)), 4)
    torch.library.opcheck(pool_own_level, (features, boxes, level, STRIDES, 3, 2, True, False))

    def loss(features: list[Tensor], boxes: Tensor) -> Tensor:
        doubled = [feature * 2 for feature in features]
        return (multilevel_roi_align(doubled, boxes, valid, strides=STRIDES, output_size=3, aligned=True) ** 2).sum()

    for form in (pool_own_level, pool_every_level):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(roi_align, "pool_own_level", form)
            torch._dynamo.reset()
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(features, boxes)
            eager = loss(features, boxes)
            torch.testing.assert_close(compiled, eager)
            torch.testing.assert_close(torch.autograd.grad(compiled, features), torch.autograd.grad(eager, features))
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = [mode.from_tensor(feature) for feature in features]
                gradients = torch.autograd.grad(loss(fakes, mode.from_tensor(boxes)), fakes)
                assert [gradient.shape for gradient in gradients] == [feature.shape for feature in features]


@pytest.mark.parametrize("triton", [False, True])
def test_on_gpus_the_triton_form_is_used_only_if_enabled(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("pool_every_level", "pool_own_level"):
        form = getattr(roi_align, name)
        monkeypatch.setattr(roi_align, name, lambda *args, name=name, form=form: calls.append(name) or form(*args))
    if triton:
        monkeypatch.setattr(roi_align, "TRITON", True)
    with FakeTensorMode():  # Fake tensors have only shapes, so no GPU is needed.
        features = [feature.to("cuda") for feature in pyramid()]
        boxes, valid = torch.empty(2, 6, 4, device="cuda"), torch.empty(2, 6, dtype=torch.bool, device="cuda")
        pooled = multilevel_roi_align(features, boxes, valid, strides=STRIDES, output_size=3)
        assert (pooled.shape, pooled.device.type) == ((2, 6, 3, 3, 3), "cuda")
    assert calls == ["pool_own_level" if triton else "pool_every_level"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boxes_without_a_level_give_zeros(dtype: torch.dtype) -> None:
    features, boxes = pyramid(dtype=dtype), boxes_of_all_sizes()
    no_level = torch.full(boxes.shape[:2], len(STRIDES))
    pooled = pool_own_level(features, boxes, no_level, STRIDES, 3, 2, True, False)
    assert (pooled.shape, pooled.dtype) == ((2, 40, 3, 3, 3), dtype)
    assert not pooled.any()
