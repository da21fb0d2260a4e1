"""Detections that other code bases' own code made, kept as small files, and the models that made them, made again.

No weights are kept: a tensor's values follow from its name and shape, the same on every machine, so that the peer
(once, by hand, in a `make_fixtures_*.py`) and the test (each time) fill the same model. A file in `fixtures/` holds the
names and shapes of the peer's tensors, and what the peer found in two real images.

n detections, S cells a side of a mask.
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
from boxwright.data.proposals import GivenProposals

FIXTURES = Path(__file__).parent / "fixtures"
PICTURES = {"000000000802.jpg": (410, 290), "000000005001.jpg": (300, 420)}
"""Of `coco_mini`, and the (height, width) of the upper left part that is used: small, and no multiples of 32."""
NUM_PROPOSALS = 200
MASK_STEP = 3
"""Every third row and column of a mask is kept."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found in one image, best first."""

    boxes: np.ndarray
    """[n, 4] float32 xyxy in pixels of the image; n may be fewer than `count`."""
    scores: np.ndarray
    """[n] float32."""
    labels: np.ndarray
    """[n] int64, background not counted."""
    count: int
    """Detections in all."""
    masks: np.ndarray | None = None
    """[m, S / 3, S / 3] float32 probabilities in the first m <= n detections' masks, every third cell."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A peer's model and its detections."""

    about: dict[str, Any]
    """Code base, commit, configuration and what was changed in it; for the reader."""
    shapes: dict[str, tuple[int, ...]]
    """The peer's tensors."""
    gains: dict[str, float] = field(default_factory=dict)
    """Factors for the values of tensors by patterns of their names; see `fill`."""
    found: list[Found]
    """One for each of `PICTURES`."""

    def save(self, name: str) -> None:
        """Write `fixtures/NAME.json.gz`, the same bytes for the same content."""
        page = {
            "about": self.about,
            "tensors": self.shapes,
            "gains": self.gains,
            "found": [_to_json(found) for found in self.found],
        }
        data = gzip.compress(json.dumps(page, separators=(",", ":")).encode(), 9, mtime=0)
        FIXTURES.mkdir(exist_ok=True)
        (FIXTURES / f"{name}.json.gz").write_bytes(data)

    @staticmethod
    def load(name: str) -> Reference:
        """Read `fixtures/NAME.json.gz`."""
        page = json.loads(gzip.decompress((FIXTURES / f"{name}.json.gz").read_bytes()))
        return Reference(
            about=page["about"],
            shapes={name: tuple(shape) for name, shape in page["tensors"].items()},
            gains=page["gains"],
            found=[_from_json(found) for found in page["found"]],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The peer's state, filled."""
        return fill(self.shapes, self.gains)


def _to_json(found: Found) -> dict[str, Any]:
    return {
        # A thousandth of a pixel, and a millionth of a score, are far below what the tests allow.
        "boxes": [[round(value, 4) for value in box] for box in found.boxes.tolist()],
        "scores": [round(value, 7) for value in found.scores.tolist()],
        "labels": found.labels.tolist(),
        "count": found.count,
        "masks": None if found.masks is None else np.round(found.masks.astype(np.float64), 5).tolist(),
    }


def _from_json(page: dict[str, Any]) -> Found:
    return Found(
        boxes=np.array(page["boxes"], np.float32).reshape(-1, 4),
        scores=np.array(page["scores"], np.float32),
        labels=np.array(page["labels"], np.int64),
        count=page["count"],
        masks=None if page["masks"] is None else np.array(page["masks"], np.float32),
    )


def fill(shapes: Mapping[str, Sequence[int]], gains: Mapping[str, float]) -> dict[str, Tensor]:
    """Values under which activations keep their scale, from a bit stream that the tensor's name alone seeds.

    Args:
        shapes: by name.
        gains: factors by pattern, `*` standing for any text; the first that fits a name is the tensor's.

    Returns:
        float32 tensors; `num_batches_tracked` is an int64 0.
    """
    return {name: _filled(name, tuple(shape), gains) for name, shape in shapes.items()}


def _filled(name: str, shape: tuple[int, ...], gains: Mapping[str, float]) -> Tensor:
    part = name.rpartition(".")[2]
    if part == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    # Raw bits, as numpy promises the same of them in every version: uniform with variance 1.
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
        folder: with `coco_mini` in it.
    """
    parts = []
    for file, (height, width) in PICTURES.items():
        pixels = decode_image(folder / "coco_mini" / "val2017" / file)
        part = np.ascontiguousarray(pixels[:height, :width])
        assert part.shape == (height, width, 3), file
        parts.append(part)
    return parts


def proposals(pixels: np.ndarray) -> np.ndarray:
    """[NUM_PROPOSALS, 4] float32 boxes of all sizes in the image, for detectors that are given some."""
    height, width = pixels.shape[:2]
    draws = (np.random.PCG64(7).random_raw(NUM_PROPOSALS * 4) >> np.uint64(40)).astype(np.float64) / 2**24
    x, y, w, h = draws.reshape(NUM_PROPOSALS, 4).T
    w, h = 8 * (width / 8) ** w, 8 * (height / 8) ** h
    x, y = x * (width - w), y * (height - h)
    return np.stack([x, y, x + w, y + h], axis=1).astype(np.float32)


@torch.inference_mode()
def detect(detector: nn.Module, pixels: np.ndarray, given: np.ndarray | None = None, *, multiple: int = 32) -> Found:
    """What one of our detectors finds in a image at its own size.

    Args:
        detector: in eval mode.
        pixels: uint8 [height, width, 3] RGB.
        given: [n, 4] proposals, for a detector that wants some.
        multiple: of what the sides of the canvas are multiples, as the peer has it.
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
    boxes = None if given is None else GivenProposals(given, np.zeros(len(given), np.float32))
    placed = PlacedSample(sample, place(size, size), 0, boxes)
    canvas = (-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple)
    batch = collate([placed], 1, canvas, None, None if given is None else len(given))
    detections = detector.detect(batch)
    kept = detections.valid[0]
    masks = None if detections.masks is None else thinned(detections.masks[0][kept].numpy())
    return Found(
        boxes=detections.boxes[0][kept].numpy(),
        scores=detections.scores[0][kept].numpy(),
        labels=detections.labels[0][kept].numpy(),
        count=int(kept.sum()),
        masks=masks,
    )


def found_in(tensors: Mapping[str, Tensor], first_label: int = 0) -> Found:
    """One image's detections as torchvision gives them, or ours by the same names.

    Args:
        tensors: `boxes` [n, 4], `scores` [n], `labels` [n] and maybe `masks` [n, S, S] or [n, 1, S, S].
        first_label: the number of the first class.
    """
    masks = tensors.get("masks")
    return Found(
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
    """The largest differences between what two detectors found in a image."""

    boxes: float
    """In pixels."""
    scores: float
    masks: float
    """Of probabilities; 0 where there are no masks."""


def compare(given: Found, expected: Found) -> Differences:
    """Match the detections that are alike, one to one, and measure what is left between them.

    Args:
        given: ours, all of them.
        expected: the peer's, all or the best of them. Detections whose scores are nearly the same may stand in another
            order.

    Raises:
        AssertionError: there are not as many, or one of the peer's has no counterpart of the same class within a pixel
            and a hundredth of score.
    """
    assert given.count == expected.count, f"{given.count} detections, the peer has {expected.count}"
    free = np.ones(len(given.scores), bool)
    largest = [0.0, 0.0, 0.0]
    for index in range(len(expected.scores)):
        gaps = np.abs(given.boxes - expected.boxes[index]).max(axis=1)
        score_gaps = np.abs(given.scores - expected.scores[index])
        alike = free & (given.labels == expected.labels[index]) & (gaps < 1) & (score_gaps < 0.01)
        assert alike.any(), (
            f"detection {index} of the peer, {expected.boxes[index]} {expected.scores[index]:.5f} of class "
            f"{expected.labels[index]}, is not among ours"
        )
        own = int(np.where(alike, gaps + score_gaps, np.inf).argmin())
        free[own] = False
        mask_gap = 0.0
        if expected.masks is not None and given.masks is not None and index < len(expected.masks):
            mask_gap = float(np.abs(given.masks[own] - expected.masks[index]).max())
        largest = [
            max(*pair) for pair in zip(largest, (float(gaps[own]), float(score_gaps[own]), mask_gap), strict=True)
        ]
    assert (given.masks is None) == (expected.masks is None), "one has masks, the other has none"
    return Differences(*largest)
