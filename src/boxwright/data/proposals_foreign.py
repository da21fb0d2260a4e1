"""Proposals files of others, which are pickles: the 2018 toolbox's and detectron2's (which also reads Detectron's).

They are read once, by the restricted reader, and kept in the cache as a file of ours, so that workers share it.

- The 2018 toolbox: a list with one float32 [n, 5] array an image, (x1, y1, x2, y2, score), in the order of the
  annotation file. x2 and y2 name the last pixel inside, so that 1 is added to them here.
- detectron2: a dict of `ids`, `boxes` (an [n, 4] array an image), `objectness_logits` and perhaps `bbox_mode`.
- Detectron: the same with `indexes` and `scores` for `ids` and `objectness_logits`.
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
from boxwright.data.proposals import GivenProposals, ProposalFile, write_proposals
from boxwright.weights.restricted_pickle import RefusedPickleError, read_pickle

_VERSION = 1
_XYXY, _XYWH = 0, 1


def open_proposals(
    path: str | Path, image_ids: Sequence[int] | NDArray[np.int64], *, split: str | None = None, limit: int = 1000
) -> ProposalFile:
    """Open a proposals file of any kind.

    Args:
        path: Of a file that `boxwright propose` wrote, or of a pickle.
        image_ids: Of the data set's images in its order, by which the 2018 toolbox's lists go.
        split: See `ProposalFile`.
        limit: See `ProposalFile`.

    Raises:
        ValueError: It is no proposals file, or does not belong to these images.
        OSError: It cannot be read.
    """
    path = Path(path)
    if not _is_pickle(path):
        return ProposalFile(path, split=split, limit=limit)
    ids = np.asarray(image_ids, np.int64)
    key = hashlib.sha256(f"{_VERSION} {hash_file(path)} {ids.tobytes().hex()}".encode()).hexdigest()[:32]
    folders = [folder / "proposals" for folder in cache_folders()]
    for folder in folders:
        if kept := _open_if_whole(folder / f"{key}.safetensors", path, limit):
            return kept
    images = _from_pickle(path, ids)
    for folder in folders[:-1]:
        with contextlib.suppress(OSError):
            return _keep(images, folder / f"{key}.safetensors", path, limit)
    return _keep(images, folders[-1] / f"{key}.safetensors", path, limit)


def _open_if_whole(path: Path, source: Path, limit: int) -> ProposalFile | None:
    try:
        return ProposalFile(path, limit=limit, source=source)
    except Exception:  # a damaged file in the cache is made anew
        return None


def _keep(images: dict[int, GivenProposals], path: Path, source: Path, limit: int) -> ProposalFile:
    """Write proposals into the cache and open them from there."""
    write_proposals(
        path,
        image_ids=images.keys(),
        counts=[len(image.boxes) for image in images.values()],
        images=images.values(),
        page={"splits": [{"name": "", "images": len(images)}], "source": source.name},
    )
    return ProposalFile(path, limit=limit, source=source)


def _is_pickle(path: Path) -> bool:
    """Whether it is no safetensors file, whose first 8 bytes are the length of a header that starts with a brace."""
    with path.open("rb") as file:
        return file.read(9)[8:] != b"{"


def _from_pickle(path: Path, image_ids: NDArray[np.int64]) -> dict[int, GivenProposals]:
    """The proposals by image id."""
    try:
        content = read_pickle(path)
    except RefusedPickleError as error:
        raise ValueError(
            f"{error}. It is no proposals file: neither one that boxwright propose wrote nor a pickle of plain arrays"
        ) from None
    try:
        if isinstance(content, list):
            return _from_2018(path, content, image_ids)
        if isinstance(content, dict):
            return _from_detectron(path, content)
    except (TypeError, OverflowError) as error:  # of entries that are neither arrays nor numbers
        raise ValueError(f"{path} holds no proposals ({error}): write the file anew") from error
    raise ValueError(
        f"{path} holds no proposals: neither a list of arrays (the 2018 toolbox's) nor a dict (detectron2's)"
    )


def _from_2018(path: Path, content: list[Any], image_ids: NDArray[np.int64]) -> dict[int, GivenProposals]:
    if len(content) != len(image_ids):
        raise ValueError(
            f"{path} holds lists for {len(content)} images, and the data set has {len(image_ids)}. Such a file goes by "
            "the order of the annotation file alone, so it must have all of its images: those of the 2018 toolbox's "
            "training leave out images without objects. Write one with boxwright propose"
        )
    images = {}
    for image_id, rows in zip(image_ids.tolist(), content, strict=True):
        rows = _numbers(path, image_id, rows, 5)
        images[image_id] = _sorted(rows[:, :4] + np.array([0, 0, 1, 1], np.float32), rows[:, 4])
    return images


def _from_detectron(path: Path, content: dict[Any, Any]) -> dict[int, GivenProposals]:
    ids, scores = content.get("ids", content.get("indexes")), content.get("scores")
    if "objectness_logits" in content:
        scores = content["objectness_logits"]
    boxes, mode = content.get("boxes"), content.get("bbox_mode", _XYXY)
    if ids is None or boxes is None or scores is None or not len(ids) == len(boxes) == len(scores):
        found = ", ".join(map(str, content))
        raise ValueError(
            f"{path} holds no proposals: wanted are ids, boxes and objectness_logits of one length, and there are "
            f"{found or 'none'}"
        )
    if mode not in (_XYXY, _XYWH):
        raise ValueError(f"{path}: bbox_mode is {mode!r}; 0 (XYXY_ABS) and 1 (XYWH_ABS) are read")
    images: dict[int, GivenProposals] = {}
    for name, own, certainty in zip(ids, boxes, scores, strict=True):
        image_id = int(name)
        if image_id in images:
            raise ValueError(f"{path} holds image {image_id} twice")
        corners, values = _numbers(path, image_id, own, 4), _numbers(path, image_id, certainty, 1)[:, 0]
        if len(values) != len(corners):
            raise ValueError(f"{path}: image {image_id} has {len(corners)} boxes and {len(values)} scores")
        if mode == _XYWH:
            corners = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
        if "objectness_logits" in content:
            values = 0.5 * (1 + np.tanh(0.5 * values))  # the sigmoid, which overflows for no logit
        images[image_id] = _sorted(corners, values)
    return images


def _numbers(path: Path, image_id: int, rows: Any, width: int) -> NDArray[np.float32]:
    """[n, width] float32; an image without proposals may come in any shape without elements."""
    array = np.asarray(rows)
    if array.dtype.kind not in "fiu" or (array.size and (array.size % width or array.shape[0] * width != array.size)):
        raise ValueError(f"{path}: image {image_id} has {array.dtype} {list(array.shape)} for rows of {width} numbers")
    numbers = array.reshape(-1, width).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{path}: the proposals of image {image_id} hold NaN or infinity: write the file anew")
    return numbers


def _sorted(boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> GivenProposals:
    order = np.argsort(-scores, kind="stable")
    return GivenProposals(boxes[order], scores[order])
