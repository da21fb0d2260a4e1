"""ResNet and ResNeXt as backbones; parameters are named as in torchvision.

B images, H x W canvas. Map C2 comes from `layer1` at stride 4, C5 from `layer4` at stride 32.

Sources: He et al., Deep Residual Learning (2016); Xie et al., Aggregated Residual Transformations (2017); computing
activations again in the backward pass: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boxwright.layers.conv_norm import conv_norm
from boxwright.layers.norm import Norm, make_norm

Style = Literal["pytorch", "caffe"]

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@contextmanager
def _keeping_statistics(module: nn.Module) -> Iterator[None]:
    """While it lasts, norms that use the batch's statistics add nothing of them to their running ones."""
    norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """The block's output, of whose computation only `x` is kept for the backward pass."""
    if torch.compiler.is_compiling():
        # One graph holds both computations, and the compiler updates statistics once.
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _keeping_statistics(block)

    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

    expansion = 1
    conv_norms = (("conv1", "bn1"), ("conv2", "bn2"))
    """Convolutions and the norm that `forward` applies to the output of each."""

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        style: Style,
        norm: Norm,
        train_affine: bool,
        inner: int,
        groups: int,
    ) -> None:
        """See `ResNet`; `style`, `inner` and `groups` change nothing here."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = make_norm(norm, width, train_affine=train_affine)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = make_norm(norm, width, train_affine=train_affine)
        self.downsample = _shortcut(inputs, width, stride, norm, train_affine)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else conv_norm(self.downsample, None, x)
        x = conv_norm(self.conv1, self.bn1, x, relu=True)
        return conv_norm(self.conv2, self.bn2, x, shortcut, relu=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50 and 101, ResNeXt)."""

    expansion = 4
    conv_norms = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    """Convolutions and the norm that `forward` applies to the output of each."""

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        style: Style,
        norm: Norm,
        train_affine: bool,
        inner: int,
        groups: int,
    ) -> None:
        """See `ResNet`; the stride is that of the first convolution ("caffe") or of the second ("pytorch").

        The second has `inner` channels in `groups` groups, and `4 * width` come out.
        """
        super().__init__()
        stride1, stride2 = (stride, 1) if style == "caffe" else (1, stride)
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, inner, 1, stride1, bias=False)
        self.bn1 = make_norm(norm, inner, train_affine=train_affine)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride2, padding=1, groups=groups, bias=False)
        self.bn2 = make_norm(norm, inner, train_affine=train_affine)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = make_norm(norm, outputs, train_affine=train_affine)
        self.downsample = _shortcut(inputs, outputs, stride, norm, train_affine)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, 4 * width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else conv_norm(self.downsample, None, x)
        x = conv_norm(self.conv1, self.bn1, x, relu=True)
        x = conv_norm(self.conv2, self.bn2, x, relu=True)
        return conv_norm(self.conv3, self.bn3, x, shortcut, relu=True)


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm, train_affine: bool) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), make_norm(norm, outputs, train_affine=train_affine)
    )


class _Stage(nn.Sequential):
    """Residual blocks, one after another."""

    def __init__(self, blocks: Sequence[nn.Module], *, recompute: bool) -> None:
        super().__init__(*blocks)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        for block in self:
            x = _recomputed(block, x) if self.recompute and torch.is_grad_enabled() else block(x)
        return x


class ResNet(nn.Module):
    """ResNet without its classifier; a torchvision state dict less `fc.*` loads as it is."""

    conv_norms = (("conv1", "bn1"),)
    """Convolutions and the norm that `forward` applies to the output of each."""

    def __init__(
        self,
        depth: int = 50,
        *,
        style: Style = "pytorch",
        norm: Norm = "frozen_bn",
        frozen_stages: int = 1,
        train_norm_affine: bool = True,
        out_stages: Sequence[int] = (2, 3, 4, 5),
        groups: int = 1,
        width_per_group: int = 64,
        recompute: bool = False,
    ) -> None:
        """Build it with random weights.

        Args:
            depth: 18, 34, 50 or 101.
            style: where a bottleneck has its stride: "pytorch" in the 3x3 convolution, "caffe" in the first 1x1.
            norm: see `make_norm`.
            frozen_stages: the stem and this many stages do not learn; 0 trains everything.
            train_norm_affine: whether the scales and biases of "frozen_bn" learn in the stages that do.
            out_stages: the maps to give, of 2 (stride 4) to 5 (stride 32); stages above the last are not built.
            groups: of the 3x3 convolution of a bottleneck; above 1 it is a ResNeXt.
            width_per_group: channels of a group in the first stage; 32 groups of 4 are ResNeXt 32x4d.
            recompute: blocks that learn keep their input alone and compute the rest again in the backward pass: less
                memory, more time. Results, gradients and statistics stay the same.
        """
        super().__init__()
        if depth not in BLOCKS_PER_STAGE:
            raise ValueError(f"ResNet depth {depth} is none of {', '.join(map(str, BLOCKS_PER_STAGE))}")
        if style not in ("pytorch", "caffe"):
            raise ValueError(f"ResNet style {style!r} is neither 'pytorch' nor 'caffe'")
        if depth < 50 and (groups, width_per_group) != (1, 64):
            raise ValueError(f"ResNet-{depth} has no bottlenecks: groups and width_per_group need a depth of 50 or 101")
        if not out_stages or list(out_stages) != sorted(set(out_stages) & {2, 3, 4, 5}):
            raise ValueError(f"ResNet out_stages {tuple(out_stages)}: give rising numbers of 2 to 5")
        self.num_stages = max(out_stages) - 1
        if not 0 <= frozen_stages <= self.num_stages:
            raise ValueError(f"ResNet frozen_stages {frozen_stages} is not within 0..{self.num_stages}")
        block = BasicBlock if depth < 50 else Bottleneck
        self.out_stages = tuple(out_stages)
        self.frozen_stages = frozen_stages
        self.recompute = recompute
        self.channels = [2 ** (stage + 4) * block.expansion for stage in out_stages]
        self.strides = [2**stage for stage in out_stages]

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(norm, 64, train_affine=train_norm_affine)
        inputs = 64
        for index, num_blocks in enumerate(BLOCKS_PER_STAGE[depth][: self.num_stages]):
            width, stride = 64 * 2**index, 1 if index == 0 else 2
            inner = width_per_group * 2**index * groups
            blocks = []
            for _ in range(num_blocks):
                blocks.append(block(inputs, width, stride, style, norm, train_norm_affine, inner, groups))
                inputs, stride = width * block.expansion, 1
            self.add_module(f"layer{index + 1}", _Stage(blocks, recompute=recompute and index >= frozen_stages))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # The pictures need no gradient either, so autograd keeps nothing of what runs before the first trained stage.
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    def _stage(self, index: int) -> nn.Module:
        return self.get_submodule(f"layer{index}")

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages == 0:
            return []
        return [self.conv1, self.bn1, *(self._stage(i + 1) for i in range(self.frozen_stages))]

    def train(self, mode: bool = True) -> ResNet:
        """As in any module, but frozen stages stay in evaluation mode, so that theirs are constants with any norm."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised pixels -> the maps of `out_stages`."""
        x = conv_norm(self.conv1, self.bn1, images, relu=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = []
        for index in range(self.num_stages):
            x = self._stage(index + 1)(x)
            if index + 2 in self.out_stages:
                maps.append(x)
        return maps
