from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from boxwright.backbones.backbone import Backbone
from boxwright.backbones.resnet import Bottleneck, ResNet
from boxwright.layers.norm import FrozenBatchNorm2d, make_norm


def with_random_norms(model: nn.Module) -> nn.Module:
    """Set norms to values other than 0 and 1, so that ignoring one is detected, without activations that explode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.4, 0.6)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


RESNEXT_50 = {"depth": 50, "groups": 32, "width_per_group": 4}


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((f"resnet{depth}", {"depth": depth}) for depth in (18, 34, 50, 101)), ("resnext50_32x4d", RESNEXT_50)],
)
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_resnet_equals_torchvision(name: str, settings: dict, norm: str) -> None:
    torch.manual_seed(settings["depth"])
    theirs = with_random_norms(getattr(torchvision.models, name)())
    ours = ResNet(**settings, norm=norm)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    # Frozen statistics are used in training mode, too.
    ours.train(norm == "frozen_bn")
    getter = IntermediateLayerGetter(theirs, {f"layer{i}": str(i) for i in range(1, 5)})
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, maps = getter(images).values(), ours(images)
    for ours_map, their_map, channels, stride in zip(maps, expected, ours.channels, ours.strides, strict=True):
        assert ours_map.shape == (1, channels, 64 // stride, 96 // stride)
        torch.testing.assert_close(ours_map, their_map, rtol=0, atol=1e-5 * their_map.abs().max().item())


@pytest.mark.parametrize(("name", "groups", "width"), [("resnext101_32x8d", 32, 8), ("resnext101_64x4d", 64, 4)])
def test_resnext_101_has_the_parameters_of_torchvision(name: str, groups: int, width: int) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
        ours = ResNet(101, groups=groups, width_per_group=width, norm="bn").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}


def test_resnext_101_32x4d_has_the_published_number_of_parameters() -> None:
    # The paper (table 2) and its code have 44.18 million parameters, including 2048 x 1000 + 1000 of the classifier.
    with torch.device("meta"):
        body = ResNet(101, groups=32, width_per_group=4)
    assert sum(p.numel() for p in body.parameters()) + 2_049_000 == 44_177_704


def saved_bytes(model: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    """A loss of the feature maps, and the size of the activations that autograd saves for its gradient."""
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # a reference, so that the address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = sum((x.square().mean() for x in model(images)), torch.zeros(()))
    return total, sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn"])
def test_recompute_only_reduces_memory(norm: str) -> None:
    torch.manual_seed(0)
    plain = ResNet(50, norm=norm, frozen_stages=1).train()
    recomputing = ResNet(50, norm=norm, frozen_stages=1, recompute=True).train()
    recomputing.load_state_dict(deepcopy(plain.state_dict()))
    images = torch.randn(2, 3, 64, 96)
    plain_loss, plain_bytes = saved_bytes(plain, images)
    loss, recomputing_bytes = saved_bytes(recomputing, images)
    assert torch.equal(loss, plain_loss)
    assert recomputing_bytes < 0.35 * plain_bytes
    plain_loss.backward()
    loss.backward()
    for (name, ours), theirs in zip(recomputing.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == name.startswith(("conv1.", "bn1.", "layer1.")), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, recomputing.get_buffer(name)), f"{name} must be updated exactly once"
    assert all(m.momentum == 0.1 for m in recomputing.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn"])
def test_recompute_compiles_to_one_graph_with_the_same_gradients_and_statistics(norm: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ResNet(18, norm=norm, recompute=True).train()
    twin = deepcopy(model)
    images = torch.randn(2, 3, 64, 64)

    def loss(body: nn.Module) -> Tensor:
        return sum((x.square().mean() for x in body(images)), torch.zeros(()))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(model)
    eager = loss(twin)
    torch.testing.assert_close(compiled, eager)
    compiled.backward()
    eager.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            largest = theirs.grad.abs().max().item()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4 * largest, msg=name)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), msg=name)


def test_a_resnet_is_a_backbone() -> None:
    assert isinstance(ResNet(18), Backbone)


def test_caffe_style_has_the_stride_in_the_first_convolution() -> None:
    for style, strides in (("pytorch", (1, 2)), ("caffe", (2, 1))):
        block = ResNet(50, style=style).get_submodule("layer2.0")
        assert isinstance(block, Bottleneck)
        assert (block.conv1.stride[0], block.conv2.stride[0]) == strides


def test_frozen_stages_have_no_gradients_and_keep_their_statistics() -> None:
    model = ResNet(18, norm="bn", frozen_stages=2).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    maps = model(torch.randn(2, 3, 64, 64))
    assert [x.requires_grad for x in maps] == [False, False, True, True]
    frozen = ("conv1.", "bn1.", "layer1.", "layer2.")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith(frozen), name


def test_frozen_stages_of_0_freezes_nothing() -> None:
    assert all(p.requires_grad for p in ResNet(18, norm="gn", frozen_stages=0).parameters())


@pytest.mark.parametrize("train_affine", [True, False])
def test_train_norm_affine_trains_scale_and_bias_of_frozen_batch_norms(train_affine: bool) -> None:
    model = ResNet(18, train_norm_affine=train_affine).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sum(x.sum() for x in model(torch.randn(1, 3, 32, 32))).backward()
    norm = model.get_submodule("layer4.1.bn2")
    assert isinstance(norm, FrozenBatchNorm2d)
    assert (norm.weight.grad is not None) == train_affine
    assert (norm.bias.grad is not None) == train_affine
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_frozen_batch_norm_keeps_bfloat16() -> None:
    norm = FrozenBatchNorm2d(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_sync_bn_equals_bn_in_one_process() -> None:
    x = torch.randn(3, 8, 4, 4)
    torch.testing.assert_close(make_norm("sync_bn", 8)(x), make_norm("bn", 8)(x))


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 32), (48, 16), (12, 4), (7, 1)])
def test_group_norm_has_at_most_32_groups_that_divide_the_channels(channels: int, groups: int) -> None:
    norm = make_norm("gn", channels)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups


def test_stages_above_the_last_map_are_not_built() -> None:
    model = ResNet(18, out_stages=(3, 4))
    assert (model.channels, model.strides) == ([128, 256], [8, 16])
    assert not hasattr(model, "layer4")
    assert [x.shape[-1] for x in model(torch.zeros(1, 3, 32, 32))] == [4, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 20}, "18, 34, 50, 101"),
        ({"style": "torch"}, "'caffe'"),
        ({"norm": "layer"}, "frozen_bn"),
        ({"out_stages": (5, 4)}, "ascending"),
        ({"out_stages": ()}, "ascending"),
        ({"frozen_stages": 5}, "0 to 4"),
        ({"depth": 34, "groups": 32}, "50 or 101"),
    ],
)
def test_invalid_settings_are_an_error_that_lists_the_choices(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**settings)
