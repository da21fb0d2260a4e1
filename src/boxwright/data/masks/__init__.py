"""Object masks: run lengths, polygons and mask grids."""

from boxwright.data.masks.masks import Masks

__all__ = ["Masks"]
