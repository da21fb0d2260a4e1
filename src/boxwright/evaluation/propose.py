"""Write the proposals for a whole data set to one file, from all ranks.

Each rank writes a part file per split; rank 0 joins the parts. So no process holds more than its own share of one
split, and only a few counts are communicated.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from boxwright.checks import check_count, check_device
from boxwright.data.dataset import Dataset
from boxwright.data.proposals import ImageProposals, ProposalFile, write_proposals
from boxwright.detectors.detector import as_detector
from boxwright.distributed import rank, world_size
from boxwright.evaluation.evaluate import file_boxes, without_non_finite
from boxwright.evaluation.proposals import RecallCounter
from boxwright.precision import Precision, autocast
from boxwright.structures import Batch, to_device


class ProposalWriter:
    """Collects the splits of a proposals file; all ranks must make the same calls."""

    def __init__(self, path: Path) -> None:
        """Prepare a file in a folder that all ranks can access. Only `finish` creates the file; parts are removed."""
        self.path = path
        self._parts = path.parent / f".{path.name}.parts"
        self._splits: list[dict[str, Any]] = []
        self._orders: list[list[int]] = []

    def __enter__(self) -> ProposalWriter:
        if rank() == 0:  # fail before the work if the file cannot be written
            if self.path.is_dir():
                raise IsADirectoryError(f"{self.path} is a folder. Use the path of a file.")
            shutil.rmtree(self._parts, ignore_errors=True)
            try:
                self._parts.mkdir(parents=True)
            except OSError as error:
                raise OSError(f"{self.path} cannot be written: {error.strerror}") from error
        _barrier()
        return self

    def __exit__(self, *_: object) -> None:
        if rank() == 0:
            shutil.rmtree(self._parts, ignore_errors=True)

    def add(
        self, name: str, annotations: str, image_ids: Iterable[int], proposals: Mapping[int, ImageProposals]
    ) -> None:
        """Add a split.

        Args:
            name: Name of the split, unique in the file.
            annotations: Name of the annotation file of the split, stored in the metadata.
            image_ids: Ids of all images of the split, in the order of the data set.
            proposals: Proposals of this rank's images, by image id.
        """
        self._orders.append(list(image_ids))
        self._splits.append({"name": name, "annotations": annotations, "images": len(self._orders[-1])})
        write_proposals(
            self._part(len(self._splits) - 1, rank()),
            image_ids=proposals.keys(),
            counts=[len(image.boxes) for image in proposals.values()],
            images=proposals.values(),
            metadata={"splits": [{"name": name, "images": len(proposals)}]},
        )

    def finish(self, page: Mapping[str, Any]) -> tuple[int, int]:
        """Join the parts on rank 0.

        Args:
            page: Metadata of the file, in addition to the splits.

        Returns:
            Number of images and number of proposals written; zeros on the other ranks.
        """
        _barrier()
        total = (0, 0)
        if rank() == 0:
            counts = np.concatenate([self._counts(number) for number in range(len(self._splits))])
            write_proposals(
                self.path,
                image_ids=[image_id for order in self._orders for image_id in order],
                counts=counts,
                images=self._images(),
                metadata={"splits": self._splits, **page},
            )
            total = len(counts), int(counts.sum())
        _barrier()
        return total

    def _counts(self, number: int) -> np.ndarray:
        counts: dict[int, int] = {}
        for part in self._open(number):
            counts.update(zip(part.image_ids.tolist(), part.counts.tolist(), strict=True))
        return np.array([counts[image_id] for image_id in self._orders[number]], np.int64)

    def _images(self) -> Iterator[ImageProposals]:
        for number, order in enumerate(self._orders):
            parts = self._open(number)
            owner = {image_id: part for part in parts for image_id in part.image_ids.tolist()}
            for image_id in order:
                yield owner[image_id].of(image_id)

    def _open(self, number: int) -> list[ProposalFile]:
        return [ProposalFile(self._part(number, part_rank), limit=2**31) for part_rank in range(world_size())]

    def _part(self, number: int, part_rank: int) -> Path:
        return self._parts / f"split_{number}_rank_{part_rank}.safetensors"


def propose(
    detector: nn.Module,
    dataset: Dataset,
    batches: Iterable[Batch],
    *,
    device: torch.device | str,
    precision: Precision = "float32",
    limit: int = 1000,
    progress: Callable[[int], Any] | None = None,
) -> tuple[dict[int, ImageProposals], dict[str, float]]:
    """Compute the proposals of an RPN for this rank's images, and the recall of the proposals of all ranks.

    Args:
        detector: RPN; its training mode is restored afterwards.
        dataset: Data set with the ground truth.
        batches: This rank's share of the images, from `EvaluationLoader`.
        device: Device of the detector.
        precision: Precision of the computation.
        limit: Maximum number of proposals per image; the best are kept.
        progress: Called after each batch of this rank with its number of images.

    Returns:
        Proposals by image id, in pixels of the files and clipped to the images, and recall by name.
    """
    check_count("limit", limit)
    device, detector = check_device(device), as_detector(detector)
    was_training = detector.training
    detector.eval()
    proposals: dict[int, ImageProposals] = {}
    counter = RecallCounter(dataset)
    try:
        with torch.inference_mode(), autocast(device, precision):
            for batch in batches:
                detections = without_non_finite(detector.detect(to_device(batch, device)))
                boxes, scores = file_boxes(batch, detections).float().numpy(), detections.scores.float().cpu().numpy()
                for image_id, image_boxes, image_scores, valid in zip(
                    batch.image_ids.tolist(), boxes, scores, detections.valid.cpu().numpy(), strict=True
                ):
                    image_proposals = ImageProposals(image_boxes[valid][:limit], image_scores[valid][:limit])
                    proposals[image_id] = image_proposals
                    corners = image_proposals.boxes.astype(np.float64)
                    counter.add(image_id, np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1))
                if progress is not None:
                    progress(len(batch.image_ids))
    finally:
        detector.train(was_training)
    if dist.is_initialized():
        counts = torch.from_numpy(counter.counts)
        dist.all_reduce(counts)  # in place, on the host
    return proposals, counter.recall()


def _barrier() -> None:
    """Wait for all ranks, on the host."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))
