"""Precomputed proposals in one file of flat columns, which is memory-mapped and therefore shared by all its readers.

N images, M proposals. The file is a safetensors file with four tensors: `image_ids` [N] int64; `offsets` [N + 1] int64,
index of the first proposal of each image, and M at the end; `boxes` [M, 4] float32 xyxy in pixels of the image file;
`scores` [M] float32, descending within an image. The images of a split are consecutive. The metadata string
`boxwright_proposals` is JSON::

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
_WRITE_AGAIN = "Write the file again with boxwright propose"
# A box that extends further beyond its image, in pixels, belongs to another image.
_ROUNDING = 2.0


class ImageProposals(NamedTuple):
    """The proposals of one image, best first."""

    boxes: NDArray[np.float32]
    """[n, 4] float32 xyxy in pixels of the file."""
    scores: NDArray[np.float32]
    """[n] float32, descending."""


GivenProposals = ImageProposals
"""Deprecated name of `ImageProposals`."""


class ProposalFile:
    """The best proposals of each image, from a file. It is pickled as its path, so that workers map the same memory."""

    def __init__(
        self, path: str | Path, *, split: str | None = None, limit: int = 1000, source: str | Path | None = None
    ) -> None:
        """Open a proposals file.

        Args:
            path: Proposals file.
            split: Split of the images. It is used only if splits share image ids.
            limit: Maximum number of proposals per image; the best ones are used.
            source: File to name in messages, from which `path` was converted; None for `path`.

        Raises:
            ValueError: The file is not a proposals file or is damaged, or splits share image ids and `split` is none of
                them.
            OSError: The file cannot be read.
        """
        if limit < 1:
            raise ValueError(f"limit: expected at least 1 proposal per image, got {limit}")
        self.path, self.split, self.limit = Path(path), split, limit
        self.source = self.path if source is None else Path(source)
        with self.path.open("rb"):  # raises the usual OSError, where safetensors raises its own
            pass
        try:
            self._file = safe_open(self.path, framework="numpy")
            self.metadata = _read_metadata(self.path, self._file.metadata())
            """Metadata of the file: `splits` and the facts that its writer added."""
            image_ids, self._offsets = self._file.get_tensor("image_ids"), self._file.get_tensor("offsets")
            slices = [self._file.get_slice(name) for name in ("boxes", "scores")]
            shapes = [part.get_shape() for part in slices]
            types = [image_ids.dtype, self._offsets.dtype, *(part.get_dtype() for part in slices)]
        except ValueError:
            raise
        except Exception as error:  # such as AttributeError for a dtype that numpy lacks
            raise ValueError(
                f"{self.path} is not a complete proposals file ({error}). Write it again with boxwright propose"
            ) from None
        if types != [np.int64, np.int64, "F32", "F32"] or image_ids.ndim != 1 or self._offsets.ndim != 1:
            raise ValueError(f"{self.path} is damaged: unexpected column types {types}. {_WRITE_AGAIN}")
        counts = np.diff(self._offsets)
        if len(self._offsets) != len(image_ids) + 1 or (counts < 0).any() or self._offsets[0] != 0:
            raise ValueError(f"{self.path} is damaged: offsets do not match the images. {_WRITE_AGAIN}")
        if shapes != [[self._offsets[-1], 4], [self._offsets[-1]]]:
            raise ValueError(f"{self.path} is damaged: number of boxes or scores does not match. {_WRITE_AGAIN}")
        rows = self._rows_of_split(image_ids)
        self._rows = rows[np.argsort(image_ids[rows], kind="stable")]
        self.image_ids: NDArray[np.int64] = image_ids[self._rows]
        """[N] int64, ascending."""
        self.counts: NDArray[np.int64] = np.minimum(counts[self._rows], limit)
        """[N] int64, number of proposals that `of` returns for each of these images."""
        max_count = max(int(self.counts.max(initial=0)), 1)
        # Rounded up, so that a model compiled for one file also fits the next file.
        self.slots = min(limit, -(-max_count // _SLOT_STEP) * _SLOT_STEP)
        """P, number of slots that fit the proposals of every image."""

    @property
    def page(self) -> dict[str, Any]:
        """Deprecated name of `metadata`."""
        return self.metadata

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.split, self.limit, self.source)

    def require(self, image_ids: Iterable[int]) -> None:
        """Check that the file has proposals for images.

        Raises:
            ValueError: Images are missing; the message has their number and one image id.
        """
        required = np.asarray(list(image_ids), np.int64)
        missing = required[~np.isin(required, self.image_ids)]
        if len(missing):
            raise ValueError(
                f"{self.source} has no proposals for {len(missing)} of {len(required)} images (for example image id "
                f"{missing[0]}): it was written for other data. Write proposals for these images with boxwright propose"
            )

    def of(self, image_id: int, image_size: tuple[int, int] | None = None) -> ImageProposals:
        """The best proposals of an image.

        Args:
            image_id: Id of an image in the file.
            image_size: (height, width) of the image file, to check that the boxes fit; None for no check.

        Raises:
            ValueError: The file has no such image, or its proposals are not finite, not sorted, or of another image.
        """
        position = int(np.searchsorted(self.image_ids, image_id))
        if position == len(self.image_ids) or self.image_ids[position] != image_id:
            self.require([image_id])
        row = self._rows[position]
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        end = min(end, start + self.limit)
        if start == end:
            return ImageProposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
        boxes, scores = self._file.get_slice("boxes")[start:end], self._file.get_slice("scores")[start:end]
        where = f"{self.source}: proposals of image {image_id}"
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"{where} contain NaN or infinity. {_WRITE_AGAIN}")
        if (np.diff(scores) > 0).any():
            raise ValueError(f"{where} are not sorted by descending score. {_WRITE_AGAIN}")
        if image_size is not None:
            height, width = image_size
            beyond = np.abs(boxes - boxes.clip(0, np.array([width, height, width, height], np.float32))).max()
            if beyond > _ROUNDING:
                raise ValueError(
                    f"{where} extend {beyond:g} pixels beyond its {width} x {height} pixels: they were made for other "
                    "data. Write proposals for these images with boxwright propose"
                )
        return ImageProposals(boxes, scores)

    def _rows_of_split(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of all splits, or of the selected split if an image id occurs more than once."""
        if len(np.unique(image_ids)) == len(image_ids):
            return np.arange(len(image_ids))
        names = [split["name"] for split in self.metadata["splits"]]
        if self.split not in names:
            raise ValueError(
                f"{self.path}: expected one of the splits {', '.join(names)}, which share image ids, got "
                f"{self.split!r}. Use --split, or write a file for these images only"
            )
        ends = np.cumsum([split["images"] for split in self.metadata["splits"]])
        number = names.index(self.split)
        rows = np.arange(ends[number] - self.metadata["splits"][number]["images"], ends[number])
        if len(np.unique(image_ids[rows])) != len(rows):
            raise ValueError(f"{self.path} is damaged: an image of {self.split} has two rows. {_WRITE_AGAIN}")
        return rows


