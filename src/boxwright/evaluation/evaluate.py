"""Evaluate a detector on a data set, with the images distributed over all ranks.

B images, D detections per image; N detections over the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from boxwright.checks import check_count, check_device
from boxwright.data.dataset import Category, Dataset
from boxwright.data.masks import Masks
from boxwright.detectors.detector import Detector, as_detector
from boxwright.distributed import rank, world_size
from boxwright.evaluation.coco import CocoMetrics, coco_limits, coco_metrics
from boxwright.evaluation.paste import paste_masks
from boxwright.evaluation.proposals import LIMITS, proposal_recall, recall_names
from boxwright.evaluation.results import Results, match_categories
from boxwright.geometry import affine
from boxwright.precision import Precision, autocast
from boxwright.structures import Batch, Detections, map_tensors, to_device

COORDINATE_DECIMALS = 3
"""Coordinates are rounded to a thousandth of a pixel, about the resolution of float32, to keep results files small."""


def evaluate(
    detector: nn.Module,
    dataset: Dataset,
    batches: Iterable[Batch],
    *,
    device: torch.device | str,
    precision: Precision = "float32",
    categories: Sequence[Category] | None = None,
    max_detections: tuple[int, int, int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Results, CocoMetrics]:
    """Detect objects in `batches` and evaluate them on `dataset`.

    Every rank returns the results and metrics of all ranks.

    Args:
        detector: Detector; its training mode is restored afterwards.
        dataset: Data set with the ground truth.
        batches: This rank's share of the images, from `EvaluationLoader`.
        device: Device of the detector.
        precision: Precision of the computation; `auto` is bfloat16 on GPUs that support it, float32 otherwise.
        categories: Categories of the model, in the order of its labels; None for the categories of the data set.
        max_detections: See `coco_metrics`; None for `coco_limits` of the detector's maximum number of detections.
        progress: Called after each batch of this rank with its number of images.

    Raises:
        ValueError: The categories of the model and of the data set have different names.
    """
    new_labels = None if categories is None else match_categories(categories, dataset.categories)
    results = detect_dataset(detector, batches, device=device, precision=precision, progress=progress)
    if new_labels is not None:
        results = results.relabel(new_labels)
    max_detections = max_detections or coco_limits(as_detector(detector).max_detections)
    return results, shared_metrics(dataset, results, device=device, max_detections=max_detections)


def evaluate_proposals(
    detector: nn.Module,
    dataset: Dataset,
    batches: Iterable[Batch],
    *,
    device: torch.device | str,
    precision: Precision = "float32",
    progress: Callable[[int], Any] | None = None,
) -> tuple[Results, dict[str, float]]:
    """Evaluate an RPN: like `evaluate`, but returns the average recall of proposals by name (see `proposal_recall`).

    The results contain the best 1000 proposals per image, which is the largest limit of the metrics.
    """
    results = detect_dataset(detector, batches, device=device, precision=precision, progress=progress, limit=LIMITS[-1])
    if rank() == 0:
        recalls = proposal_recall(dataset, results)
    else:
        recalls = dict.fromkeys(recall_names(), -1.0)
    return results, dict(zip(recalls, _from_first_rank(np.array(list(recalls.values())), device).tolist(), strict=True))


def detect_dataset(
    detector: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device | str,
    precision: Precision = "float32",
    progress: Callable[[int], Any] | None = None,
    limit: int | None = None,
) -> Results:
    """Detect objects in the images of all ranks. Boxes are in pixels of the files and clipped to the images.

    Every rank gets the results of all ranks, in an order that does not depend on the number of ranks. Arguments as in
    `evaluate`; `limit` is the maximum number of detections per image (None for all).

    Raises:
        ValueError: As `require_labels`.
    """
    device, detector = check_device(device), as_detector(detector)
    if limit is not None:
        check_count("limit", limit)
    was_training = detector.training
    evaluated = [np.zeros(0, dtype=np.int64)]
    pending: list[Future[tuple[np.ndarray, Masks | None]]] = []
    detector.eval()
    try:
        # Masks are pasted and encoded on a thread while the device processes the next batch.
        with ThreadPoolExecutor(1) as thread, torch.inference_mode(), autocast(device, precision):
            for batch in batches:
                detections = without_non_finite(detector.detect(to_device(batch, device)))
                detections = map_tensors(detections, lambda slots: slots[:, :limit].cpu())
                require_labels(detections, detector)
                if pending:
                    pending[-1].result()  # Keeps batches from piling up, and raises errors early.
                pending.append(thread.submit(_in_files, batch, detections))
                evaluated.append(batch.image_ids.numpy())
                if progress is not None:
                    progress(len(batch.image_ids))
        parts = [future.result() for future in pending]
    finally:
        detector.train(was_training)
    masks = [part for _, part in parts if part is not None]
    table = _gather_rows(np.concatenate([np.zeros((0, 7)), *(rows for rows, _ in parts)]), device)
    image_ids = _gather_rows(np.concatenate(evaluated)[:, None].astype(np.float64), device)[:, 0]
    gathered = _gather_masks(masks, device)
    # Sort stably by image, so that the order, and with it the rank of equal scores, is the same as in a single process.
    order = np.argsort(table[:, 0], kind="stable")
    table = table[order]
    return Results(
        image_ids=table[:, 0].astype(np.int64),
        labels=table[:, 1].astype(np.int64),
        scores=table[:, 2].copy(),
        boxes=table[:, 3:].round(COORDINATE_DECIMALS),
        evaluated=np.sort(image_ids.astype(np.int64)),
        masks=None if gathered is None else gathered.select(order),
    )


@torch.inference_mode()
def _in_files(batch: Batch, detections: Detections) -> tuple[np.ndarray, Masks | None]:
    """Table and masks of detections in pixels of the files; masks are None if the detector has none."""
    return _file_table(batch, detections), None if detections.masks is None else file_masks(batch, detections)


def without_non_finite(detections: Detections) -> Detections:
    """Mark detections with a non-finite score or box as invalid. Boxwright's own detectors output none."""
    finite = detections.boxes.isfinite().all(-1) & detections.scores.isfinite()
    return replace(detections, valid=detections.valid & finite)


