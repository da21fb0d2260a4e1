"""timm models with feature maps at strides 4, 8, 16 and 32, as backbones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from boxwright.backbones.fpn import FPN

STRIDES = (4, 8, 16, 32)


class TimmBackbone(nn.Module):
    """A timm model that returns its feature maps at strides 4, 8, 16 and 32."""

    def __init__(self, name: str, *, pretrained: bool = False) -> None:
        """Build the model.

        Args:
            name: name of the timm model; `timm.list_models("*convnext*")` lists names.
            pretrained: whether timm loads the published weights of the model, which it downloads the first time.

        Raises:
            ValueError: timm is not installed, has no such model, or the model has no feature maps at strides 4, 8, 16
                and 32.
        """
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ValueError(
                "timm backbones need timm, which is not installed. Run pip install 'boxwright[timm]'."
            ) from error
        if not timm.is_model(name):
            raise ValueError(f"timm has no model {name!r}. timm.list_models('*{name[:5]}*') lists similar names")
        # Models for a fixed image size must accept any canvas size.
        any_size: dict[str, Any] = {"strict_img_size": False} if name.startswith("swin") else {}
        try:
            self.model = timm.create_model(name, features_only=True, pretrained=pretrained, **any_size)
        except RuntimeError as error:
            raise ValueError(f"timm model {name!r} has no feature maps: {error}") from error
        info: Any = self.model.feature_info
        reductions: list[int] = info.reduction()
        if not set(STRIDES) <= set(reductions):
            raise ValueError(f"timm model {name!r}: expected feature maps at strides 4, 8, 16 and 32, got {reductions}")
        # The deepest feature map of each stride.
        self.indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
        channels: list[int] = info.channels()
        self.channels = [channels[index] for index in self.indices]
        self.strides = list(STRIDES)
        self.channels_last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised pixels -> [B, channels[l], H / strides[l], W / strides[l]], finest first."""
        maps: list[Tensor] = self.model(images)
        selected = [maps[index] for index in self.indices]
        return [x.permute(0, 3, 1, 2).contiguous() for x in selected] if self.channels_last else selected


def timm_fpn(*, name: str, pretrained: bool = False, channels: int = 256) -> FPN:
    """Build an FPN with levels P2 to P6 on a timm model.

    Args:
        name: name of the timm model, e.g. "convnext_tiny" or "mobilenetv3_large_100".
        pretrained: whether timm loads the published weights of the model, which it downloads the first time. Most
            weights use the ImageNet mean and std, which are a detector's default `pixel_stats`. For other weights, set
            `pixel_stats` to the mean and std of `timm.get_pretrained_cfg(name)`.
        channels: number of channels of every level.
    """
    return FPN(TimmBackbone(name, pretrained=pretrained), channels=channels)
