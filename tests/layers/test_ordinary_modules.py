"""Every part of a detector is called: hooks, subclasses, pruning, parametrizations and replaced parts take effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from boxwright.backbones.resnet import ResNet
from boxwright.layers.optimize import optimize_for_cpu
from factory import DETECTORS, random_batch, small_detector

LAYERS = ("backbone.body.layer1.0.conv2", "backbone.output.0", "rpn.conv", "box_head.fc1", "mask_head.mask_logits")
"""Layers of a Mask R-CNN that a fast path could bypass."""


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules inside a model that have a `forward`."""
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            yield name, module


def fired(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Names of the parts whose forward hooks fire."""
    names: set[str] = set()
    handles = [part.register_forward_hook(lambda *_, name=name: names.add(name) or None) for name, part in parts(model)]
    run()
    for handle in handles:
        handle.remove()
    return names


def random_batch_of(seed: int) -> Any:
    torch.manual_seed(seed)
    return random_batch()


def outputs(detector: Any) -> list[Tensor]:
    """The losses, and the boxes, scores and masks of the detections."""
    batch = random_batch_of(0)
    with torch.no_grad():
        losses, detections = detector.losses(batch), detector.detect(batch)
    masks = () if detections.masks is None else (detections.masks,)
    return [*losses.values(), detections.boxes, detections.scores, *masks]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, expected_tensor in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, rtol=1e-3, atol=1e-3)


def differ(first: list[Tensor], second: list[Tensor]) -> bool:
    return any(not torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn"])
def test_all_hooks_of_a_resnet_fire(norm: Any, training: bool, optimized: bool) -> None:
    body = ResNet(18, norm=norm, frozen_stages=0).train(training)
    if optimized:
        optimize_for_cpu(body)
    images = torch.randn(1, 3, 64, 64)
    leaves = {name for name, part in parts(body) if not list(part.children())}
    assert len(leaves) == 40
    assert fired(body, lambda: body(images)) == {name for name, _ in parts(body)} > leaves
    with torch.no_grad():
        assert fired(body, lambda: body(images)) > leaves


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("kind", DETECTORS)
def test_all_hooks_of_a_detector_fire_and_change_nothing(kind: str, optimized: bool) -> None:
    detector: Any = small_detector(kind)
    if optimized:
        optimize_for_cpu(detector)
    batch = random_batch()
    names = {name for name, _ in parts(detector)}
    assert fired(detector, lambda: detector.losses(batch)) == names
    with torch.no_grad():
        assert fired(detector.eval(), lambda: detector.detect(batch)) == names
    unhooked = outputs(detector)
    for _, part in parts(detector):
        part.register_forward_hook(lambda *_: None)
    assert_same(outputs(detector), unhooked)


def test_global_hooks_see_every_part() -> None:
    detector: Any = small_detector("mask_rcnn")
    seen: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module) or None)
    try:
        detector.losses(random_batch())
    finally:
        handle.remove()
    assert seen >= {part for _, part in parts(detector)}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # The images need no gradient.
@pytest.mark.parametrize("kind", ["mask_rcnn", "normed_mask_rcnn", "retinanet"])
def test_full_backward_hooks_of_all_leaves_fire_and_change_no_gradient(kind: str) -> None:
    hooked: Any = small_detector(kind)
    plain: Any = small_detector(kind)
    names: set[str] = set()
    leaves = [(name, part) for name, part in parts(hooked) if list(part.parameters()) and not list(part.children())]
    for name, part in leaves:
        part.register_full_backward_hook(lambda *_, name=name: names.add(name) or None)
    for detector in (hooked, plain):
        sum(detector.losses(random_batch_of(0)).values()).backward()
    assert names == {name for name, _ in leaves}
    for (name, parameter), other in zip(hooked.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 1e-3 * other.grad.norm() + 1e-6, name


def test_outputs_that_hooks_keep_are_not_overwritten() -> None:
    """Grad-CAM and feature extraction keep the tensors that hooks get; a ReLU in place would change them."""
    torch.manual_seed(0)
    body, kept = ResNet(18).eval(), {}
    for name, part in parts(body):
        part.register_forward_hook(lambda _, __, y, name=name: kept.update({name: (y, y.clone())}))
    body(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(y, copy) for y, copy in kept.values())
    assert kept["layer1.0.bn1"][0].min() < 0


class AbsoluteConv2d(nn.Conv2d):
    """A convolution with the absolute values of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.abs(), self.bias)


