"""Reference detections of other code bases ("peers"), stored as small files, and the weights that produced them.

The files contain no weights. `fill` computes the values of a tensor from its name and shape, with the same result on
every machine. A script `make_fixtures_*.py`, run by hand, fills the peer's model; the tests fill an equal model each
time. A file in `fixtures/` stores the names and shapes of the peer's tensors and its detections on two real images.

Shapes: n detections per image, m detections with a mask, S cells per side of a mask.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from boxwright.data.collate import PlacedSample, collate
from boxwright.data.dataset import Sample
from boxwright.data.decode import decode_image
from boxwright.data.placement import place
from boxwright.data.proposals import ImageProposals

FIXTURES = Path(__file__).parent / "fixtures"
IMAGES = {"000000000802.jpg": (410, 290), "000000005001.jpg": (300, 420)}
"""Files of `coco_mini` and the (height, width) of the upper left crop: small sizes that are no multiples of 32."""
NUM_PROPOSALS = 200
MASK_STEP = 3
"""Fixtures store every third row and column of a mask."""


@dataclass(frozen=True, kw_only=True)
class ImageDetections:
    """The detections in one image, sorted by score in descending order."""

    boxes: np.ndarray
    """[n, 4] float32 xyxy in pixels of the image; n may be smaller than `count`."""
    scores: np.ndarray
    """[n] float32."""
    labels: np.ndarray
    """[n] int64; 0 is the first class, background does not count."""
    count: int
    """Number of detections before the list was cut to n."""
    masks: np.ndarray | None = None
    """[m, S / 3, S / 3] float32 mask probabilities of the first m <= n detections, every third cell."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A peer's model and its detections."""

    about: dict[str, Any]
    """Code base, commit, configuration and the changes made to it. Informative only, except for `meta`."""
    shapes: dict[str, tuple[int, ...]]
    """Names and shapes of the peer's tensors."""
    gains: dict[str, float] = field(default_factory=dict)
    """Factors for tensor values, by name pattern; see `fill`."""
    detections: list[ImageDetections]
    """One entry per image of `IMAGES`."""

    def save(self, name: str) -> None:
        """Write `fixtures/NAME.json.gz`; equal content gives equal bytes."""
        content = {
            "about": self.about,
            "tensors": self.shapes,
            "gains": self.gains,
            "found": [_to_json(item) for item in self.detections],
        }
        data = gzip.compress(json.dumps(content, separators=(",", ":")).encode(), 9, mtime=0)
        FIXTURES.mkdir(exist_ok=True)
        (FIXTURES / f"{name}.json.gz").write_bytes(data)

    @staticmethod
    def load(name: str) -> Reference:
        """Read `fixtures/NAME.json.gz`."""
        content = json.loads(gzip.decompress((FIXTURES / f"{name}.json.gz").read_bytes()))
        return Reference(
            about=content["about"],
            shapes={name: tuple(shape) for name, shape in content["tensors"].items()},
            gains=content["gains"],
            detections=[_from_json(item) for item in content["found"]],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The peer's state dict with the values that `fill` computes."""
        return fill(self.shapes, self.gains)


def _to_json(detections: ImageDetections) -> dict[str, Any]:
    return {
        # The rounding is far below the tolerances of the tests: 1e-2 pixels and 1e-4 in score.
        "boxes": [[round(value, 4) for value in box] for box in detections.boxes.tolist()],
        "scores": [round(value, 7) for value in detections.scores.tolist()],
        "labels": detections.labels.tolist(),
        "count": detections.count,
        "masks": None if detections.masks is None else np.round(detections.masks.astype(np.float64), 5).tolist(),
    }


def _from_json(content: dict[str, Any]) -> ImageDetections:
    return ImageDetections(
        boxes=np.array(content["boxes"], np.float32).reshape(-1, 4),
        scores=np.array(content["scores"], np.float32),
        labels=np.array(content["labels"], np.int64),
        count=content["count"],
        masks=None if content["masks"] is None else np.array(content["masks"], np.float32),
    )


def fill(shapes: Mapping[str, Sequence[int]], gains: Mapping[str, float]) -> dict[str, Tensor]:
    """Random values that preserve the scale of activations, from a bit stream seeded with the tensor's name.

    Args:
        shapes: shape of each tensor, by name.
        gains: factors by name pattern, where `*` matches any text; the first matching pattern applies.

    Returns:
        float32 tensors; `num_batches_tracked` is an int64 0.
    """
    return {name: _filled(name, tuple(shape), gains) for name, shape in shapes.items()}


def _filled(name: str, shape: tuple[int, ...], gains: Mapping[str, float]) -> Tensor:
    part = name.rpartition(".")[2]
    if part == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    # Raw bits, because numpy guarantees them to be equal in every version. The values are uniform with variance 1.
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = np.random.PCG64(seed).random_raw(math.prod(shape)) >> np.uint64(40)
    values = ((bits.astype(np.float32) + 0.5) / 2**24 - 0.5) * np.float32(math.sqrt(12))
    if len(shape) > 1:
        values *= np.float32(math.sqrt(2 / math.prod(shape[1:])))
    elif part in ("weight", "running_var") or part.endswith("_bn_s"):
        values = 1 + values / 4
    else:
        values /= 10
    gain = next((gain for pattern, gain in gains.items() if fnmatchcase(name, pattern)), 1.0)
    return torch.from_numpy(values * np.float32(gain)).reshape(shape)


def images_of(folder: Path) -> list[np.ndarray]:
    """The two images, uint8 [height, width, 3] RGB.

    Args:
        folder: the data folder, which contains `coco_mini`.
    """
    parts = []
    for file, (height, width) in IMAGES.items():
        pixels = decode_image(folder / "coco_mini" / "val2017" / file)
        part = np.ascontiguousarray(pixels[:height, :width])
        assert part.shape == (height, width, 3), file
        parts.append(part)
    return parts


def proposals_for(pixels: np.ndarray) -> np.ndarray:
    """Proposals for Fast R-CNN: [NUM_PROPOSALS, 4] float32 boxes of all sizes inside the image."""
    height, width = pixels.shape[:2]
    draws = (np.random.PCG64(7).random_raw(NUM_PROPOSALS * 4) >> np.uint64(40)).astype(np.float64) / 2**24
    x, y, w, h = draws.reshape(NUM_PROPOSALS, 4).T
    w, h = 8 * (width / 8) ** w, 8 * (height / 8) ** h
    x, y = x * (width - w), y * (height - h)
    return np.stack([x, y, x + w, y + h], axis=1).astype(np.float32)


@torch.inference_mode()
def detect(
    detector: nn.Module, pixels: np.ndarray, proposals: np.ndarray | None = None, *, multiple: int = 32
) -> ImageDetections:
    """Run a Boxwright detector on an image without resizing it.

    Args:
        detector: in eval mode.
        pixels: uint8 [height, width, 3] RGB.
        proposals: [n, 4] boxes, for a detector that takes proposals.
        multiple: the canvas is padded to a multiple of this, like the peer's input.
    """
    size = (pixels.shape[0], pixels.shape[1])
    sample = Sample(
        image=pixels,
        image_id=0,
        file_name="",
        boxes=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int64),
        crowd=np.zeros(0, bool),
        object_ids=np.zeros(0, np.int64),
    )
    given_proposals = None if proposals is None else ImageProposals(proposals, np.zeros(len(proposals), np.float32))
    placed = PlacedSample(sample, place(size, size), 0, given_proposals)
    canvas = (-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple)
    batch = collate([placed], 1, canvas, None, None if proposals is None else len(proposals))
    detections = detector.detect(batch)
    keep = detections.valid[0]
    masks = None if detections.masks is None else thinned(detections.masks[0][keep].numpy())
    return ImageDetections(
        boxes=detections.boxes[0][keep].numpy(),
        scores=detections.scores[0][keep].numpy(),
        labels=detections.labels[0][keep].numpy(),
        count=int(keep.sum()),
        masks=masks,
    )


