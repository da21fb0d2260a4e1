"""Random augmentation: `Augment` draws the `Placement` of an image on its canvas, `Photometric` changes its colours."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from boxwright.checks import check_numbers
from boxwright.data.buckets import Resize
from boxwright.data.placement import Placement, place


@dataclass(frozen=True)
class Photometric:
    """Random brightness, contrast and saturation, each a factor drawn from 1 - strength to 1 + strength."""

    brightness: float = 0.2
    """Strength of the factor on all values."""
    contrast: float = 0.2
    """Strength of the factor on the distance from the image's mean grey."""
    saturation: float = 0.2
    """Strength of the factor on the distance from each pixel's own grey."""

    def __post_init__(self) -> None:
        check_numbers(self, "brightness", "contrast", "saturation", least=0, most=1)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a changed copy of a uint8 RGB image, [H, W, 3]."""
        strengths = np.array([self.brightness, self.contrast, self.saturation])
        brightness, contrast, saturation = 1 + strengths * rng.uniform(-1, 1, 3)
        # Brightness and contrast are functions of a single value, so one lookup table of 256 entries applies both.
        mean = brightness * cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
        table = contrast * brightness * np.arange(256) + (1 - contrast) * mean
        image = cv2.LUT(image, np.clip(table + 0.5, 0, 255).astype(np.uint8))
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(image, saturation, grey, 1 - saturation, 0)


@dataclass(frozen=True)
class Augment:
    """Random flip, scale jitter and crop.

    An image that is enlarged by scale jitter is cropped, at a random position, to its size without jitter. So no image
    exceeds its canvas, and the bucket of an image is known before the image is opened.
    """

    flip: float = 0.0
    """Probability of a horizontal flip."""
    scale_jitter: tuple[float, float] | None = None
    """Minimum and maximum factor on the resized size, drawn uniformly; None for no scale jitter."""
    crop: float | None = None
    """Random crop: minimum height and width of the crop as a fraction of the image's; None for no crop."""

    def __post_init__(self) -> None:
        check_numbers(self, "flip", least=0, most=1)
        check_numbers(self, "scale_jitter", "crop")
        if self.scale_jitter is not None and not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(
                f"scale_jitter: expected 0 < minimum <= maximum, such as (0.8, 1.25), got {self.scale_jitter}"
            )
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"crop: expected a number above 0 and at most 1, got {self.crop}")

    def draw(self, original: tuple[int, int], resize: Resize | None, rng: np.random.Generator) -> Placement:
        """Draw a random placement.

        Args:
            original: (height, width) of the image in its file.
            resize: Limits of the sides; None keeps the size of the image.
            rng: Random generator. The number of draws does not depend on the settings, so enabling one augmentation
                does not change the others.
        """
        at_flip, at_scale, at_height, at_width, at_top, at_left = rng.random(6)
        base = original if resize is None else resize.size(*original)
        low, high = self.scale_jitter or (1.0, 1.0)
        factor = low + (high - low) * at_scale
        resized = (max(int(base[0] * factor + 0.5), 1), max(int(base[1] * factor + 0.5), 1))
        min_fraction = 1.0 if self.crop is None else self.crop
        height = max(int(min(base[0], resized[0]) * (min_fraction + (1 - min_fraction) * at_height) + 0.5), 1)
        width = max(int(min(base[1], resized[1]) * (min_fraction + (1 - min_fraction) * at_width) + 0.5), 1)
        top, left = int((resized[0] - height + 1) * at_top), int((resized[1] - width + 1) * at_left)
        return place(original, resized, flipped=bool(at_flip < self.flip), window=(top, left, height, width))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and random within the block, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (third-party transforms still use it)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
