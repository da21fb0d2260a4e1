"""Sizes of a run: whole detectors on a GPU, or tiny ones on the CPU (`--dry-run`) to test the benchmark itself."""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = ("mask_rcnn", "faster_rcnn", "retinanet", "cascade_rcnn", "rpn", "fast_rcnn")
"""All kinds of detectors, the most important first."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of all items."""

    device: str
    """cuda or cpu."""
    recipe: str
    """Recipe name, with `{}` for the family."""
    canvas: tuple[int, int]
    """(height, width) of the batches of timed items."""
    checked_canvas: tuple[int, int]
    """(height, width) of the batches that the CPU computes too."""
    slots: int
    """Object slots per image in training."""
    objects: int
    """Objects per image; the other slots are empty."""
    train_batches: tuple[int, int]
    """Batch sizes of training."""
    detect_batch: int
    """Batch size of throughput."""
    rounds: int
    """Measured times per item."""
    calls: int
    """Calls per measured time, without waiting for the device between them."""
    matrix: int
    """Rows and columns of the matrix product."""
    anchors: int
    """Anchors of the matcher item."""
    copy_mib: tuple[int, ...]
    """Sizes of the copies between host and device."""
    workers: int
    """Worker processes of the loader item."""
    loader_seconds: float
    """Duration of the loader item."""


FULL = Scale(
    device="cuda",
    recipe="{}_r50_fpn_1x",
    canvas=(800, 1344),
    checked_canvas=(320, 480),
    slots=128,
    objects=20,
    train_batches=(2, 16),
    detect_batch=16,
    rounds=5,
    calls=4,
    matrix=8192,
    anchors=268_569,
    copy_mib=(1, 16, 256),
    workers=8,
    loader_seconds=8.0,
)
TINY = Scale(
    device="cpu",
    recipe="{}_r18_fpn_small",
    canvas=(64, 64),
    checked_canvas=(64, 64),
    slots=8,
    objects=3,
    train_batches=(1, 2),
    detect_batch=2,
    rounds=1,
    calls=1,
    matrix=64,
    anchors=300,
    copy_mib=(1,),
    workers=1,
    loader_seconds=0.1,
)
