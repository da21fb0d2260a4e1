"""The image settings of training: size, geometric and photometric augmentation, and a user's own transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from boxwright.data.augment import Augment, Photometric
from boxwright.data.buckets import Resize, Scale, ScaleMode, plan_scales
from boxwright.data.dataset import Sample


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are resized and augmented; the defaults are those of an `Experiment`."""

    resize: Resize = field(default_factory=Resize)
    """Size of the images before scale jitter."""
    scales: Sequence[tuple[int, int]] | None = None
    """(short, long) sizes instead of `resize`; each step draws one of them for all ranks."""
    scale_mode: ScaleMode = "list"
    """Whether `scales` lists every size or gives the two ends of a range, see `plan_scales`."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    scale_jitter: tuple[float, float] | None = None
    """Smallest and largest factor on the size, see `Augment`."""
    crop: float | None = None
    """Smallest share of each side that a random crop keeps, see `Augment`."""
    photometric: Photometric | None = None
    """Random brightness, contrast and saturation; None for none."""
    transform: Callable[[Sample], Sample] | None = None
    """Changes a sample before the other augmentations do."""

    def __post_init__(self) -> None:
        """Check the ranges of the settings."""
        if self.scales is None and self.scale_mode != "list":
            raise ValueError(
                f"scale_mode: {self.scale_mode!r} needs the two ends of the range, such as scales=(640,1333),(800,1333)"
            )
        self.plan()
        self.geometric()

    def plan(self) -> list[Scale]:
        """The scales that a step draws from."""
        return [Scale(self.resize, self.resize)] if self.scales is None else plan_scales(self.scales, self.scale_mode)

    def geometric(self) -> Augment:
        """The geometric changes that each image draws."""
        return Augment(flip=self.flip, scale_jitter=self.scale_jitter, crop=self.crop)