def to_detections(tensors: Mapping[str, Tensor], first_label: int = 0) -> ImageDetections:
    """Convert the detections of one image from torchvision's output format.

    Args:
        tensors: `boxes` [n, 4], `scores` [n], `labels` [n] and maybe `masks` [n, S, S] or [n, 1, S, S].
        first_label: label of the first class.
    """
    masks = tensors.get("masks")
    return ImageDetections(
        boxes=tensors["boxes"].numpy(),
        scores=tensors["scores"].numpy(),
        labels=tensors["labels"].numpy() - first_label,
        count=len(tensors["scores"]),
        masks=None if masks is None else masks.reshape(-1, *masks.shape[-2:]).numpy(),
    )


def thinned(masks: np.ndarray) -> np.ndarray:
    """[m, S, S] -> every third row and column."""
    return masks[:, ::MASK_STEP, ::MASK_STEP]


@dataclass(frozen=True)
class Differences:
    """The largest differences between the detections of two detectors on one image."""

    boxes: float
    """In pixels."""
    scores: float
    masks: float
    """Difference in mask probability; 0 if there are no masks."""


def compare(actual: ImageDetections, expected: ImageDetections) -> Differences:
    """Match detections one to one and return the largest differences between matched detections.

    Args:
        actual: all detections of the Boxwright detector.
        expected: all detections of the peer, or its best ones. Detections with nearly equal scores may be in another
            order.

    Raises:
        AssertionError: the counts differ, or a detection of the peer has no match: an unmatched detection of the same
            class within 1 pixel and within 0.01 in score.
    """
    assert actual.count == expected.count, f"expected {expected.count} detections (peer), got {actual.count}"
    unmatched = np.ones(len(actual.scores), bool)
    largest = [0.0, 0.0, 0.0]
    for index in range(len(expected.scores)):
        gaps = np.abs(actual.boxes - expected.boxes[index]).max(axis=1)
        score_gaps = np.abs(actual.scores - expected.scores[index])
        candidates = unmatched & (actual.labels == expected.labels[index]) & (gaps < 1) & (score_gaps < 0.01)
        assert candidates.any(), (
            f"no match for detection {index} of the peer: box {expected.boxes[index]}, "
            f"score {expected.scores[index]:.5f}, class {expected.labels[index]}"
        )
        match = int(np.where(candidates, gaps + score_gaps, np.inf).argmin())
        unmatched[match] = False
        mask_gap = 0.0
        if expected.masks is not None and actual.masks is not None and index < len(expected.masks):
            mask_gap = float(np.abs(actual.masks[match] - expected.masks[index]).max())
        largest = [
            max(*pair) for pair in zip(largest, (float(gaps[match]), float(score_gaps[match]), mask_gap), strict=True)
        ]
    assert (actual.masks is None) == (expected.masks is None), "only one of the two detectors has masks"
    return Differences(*largest)