class AbsoluteLinear(nn.Linear):
    """A linear layer with the absolute values of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.abs(), self.bias)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_forward_of_a_subclass_is_used(layer: str, optimized: bool) -> None:
    absolute, dense = small_detector("mask_rcnn").eval(), small_detector("mask_rcnn").eval()
    untouched = outputs(dense)
    absolute.get_submodule(layer).__class__ = AbsoluteLinear if layer.endswith("fc1") else AbsoluteConv2d
    with torch.no_grad():
        dense.get_submodule(layer).weight.abs_()  # type: ignore[operator, union-attr]
    if optimized:
        optimize_for_cpu(absolute)
    assert_same(outputs(absolute), outputs(dense))
    assert differ(outputs(absolute), untouched)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_pruned_weights_are_zero(layer: str, optimized: bool) -> None:
    pruned, dense = small_detector("mask_rcnn").eval(), small_detector("mask_rcnn").eval()
    if optimized:
        optimize_for_cpu(pruned)
    untouched = outputs(pruned)
    prune.random_unstructured(pruned.get_submodule(layer), "weight", 0.7)
    mask: Any = pruned.get_submodule(layer).weight_mask
    assert 0.2 < mask.mean() < 0.4
    with torch.no_grad():
        dense.get_submodule(layer).weight.mul_(mask)  # type: ignore[operator, union-attr]
    assert_same(outputs(pruned), outputs(dense))
    assert differ(outputs(pruned), untouched)


class LowRank(nn.Module):
    """LoRA for any convolution or linear layer: the frozen layer plus a product of two small layers."""

    def __init__(self, base: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        if isinstance(base, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding)
            self.up: nn.Module = nn.Conv2d(2, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, 2)
            self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_low_rank_adapters_start_with_the_output_of_the_layer_and_train(layer: str, optimized: bool) -> None:
    detector: Any = small_detector("mask_rcnn")
    if optimized:
        optimize_for_cpu(detector.eval())
    before = outputs(detector)
    parent, name = layer.rpartition(".")[::2]
    adapter = LowRank(detector.get_submodule(layer))
    setattr(detector.get_submodule(parent), name, adapter)
    assert_same(outputs(detector.eval()), before)
    detector.train()
    optimizer = torch.optim.SGD([*adapter.up.parameters(), *adapter.down.parameters()], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        sum(detector.losses(random_batch_of(0)).values()).backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.up.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.down.parameters())
    assert differ(outputs(detector.eval()), before)


class Halved(nn.Module):
    """A parametrization of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("layer", LAYERS)
def test_parametrized_weights_are_used_and_train(layer: str) -> None:
    detector: Any = small_detector("mask_rcnn").eval()
    expected = deepcopy(detector)
    with torch.no_grad():
        expected.get_submodule(layer).weight.div_(2)
    module = detector.get_submodule(layer)
    parametrize.register_parametrization(module, "weight", Halved())
    assert_same(outputs(detector), outputs(expected))
    sum(detector.losses(random_batch_of(0)).values()).backward()
    sum(expected.losses(random_batch_of(0)).values()).backward()
    gradient = expected.get_submodule(layer).weight.grad
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(module.parametrizations.weight.original.grad, gradient / 2, rtol=1e-3, atol=1e-5)


