"""Boxes proposed before, in one file of flat columns: memory-mapped, and so shared by all that read it.

N images, M proposals. It is a safetensors file of four tensors: `image_ids` [N] int64; `offsets` [N + 1] int64, the
first proposal of each image and one past its last; `boxes` [M, 4] float32 xyxy in pixels of the image's file; `scores`
[M] float32, falling within an image. The images of a split lie together. The string `boxwright_proposals` of its
metadata is a JSON page::

    {"format": "boxwright-proposals-1", "splits": [{"name": "train", "annotations": "instances_train.json",
     "images": 205}, ...], "model": "runs/rpn/weights.safetensors", "sha256": "..."}
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

FORMAT = "boxwright-proposals-1"
_KEY = "boxwright_proposals"
_ALIGNMENT = 8
_SLOT_STEP = 64
# A box that reaches further beyond its image belongs to another image.
_ROUNDING = 2.0


class GivenProposals(NamedTuple):
    """The proposals of one image, best first."""

    boxes: NDArray[np.float32]
    """[n, 4] float32 xyxy in pixels of the file."""
    scores: NDArray[np.float32]
    """[n] float32, falling."""


class ProposalFile:
    """The best proposals of each image, from a file; pickles as its path, so that workers map the same memory."""

    def __init__(
        self, path: str | Path, *, split: str | None = None, limit: int = 1000, source: str | Path | None = None
    ) -> None:
        """Open a proposals file.

        Args:
            path: The file.
            split: Whose images are meant where splits share image ids; elsewhere it plays no part.
            limit: The best so many of an image are used.
            source: The file that messages name instead, from which `path` was made.

        Raises:
            ValueError: It is no proposals file, it is damaged, or splits share image ids and `split` is none of them.
            OSError: It cannot be read.
        """
        if limit < 1:
            raise ValueError(f"{limit} proposals an image: give at least 1")
        self.path, self.split, self.limit = Path(path), split, limit
        self.source = self.path if source is None else Path(source)
        with self.path.open("rb"):  # for the usual OSError where safetensors has its own
            pass
        try:
            self._file = safe_open(self.path, framework="numpy")
            self.page = _page(self.path, self._file.metadata())
            image_ids, self._offsets = self._file.get_tensor("image_ids"), self._file.get_tensor("offsets")
            slices = [self._file.get_slice(name) for name in ("boxes", "scores")]
            shapes = [part.get_shape() for part in slices]
            types = [image_ids.dtype, self._offsets.dtype, *(part.get_dtype() for part in slices)]
        except ValueError:
            raise
        except Exception as error:  # such as the AttributeError of a number type that numpy lacks
            raise ValueError(
                f"{self.path} is no whole proposals file ({error}): write it anew with boxwright propose"
            ) from None
        if types != [np.int64, np.int64, "F32", "F32"] or image_ids.ndim != 1 or self._offsets.ndim != 1:
            raise ValueError(f"{self.path} is damaged: its columns are of types {types}; write it anew")
        counts = np.diff(self._offsets)
        if len(self._offsets) != len(image_ids) + 1 or (counts < 0).any() or self._offsets[0] != 0:
            raise ValueError(f"{self.path} is damaged: its offsets do not belong to its images; write it anew")
        if shapes != [[self._offsets[-1], 4], [self._offsets[-1]]]:
            raise ValueError(f"{self.path} is damaged: it does not hold as many boxes as it says; write it anew")
        rows = self._rows_of_split(image_ids)
        self._rows = rows[np.argsort(image_ids[rows], kind="stable")]
        self.image_ids: NDArray[np.int64] = image_ids[self._rows]
        """[N] int64, rising."""
        self.counts: NDArray[np.int64] = np.minimum(counts[self._rows], limit)
        """[N] int64, the proposals that `of` gives for each of these images."""
        most = max(int(self.counts.max(initial=0)), 1)
        # Rounded up, so that a model compiled for one file fits the next.
        self.slots = min(limit, -(-most // _SLOT_STEP) * _SLOT_STEP)
        """P, the slots that hold the proposals of any image."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.split, self.limit, self.source)

    def require(self, image_ids: Iterable[int]) -> None:
        """Check that images have a row.

        Raises:
            ValueError: Some have none; one is named and all are counted.
        """
        wanted = np.asarray(list(image_ids), np.int64)
        missing = wanted[~np.isin(wanted, self.image_ids)]
        if len(missing):
            raise ValueError(
                f"{self.source} has no proposals of {len(missing)} of {len(wanted)} images, image id {missing[0]} for "
                "one: it was written for other data; write one for these with boxwright propose"
            )

    def of(self, image_id: int, image_size: tuple[int, int] | None = None) -> GivenProposals:
        """The best proposals of an image.

        Args:
            image_id: Of an image that has a row.
            image_size: (height, width) of the file, which the boxes must fit; None checks nothing.

        Raises:
            ValueError: The image has no row, or its proposals are not finite, not sorted or not of this image.
        """
        position = int(np.searchsorted(self.image_ids, image_id))
        if position == len(self.image_ids) or self.image_ids[position] != image_id:
            self.require([image_id])
        row = self._rows[position]
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        end = min(end, start + self.limit)
        if start == end:
            return GivenProposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
        boxes, scores = self._file.get_slice("boxes")[start:end], self._file.get_slice("scores")[start:end]
        where = f"{self.source}: the proposals of image {image_id}"
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"{where} hold NaN or infinity: write the file anew")
        if (np.diff(scores) > 0).any():
            raise ValueError(f"{where} do not come best first: write the file anew")
        if image_size is not None:
            height, width = image_size
            beyond = np.abs(boxes - boxes.clip(0, np.array([width, height, width, height], np.float32))).max()
            if beyond > _ROUNDING:
                raise ValueError(
                    f"{where} reach {beyond:g} pixels beyond its {width} x {height}: they were made for other data; "
                    "write a file for these images with boxwright propose"
                )
        return GivenProposals(boxes, scores)

    def _rows_of_split(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of all splits, or of the chosen one where an image id occurs more than once."""
        if len(np.unique(image_ids)) == len(image_ids):
            return np.arange(len(image_ids))
        names = [split["name"] for split in self.page["splits"]]
        if self.split not in names:
            raise ValueError(
                f"{self.path} holds splits that share image ids ({', '.join(names)}), and {self.split!r} is none of "
                "them: name the right one with --split, or write a file for these images alone"
            )
        ends = np.cumsum([split["images"] for split in self.page["splits"]])
        number = names.index(self.split)
        rows = np.arange(ends[number] - self.page["splits"][number]["images"], ends[number])
        if len(np.unique(image_ids[rows])) != len(rows):
            raise ValueError(f"{self.path} is damaged: an image of {self.split} has two rows; write it anew")
        return rows


def write_proposals(
    path: Path,
    *,
    image_ids: Iterable[int],
    counts: Iterable[int],
    images: Iterable[GivenProposals],
    page: Mapping[str, Any],
) -> None:
    """Write a proposals file, whole or not at all: whatever happens, `path` is the old file or the new one.

    Args:
        path: Of the file; its folder is made if it is not there.
        image_ids: N, split after split.
        counts: N, the proposals of each image.
        images: N, the proposals themselves; taken one by one, so that a generator holds one image at a time.
        page: "splits", and what else is worth keeping, as `json` can write it.
    """
    ids = np.asarray(list(image_ids), "<i8")
    offsets = np.concatenate([[0], np.cumsum(np.asarray(list(counts), np.int64))]).astype("<i8")
    total = int(offsets[-1])
    assert len(offsets) == len(ids) + 1
    columns = {
        "image_ids": ("I64", ids.shape, ids.nbytes),
        "offsets": ("I64", offsets.shape, offsets.nbytes),
        "boxes": ("F32", (total, 4), total * 16),
        "scores": ("F32", (total,), total * 4),
    }
    places = np.cumsum([0, *(size for _, _, size in columns.values())]).tolist()
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps({"format": FORMAT, **page})}}
    for (name, (dtype, shape, _)), span in zip(columns.items(), pairwise(places), strict=True):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a file can be renamed into place only within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        with draft.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + ids.tobytes() + offsets.tobytes())
            file.truncate(8 + len(text) + places[-1])
        whole = np.memmap(draft, np.uint8, "r+")
        data = whole[8 + len(text) :]
        boxes = data[places[2] : places[3]].view("<f4").reshape(-1, 4)
        scores = data[places[3] :].view("<f4")
        for (start, end), image in zip(pairwise(offsets.tolist()), images, strict=True):
            boxes[start:end], scores[start:end] = image.boxes, image.scores
        whole.flush()
        draft.replace(path)


def _reopen(path: Path, split: str | None, limit: int, source: Path) -> ProposalFile:
    return ProposalFile(path, split=split, limit=limit, source=source)


def _page(path: Path, strings: Mapping[str, str] | None) -> dict[str, Any]:
    """The metadata's page, checked."""
    text = (strings or {}).get(_KEY)
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but holds no proposals: give one that boxwright propose wrote")
    try:
        page = json.loads(text)
        known = page["format"] == FORMAT
        splits = [(str(split["name"]), int(split["images"])) for split in page["splits"]] if known else []
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its page cannot be read ({error!r}); write it anew") from None
    if not known:
        raise ValueError(f"{path} is of format {page['format']!r}; this version reads {FORMAT!r}: update boxwright")
    return {**page, "splits": [{**s, "name": n, "images": c} for s, (n, c) in zip(page["splits"], splits, strict=True)]}
