"""Any timm model that gives a pyramid of maps, as a backbone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from boxwright.backbones.fpn import FPN

STRIDES = (4, 8, 16, 32)


class TimmBackbone(nn.Module):
    """The maps at strides 4 to 32 of a timm model."""

    def __init__(self, name: str, *, pretrained: bool = False) -> None:
        """Build the model.

        Args:
            name: as timm knows it; `timm.list_models("*convnext*")` finds names.
            pretrained: whether timm loads (and the first time fetches) the model's published weights.

        Raises:
            ValueError: timm is not installed, has no such model, or the model gives no maps at strides 4, 8, 16, 32.
        """
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ValueError(
                "timm backbones need timm, which is not installed: pip install 'boxwright[timm]'"
            ) from error
        if not timm.is_model(name):
            raise ValueError(f"timm knows no model {name!r}; timm.list_models('*{name[:5]}*') lists some alike")
        # Models made for one picture size must take any canvas.
        any_size: dict[str, Any] = {"strict_img_size": False} if name.startswith("swin") else {}
        try:
            self.model = timm.create_model(name, features_only=True, pretrained=pretrained, **any_size)
        except RuntimeError as error:
            raise ValueError(f"timm model {name!r} gives no feature maps: {error}") from error
        info: Any = self.model.feature_info
        reductions: list[int] = info.reduction()
        if not set(STRIDES) <= set(reductions):
            raise ValueError(f"timm model {name!r} gives maps at strides {reductions}; 4, 8, 16 and 32 are needed")
        # The deepest map of each stride.
        self.indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
        channels: list[int] = info.channels()
        self.channels = [channels[index] for index in self.indices]
        self.strides = list(STRIDES)
        self.channels_last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised pixels -> [B, channels[l], H / strides[l], W / strides[l]], finest first."""
        maps: list[Tensor] = self.model(images)
        chosen = [maps[index] for index in self.indices]
        return [x.permute(0, 3, 1, 2).contiguous() for x in chosen] if self.channels_last else chosen


def timm_fpn(*, name: str, pretrained: bool = False, channels: int = 256) -> FPN:
    """P2 to P6 on a timm model.

    Args:
        name: as timm knows it, e.g. "convnext_tiny" or "mobilenetv3_large_100".
        pretrained: whether timm loads (and the first time fetches) the model's published weights. Most want the
            default `pixel_stats` of a detector; `timm.get_pretrained_cfg(name)` tells.
        channels: of every level.
    """
    return FPN(TimmBackbone(name, pretrained=pretrained), channels=channels)