def write_proposals(
    path: Path,
    *,
    image_ids: Iterable[int],
    counts: Iterable[int],
    images: Iterable[ImageProposals],
    metadata: Mapping[str, Any] | None = None,
    page: Mapping[str, Any] | None = None,
) -> None:
    """Write a proposals file atomically: after a crash, `path` is either the old or the new file.

    Args:
        path: Path of the file; its folder is created if necessary.
        image_ids: N image ids, split after split.
        counts: Number of proposals of each of the N images.
        images: Proposals of the N images, consumed one by one, so that a generator needs memory for only one image.
        metadata: Metadata: `splits` and any other facts that `json` can write.
        page: Deprecated name of `metadata`.
    """
    metadata = page if metadata is None else metadata
    assert metadata is not None
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
    ends = np.cumsum([0, *(size for _, _, size in columns.values())]).tolist()
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps({"format": FORMAT, **metadata})}}
    for (name, (dtype, shape, _)), span in zip(columns.items(), pairwise(ends), strict=True):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Use the same folder, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        with draft.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + ids.tobytes() + offsets.tobytes())
            file.truncate(8 + len(text) + ends[-1])
        whole = np.memmap(draft, np.uint8, "r+")
        data = whole[8 + len(text) :]
        boxes = data[ends[2] : ends[3]].view("<f4").reshape(-1, 4)
        scores = data[ends[3] :].view("<f4")
        for (start, end), image in zip(pairwise(offsets.tolist()), images, strict=True):
            boxes[start:end], scores[start:end] = image.boxes, image.scores
        whole.flush()
        draft.replace(path)


def _reopen(path: Path, split: str | None, limit: int, source: Path) -> ProposalFile:
    return ProposalFile(path, split=split, limit=limit, source=source)


def _read_metadata(path: Path, strings: Mapping[str, str] | None) -> dict[str, Any]:
    """Metadata of a proposals file, validated."""
    text = (strings or {}).get(_KEY)
    if text is None:
        raise ValueError(f"{path} is a safetensors file without proposals. Use a file that boxwright propose wrote")
    try:
        metadata = json.loads(text)
        is_known = metadata["format"] == FORMAT
        splits = [(str(split["name"]), int(split["images"])) for split in metadata["splits"]] if is_known else []
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its metadata cannot be read ({error!r}). {_WRITE_AGAIN}") from None
    if not is_known:
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {metadata['format']!r}. Update boxwright")
    return {
        **metadata,
        "splits": [{**s, "name": n, "images": c} for s, (n, c) in zip(metadata["splits"], splits, strict=True)],
    }
