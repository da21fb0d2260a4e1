"""ResNet and ResNeXt backbones; parameters have the same names as in torchvision.

B images, H x W canvas. Feature map C2 is the output of `layer1` (stride 4), C5 of `layer4` (stride 32).

Sources: He et al., Deep Residual Learning (2016); Xie et al., Aggregated Residual Transformations (2017); activation
checkpointing: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boxwright.layers.conv_norm import ConvNorm, conv_norm
from boxwright.layers.norm import Norm, make_norm

Style = Literal["pytorch", "caffe"]

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@contextmanager
def _frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Within the block, batch norms do not update their running statistics."""
    norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Apply a block with activation checkpointing: only `x` is kept for the backward pass."""
    if torch.compiler.is_compiling():
        # The compiler traces forward and recomputation into one graph and updates running statistics only once.
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _frozen_running_statistics(block)

    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

    expansion = 1
    conv_norms = (("conv1", "bn1"), ("conv2", "bn2"))
    """Pairs of a convolution and the normalisation layer that `forward` applies to its output."""

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
        """See `ResNet`; `style`, `inner` and `groups` have no effect."""
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
    """Pairs of a convolution and the normalisation layer that `forward` applies to its output."""

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
        """See `ResNet`. The stride is applied by the first convolution ("caffe") or the second ("pytorch").

        The second convolution has `inner` channels in `groups` groups. The block has `4 * width` output channels.
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


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm, train_affine: bool) -> ConvNorm | None:
    if stride == 1 and inputs == outputs:
        return None
    return ConvNorm(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), make_norm(norm, outputs, train_affine=train_affine)
    )


class _Stage(nn.Sequential):
    """A sequence of residual blocks, optionally with activation checkpointing."""

    def __init__(self, blocks: Sequence[nn.Module], *, recompute: bool) -> None:
        super().__init__(*blocks)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        for block in self:
            x = _checkpointed(block, x) if self.recompute and torch.is_grad_enabled() else block(x)
        return x


class ResNet(nn.Module):
    """ResNet without its classifier. A torchvision state dict without `fc.*` can be loaded unchanged."""

    conv_norms = (("conv1", "bn1"),)
    """Pairs of a convolution and the normalisation layer that `forward` applies to its output."""

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
        """Build a ResNet with random weights.

        Args:
            depth: 18, 34, 50 or 101.
            style: which convolution of a bottleneck has the stride: "pytorch" the 3x3, "caffe" the first 1x1.
            norm: normalisation layer, see `make_norm`.
            frozen_stages: number of frozen stages, including the stem; 0 trains everything, the stem too.
            train_norm_affine: whether the scales and biases of "frozen_bn" are trained in the stages that are not
                frozen.
            out_stages: stages whose feature maps are returned, from 2 (stride 4) to 5 (stride 32). Stages above the
                last of them are not built.
            groups: number of groups of the 3x3 convolution of a bottleneck; ResNeXt if above 1.
            width_per_group: number of channels per group in the first stage; ResNeXt 32x4d has 32 groups of 4.
            recompute: activation checkpointing: trained blocks keep only their input and recompute the rest in the
                backward pass, which saves memory and takes more time. Results, gradients and running statistics are
                unchanged.
        """
        super().__init__()
        if depth not in BLOCKS_PER_STAGE:
            raise ValueError(f"ResNet depth: expected one of {', '.join(map(str, BLOCKS_PER_STAGE))}, got {depth}")
        if style not in ("pytorch", "caffe"):
            raise ValueError(f"ResNet style: expected 'pytorch' or 'caffe', got {style!r}")
        if depth < 50 and (groups, width_per_group) != (1, 64):
            raise ValueError(f"ResNet-{depth} has no bottlenecks: groups and width_per_group need a depth of 50 or 101")
        if not out_stages or list(out_stages) != sorted(set(out_stages) & {2, 3, 4, 5}):
            raise ValueError(f"ResNet out_stages: expected ascending numbers from 2 to 5, got {tuple(out_stages)}")
        self.num_stages = max(out_stages) - 1
        if not 0 <= frozen_stages <= self.num_stages:
            raise ValueError(f"ResNet frozen_stages: expected 0 to {self.num_stages}, got {frozen_stages}")
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
        # Images need no gradient either, so autograd stores no activations before the first trained stage.
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
        """Set the mode of all modules. Frozen stages stay in evaluation mode, so that their norms are constant."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised pixels -> feature maps of `out_stages`, finest first."""
        x = conv_norm(self.conv1, self.bn1, images, relu=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = []
        for index in range(self.num_stages):
            x = self._stage(index + 1)(x)
            if index + 2 in self.out_stages:
                maps.append(x)
        return maps