def require_labels(detections: Detections, detector: Detector) -> None:
    """Check that the label of each valid detection is a class of the detector.

    Raises:
        ValueError: A valid detection has a label outside 0 to num_classes - 1.
    """
    labels, num_classes = detections.labels[detections.valid], detector.num_classes
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"{type(detector).__name__}.detect: label of a detection: expected 0 to {num_classes - 1} (num_classes is "
            f"{num_classes}), got {int(wrong[0])}. Mark detections of the background as invalid."
        )


def file_boxes(batch: Batch, detections: Detections) -> Tensor:
    """[B, D, 4] float64 on the CPU: boxes of detections as xyxy in pixels of the files, clipped to the images.

    A box with x2 < x1 or y2 < y1 becomes a box without area.
    """
    to_file = affine.invert(batch.transforms.cpu().double())
    boxes = affine.transform_boxes(detections.boxes.cpu().double(), to_file)
    height, width = batch.original_sizes.cpu().double().unbind(dim=1)
    limits = torch.stack([width, height, width, height], dim=1)[:, None]
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    return torch.cat([boxes[..., :2], torch.maximum(boxes[..., :2], boxes[..., 2:])], dim=-1)


def file_masks(batch: Batch, detections: Detections) -> Masks:
    """Masks of the valid detections, image after image, in pixels of the files."""
    assert detections.masks is not None
    valid = detections.valid.cpu()
    sizes = batch.original_sizes.cpu()[:, None].expand(*valid.shape, 2)
    # The columns of masks of a flipped image are reversed.
    mirrored = (batch.transforms[:, 0, 0] < 0).cpu()[:, None, None, None]
    masks = detections.masks.cpu().float()
    return paste_masks(
        torch.where(mirrored, masks.flip(-1), masks)[valid].numpy(),
        file_boxes(batch, detections)[valid].numpy(),
        sizes[valid].numpy(),
    )


def _file_table(batch: Batch, detections: Detections) -> np.ndarray:
    """[N, 7] float64, one row per detection: image id (exact up to 2^53), label, score, x, y, width, height.

    Boxes are in pixels of the image file.
    """
    boxes = file_boxes(batch, detections)
    valid = detections.valid.cpu()
    rows = torch.cat(
        [
            batch.image_ids.cpu()[:, None, None].expand(*valid.shape, 1).double(),
            detections.labels.cpu()[..., None].double(),
            detections.scores.cpu()[..., None].double(),
            boxes[..., :2],
            boxes[..., 2:] - boxes[..., :2],
        ],
        dim=2,
    )
    return rows[valid].numpy()


def _gather_rows(rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Concatenate the rows of all ranks. Tensors are sent because gathering Python objects would unpickle data."""
    if world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    lengths = [int(count.item()) for count in counts]
    local = torch.from_numpy(rows).to(device)
    padded = local.new_zeros((max(lengths), *local.shape[1:]))
    padded[: len(rows)] = local
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return np.concatenate([part[:length].cpu().numpy() for part, length in zip(parts, lengths, strict=True)])


def _gather_masks(masks: Sequence[Masks], device: torch.device) -> Masks | None:
    """Concatenate the masks of all ranks; None if no rank has masks."""
    counts = [characters for part in masks for characters in part.counts]
    sizes = np.concatenate([np.zeros((0, 2), np.int64), *(part.sizes for part in masks)])
    # A rank without images does not know whether the detector outputs masks.
    if not _gather_rows(np.array([bool(masks)]), device).any():
        return None
    lengths = _gather_rows(np.array([len(characters) for characters in counts], np.int64), device)
    text = _gather_rows(np.frombuffer(b"".join(counts), np.uint8).copy(), device).tobytes()
    bounds = [0, *np.cumsum(lengths).tolist()]
    return Masks.of([text[start:end] for start, end in pairwise(bounds)], _gather_rows(sizes, device))


def shared_metrics(
    dataset: Dataset,
    results: Results,
    *,
    device: torch.device | str,
    max_detections: tuple[int, int, int] = (1, 10, 100),
) -> CocoMetrics:
    """Compute `coco_metrics` on rank 0 and send them to all ranks, so that only one process reads the annotations."""
    if rank() == 0:
        metrics = coco_metrics(dataset, results, max_detections=max_detections)
    else:
        metrics = CocoMetrics.blank(dataset.categories, max_detections, with_masks=results.masks is not None)
    return metrics.unpack(_from_first_rank(metrics.pack(), device))


def _from_first_rank(values: np.ndarray, device: torch.device | str) -> np.ndarray:
    """Broadcast the values of rank 0. All ranks must pass an array of the same size."""
    if not dist.is_initialized():
        return values
    tensor = torch.from_numpy(values).to(device)
    dist.broadcast(tensor, src=0)
    return tensor.cpu().numpy()