def test_a_replaced_shortcut_is_called() -> None:
    torch.manual_seed(0)
    body = ResNet(18).eval()
    x = torch.randn(1, 64, 8, 8)
    block: Any = body.layer2[0]
    conv, norm = block.downsample
    block.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(64, 128, 1, bias=False), norm)
    expected = norm(block.downsample[1](nn.functional.avg_pool2d(x, 2)))
    main = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    torch.testing.assert_close(block(x), (main + expected).relu())
    block.downsample = conv
    torch.testing.assert_close(block(x), (main + conv(x)).relu())


def test_a_stage_of_a_resnet_can_be_replaced() -> None:
    body = ResNet(18, out_stages=(2, 3)).eval()
    body.layer2 = nn.Sequential(nn.Conv2d(64, 128, 2, stride=2), nn.ReLU())
    maps = body(torch.randn(1, 3, 64, 64))
    assert torch.equal(maps[1], body.layer2(maps[0]))


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32)),
        lambda: nn.Conv2d(32, 32, 5, padding=2),
        lambda: nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        lambda: nn.Conv2d(32, 32, 3, padding=1, groups=2),
        lambda: nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
    ],
    ids=["group_norm", "kernel_5", "dilation", "groups", "reflect"],
)
def test_a_replaced_convolution_of_the_rpn_trains_and_detects(conv: Callable[[], nn.Module]) -> None:
    detector: Any = small_detector("mask_rcnn")
    torch.manual_seed(1)
    detector.rpn.conv = conv()
    maps = [torch.randn(2, 32, size, size) for size in (16, 8, 4, 2)]
    total = sum(3 * size**2 for size in (16, 8, 4, 2))
    indices = torch.randint(total, (2, 50))
    objectness, deltas = detector.rpn.at_anchors(maps, (64, 64), indices)
    dense = [detector.rpn.objectness(detector.rpn.conv(x).relu()).permute(0, 2, 3, 1).flatten(1) for x in maps]
    torch.testing.assert_close(objectness, torch.cat(dense, 1).gather(1, indices))
    dense = [detector.rpn.deltas(detector.rpn.conv(x).relu()).permute(0, 2, 3, 1).reshape(2, -1, 4) for x in maps]
    torch.testing.assert_close(deltas, torch.cat(dense, 1).gather(1, indices[..., None].expand(-1, -1, 4)))
    batch = random_batch()
    sum(detector.losses(batch).values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in detector.rpn.conv.parameters())
    assert detector.detect(batch).valid.any()


def test_the_forward_of_an_rpn_subclass_is_trained() -> None:
    from boxwright.heads.rpn_head import RPNHead, RPNOutput

    class Shifted(RPNHead):
        def forward(self, *args: Any) -> RPNOutput:
            output = super().forward(*args)
            return output._replace(objectness=output.objectness + 1)

    detector: Any = small_detector("faster_rcnn")
    maps = [torch.randn(1, 32, size, size) for size in (16, 8, 4, 2)]
    indices = torch.arange(10)[None]
    stock, _ = detector.rpn.at_anchors(maps, (64, 64), indices)
    detector.rpn.__class__ = Shifted
    shifted, _ = detector.rpn.at_anchors(maps, (64, 64), indices)
    torch.testing.assert_close(shifted, stock + 1)


def test_a_replaced_last_layer_of_the_mask_head_is_called() -> None:
    detector: Any = small_detector("mask_rcnn").eval()
    head = detector.mask_head
    maps = [torch.randn(1, 32, size, size) for size in (16, 8, 4, 2)]
    boxes, labels = torch.tensor([[[3.0, 4.0, 40.0, 50.0], [8.0, 2.0, 30.0, 33.0]]]), torch.tensor([[2, 0]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    stock = head(maps, boxes, labels, valid)
    conv = head.mask_logits
    head.mask_logits = nn.Sequential(conv)
    torch.testing.assert_close(head(maps, boxes, labels, valid), stock)
    head.mask_logits = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
    head.mask_logits.weight = conv.weight
    expected = stock - conv.bias[labels][..., None, None]
    torch.testing.assert_close(head(maps, boxes, labels, valid), expected, rtol=1e-4, atol=1e-5)
