"""Augmentation settings of training: image size, geometric and photometric changes, and a custom transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from boxwright.checks import check_choice
from boxwright.data.augment import Augment, Photometric
from boxwright.data.buckets import Resize, Scale, ScaleMode, plan_scales
from boxwright.data.dataset import Sample


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are resized and augmented. An `Experiment` has the same defaults."""

    resize: Resize = field(default_factory=Resize)
    """Size of the images before scale jitter."""
    scales: Sequence[tuple[int, int]] | None = None
    """Multi-scale training: (short, long) sizes that replace `resize`. Each step draws one size for all ranks."""
    scale_mode: ScaleMode = "list"
    """Whether `scales` lists all sizes ("list") or the two ends of a range ("range"), see `plan_scales`."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    scale_jitter: tuple[float, float] | None = None
    """Minimum and maximum factor on the resized size, see `Augment`; None for no scale jitter."""
    crop: float | None = None
    """Random crop: minimum height and width as a fraction of the image's, see `Augment`; None for no crop."""
    photometric: Photometric | None = None
    """Random brightness, contrast and saturation; None for no photometric augmentation."""
    transform: Callable[[Sample], Sample] | None = None
    """Custom function of a sample, applied before all other augmentations; see `TrainingLoader`."""

    def __post_init__(self) -> None:
        """Check the ranges of the settings."""
        check_choice("scale_mode", self.scale_mode, get_args(ScaleMode))
        if self.scales is None and self.scale_mode != "list":
            raise ValueError(
                f"scale_mode: {self.scale_mode!r} needs the two ends of the range, such as scales=(640,1333),(800,1333)"
            )
        self.plan()
        self.geometric()

    def plan(self) -> list[Scale]:
        """Scales that training steps draw from."""
        return [Scale(self.resize, self.resize)] if self.scales is None else plan_scales(self.scales, self.scale_mode)

    def geometric(self) -> Augment:
        """Flip, scale jitter and crop as an `Augment`."""
        return Augment(flip=self.flip, scale_jitter=self.scale_jitter, crop=self.crop)
