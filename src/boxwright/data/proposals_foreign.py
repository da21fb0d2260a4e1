"""Read proposals files of other programs, which are pickles: mmdetection 0.5 (2018), Detectron2 and Detectron.

A pickle is read once, by the restricted unpickler, and cached as a Boxwright proposals file, which workers can share.

- mmdetection 0.5: list with one float32 [n, 5] array per image, (x1, y1, x2, y2, score), in the order of the annotation
  file. x2 and y2 are the last pixel inside the box, so 1 is added to them here.
- Detectron2: dict of `ids`, `boxes` (one [n, 4] array per image), `objectness_logits` and, optionally, `bbox_mode`.
- Detectron: the same dict with `indexes` and `scores` instead of `ids` and `objectness_logits`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.cache import cache_folders, hash_file
from boxwright.data.proposals import ImageProposals, ProposalFile, write_proposals
from boxwright.weights.restricted_pickle import RefusedPickleError, read_pickle

_VERSION = 1
_XYXY, _XYWH = 0, 1


def open_proposals(
    path: str | Path, image_ids: Sequence[int] | NDArray[np.int64], *, split: str | None = None, limit: int = 1000
) -> ProposalFile:
    """Open a proposals file of any supported format.

    Args:
        path: File that `boxwright propose` wrote, or a pickle.
        image_ids: Image ids in the order of the data set. A pickle of mmdetection 0.5 has one array per image in this
            order, without image ids.
        split: See `ProposalFile`.
        limit: See `ProposalFile`.

    Raises:
        ValueError: The file is not a proposals file, or does not match these images.
        OSError: The file cannot be read.
    """
    path = Path(path)
    if not _is_pickle(path):
        return ProposalFile(path, split=split, limit=limit)
    ids = np.asarray(image_ids, np.int64)
    key = hashlib.sha256(f"{_VERSION} {hash_file(path)} {ids.tobytes().hex()}".encode()).hexdigest()[:32]
    folders = [folder / "proposals" for folder in cache_folders()]
    for folder in folders:
        if cached := _open_if_valid(folder / f"{key}.safetensors", path, limit):
            return cached
    images = _from_pickle(path, ids)
    for folder in folders[:-1]:
        with contextlib.suppress(OSError):
            return _cache(images, folder / f"{key}.safetensors", path, limit)
    return _cache(images, folders[-1] / f"{key}.safetensors", path, limit)


def _open_if_valid(path: Path, source: Path, limit: int) -> ProposalFile | None:
    try:
        return ProposalFile(path, limit=limit, source=source)
    except Exception:  # a damaged file in the cache is written again
        return None


def _cache(images: dict[int, ImageProposals], path: Path, source: Path, limit: int) -> ProposalFile:
    """Write proposals to the cache and open the cached file."""
    write_proposals(
        path,
        image_ids=images.keys(),
        counts=[len(image.boxes) for image in images.values()],
        images=images.values(),
        metadata={"splits": [{"name": "", "images": len(images)}], "source": source.name},
    )
    return ProposalFile(path, limit=limit, source=source)


def _is_pickle(path: Path) -> bool:
    """Whether a file is not a safetensors file, in which an 8-byte header length is followed by an opening brace."""
    with path.open("rb") as file:
        return file.read(9)[8:] != b"{"


def _from_pickle(path: Path, image_ids: NDArray[np.int64]) -> dict[int, ImageProposals]:
    """Read the proposals of a pickle, by image id."""
    try:
        content = read_pickle(path)
    except RefusedPickleError as error:
        raise ValueError(
            f"{error}. Expected a proposals file that boxwright propose wrote, or a pickle of plain arrays"
        ) from None
    try:
        if isinstance(content, list):
            return _from_2018(path, content, image_ids)
        if isinstance(content, dict):
            return _from_detectron(path, content)
    except (TypeError, OverflowError) as error:  # entries that are neither arrays nor numbers
        raise ValueError(f"{path} contains no proposals ({error}). Write the file again") from error
    raise ValueError(
        f"{path} contains no proposals: expected a list of arrays (mmdetection 0.5) or a dict (Detectron2), got "
        f"{type(content).__name__}"
    )


def _from_2018(path: Path, content: list[Any], image_ids: NDArray[np.int64]) -> dict[int, ImageProposals]:
    if len(content) != len(image_ids):
        raise ValueError(
            f"{path}: expected one array for each of the {len(image_ids)} images of the data set, in the order of the "
            f"annotation file, got {len(content)} arrays. (Training files of mmdetection 0.5 omit images without "
            "objects.) Write proposals with boxwright propose"
        )
    images = {}
    for image_id, rows in zip(image_ids.tolist(), content, strict=True):
        rows = _to_array(path, image_id, rows, 5)
        images[image_id] = _sorted(rows[:, :4] + np.array([0, 0, 1, 1], np.float32), rows[:, 4])
    return images


def _from_detectron(path: Path, content: dict[Any, Any]) -> dict[int, ImageProposals]:
    ids, scores = content.get("ids", content.get("indexes")), content.get("scores")
    if "objectness_logits" in content:
        scores = content["objectness_logits"]
    boxes, mode = content.get("boxes"), content.get("bbox_mode", _XYXY)
    if ids is None or boxes is None or scores is None or not len(ids) == len(boxes) == len(scores):
        keys = ", ".join(map(str, content))
        raise ValueError(
            f"{path} contains no proposals: expected ids, boxes and objectness_logits of equal length, got "
            f"{keys or 'no keys'}"
        )
    if mode not in (_XYXY, _XYWH):
        raise ValueError(f"{path}: bbox_mode: expected 0 (XYXY_ABS) or 1 (XYWH_ABS), got {mode!r}")
    images: dict[int, ImageProposals] = {}
    for key, image_boxes, image_scores in zip(ids, boxes, scores, strict=True):
        image_id = int(key)
        if image_id in images:
            raise ValueError(f"{path} contains image {image_id} twice")
        corners, values = _to_array(path, image_id, image_boxes, 4), _to_array(path, image_id, image_scores, 1)[:, 0]
        if len(values) != len(corners):
            raise ValueError(f"{path}: image {image_id} has {len(corners)} boxes and {len(values)} scores")
        if mode == _XYWH:
            corners = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
        if "objectness_logits" in content:
            values = 0.5 * (1 + np.tanh(0.5 * values))  # sigmoid without overflow for any logit
        images[image_id] = _sorted(corners, values)
    return images


def _to_array(path: Path, image_id: int, rows: Any, width: int) -> NDArray[np.float32]:
    """Convert to [n, width] float32. Any array without elements stands for an image without proposals."""
    array = np.asarray(rows)
    if array.dtype.kind not in "fiu" or (array.size and (array.size % width or array.shape[0] * width != array.size)):
        raise ValueError(
            f"{path}: image {image_id}: expected rows of {width} numbers, got {array.dtype} {list(array.shape)}"
        )
    values = array.reshape(-1, width).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: proposals of image {image_id} contain NaN or infinity. Write the file again")
    return values


def _sorted(boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> ImageProposals:
    order = np.argsort(-scores, kind="stable")
    return ImageProposals(boxes[order], scores[order])
