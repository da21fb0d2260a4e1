"""torchvision's equivalent of a Boxwright detector, for comparisons of training, accuracy and speed.

Shapes: n objects of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet

from boxwright.benchmark.torchvision_models import torchvision_model
from boxwright.detectors.detector import Detector
from boxwright.precision import Precision, autocast
from boxwright.structures import Batch, Detections, to_device
from boxwright.training.experiment import SGD, AdamW


def torchvision_peer(model: Callable[..., nn.Module], ours: Detector) -> TorchvisionDetector:
    """Build torchvision's equivalent of a Boxwright detector; see `torchvision_model`.

    Args:
        model: the experiment's model factory.
        ours: the detector that the factory built.

    Raises:
        ValueError: torchvision has no equivalent model.
    """
    return TorchvisionDetector(torchvision_model(model, ours), ours.num_classes, ours.max_detections)


class TorchvisionDetector(Detector):
    """Gives a torchvision detector Boxwright's interface, so that the same code trains and evaluates both."""

    def __init__(self, model: nn.Module, num_classes: int, max_detections: int) -> None:
        """Wrap a torchvision model."""
        super().__init__()
        self.model = model
        self.num_classes = num_classes
        self.max_detections = max_detections
        # Except in RetinaNet, label 0 is the background.
        self.first_label = 0 if isinstance(model, RetinaNet) else 1
        self.needs_masks = isinstance(model, MaskRCNN)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Torchvision's losses by name."""
        self.model.train()
        return self.model(unpadded_images(batch), self.targets_of(batch))

    def detect(self, batch: Batch) -> Detections:
        """Torchvision's detections without masks, padded to `max_detections` slots per image."""
        self.model.eval()
        outputs = self.model(unpadded_images(batch))

        def padded(name: str) -> Tensor:
            rows = [output[name] for output in outputs]
            return torch.stack(
                [F.pad(row, (0, 0) * (row.ndim - 1) + (0, self.max_detections - len(row))) for row in rows]
            )

        valid = torch.stack(
            [
                torch.arange(self.max_detections, device=output["scores"].device) < len(output["scores"])
                for output in outputs
            ]
        )
        labels = (padded("labels") - self.first_label).clamp(min=0)
        return Detections(boxes=padded("boxes"), scores=padded("scores"), labels=labels, valid=valid)

    def targets_of(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Targets of each image: boxes [n, 4], labels [n] and, for a mask head, masks [n, height, width]."""
        assert batch.targets is not None, "losses need targets"
        selected = batch.targets.valid & ~batch.targets.crowd
        targets = [
            {"boxes": boxes[keep], "labels": labels[keep] + self.first_label}
            for boxes, labels, keep in zip(batch.targets.boxes, batch.targets.labels, selected, strict=True)
        ]
        if self.needs_masks:
            for target, masks in zip(targets, object_bitmaps(batch, selected), strict=True):
                target["masks"] = masks.to(target["boxes"].device)
        return targets


class TorchvisionSystem:
    """A torchvision detector with the training step of torchvision's reference scripts."""

    name = "torchvision"

    def __init__(
        self,
        detector: TorchvisionDetector,
        optimizer: SGD | AdamW,
        *,
        device: torch.device,
        precision: Precision,
        training: bool,
    ) -> None:
        """Set up training or inference."""
        self.detector = detector.to(device).train(training)
        self._device, self._precision = device, precision
        self._training = training
        if training:
            trained = [p for p in detector.parameters() if p.requires_grad]
            factory: Any = partial(torch.optim.SGD, momentum=0.9) if isinstance(optimizer, SGD) else torch.optim.AdamW
            self._optimizer: torch.optim.Optimizer = factory(trained, lr=0.0, weight_decay=optimizer.weight_decay)

    def prepare(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]], list[tuple[int, int]]]:
        """Convert a batch to torchvision's images and targets (empty for inference), and the sizes of the files."""
        sizes = [(int(height), int(width)) for height, width in batch.original_sizes.tolist()]
        moved = to_device(batch, self._device)
        return unpadded_images(moved), self.detector.targets_of(moved) if self._training else [], sizes

    def train_step(self, inputs: tuple[list[Tensor], list[dict[str, Tensor]], Any]) -> None:
        """Compute losses and gradients and run the optimizer with learning rate 0."""
        images, targets, _ = inputs
        with autocast(self._device, self._precision):
            losses = self.detector.model(images, targets)
        self._optimizer.zero_grad()
        sum(losses.values()).backward()
        self._optimizer.step()

    def infer(self, inputs: tuple[list[Tensor], Any, list[tuple[int, int]]]) -> None:
        """Run torchvision's inference and copy the boxes and pasted masks, in file pixel coordinates, to the host."""
        images, _, sizes = inputs
        transform: Any = self.detector.model.transform
        transform.file_sizes = sizes
        with torch.inference_mode(), autocast(self._device, self._precision):
            outputs = self.detector.model(images)
        for output in outputs:
            for tensor in output.values():
                tensor.cpu()

    def close(self) -> None:
        """Do nothing: there are no resources outside this process."""


def unpadded_images(batch: Batch) -> list[Tensor]:
    """The images of a batch without padding, as float32 in 0..1."""
    sizes = batch.image_sizes.tolist()
    return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, sizes, strict=True)]


def object_bitmaps(batch: Batch, selected: Tensor) -> list[Tensor]:
    """Binary masks of the selected objects of each image, [n, height, width] uint8.

    Args:
        batch: its targets hold masks as grids (see `MaskGrids`).
        selected: [B, G] bool, which object slots to return.
    """
    assert batch.targets is not None, "losses need targets"
    assert batch.targets.masks is not None, "a mask head needs masks in its targets"
    grids, frames = batch.targets.masks.bitmaps.cpu(), batch.targets.masks.frames.cpu()
    bitmaps = []
    for index, (height, width) in enumerate(batch.image_sizes.tolist()):
        slots = selected[index].cpu().nonzero()[:, 0].tolist()
        masks = np.zeros((len(slots), height, width), np.uint8)
        for row, slot in enumerate(slots):
            x1, y1, x2, y2 = frames[index, slot].tolist()
            cell_x, cell_y = ((end - start) / grids.shape[-1] for start, end in ((x1, x2), (y1, y2)))
            # Maps the centres of grid cells to pixel centres.
            matrix = np.array([[cell_x, 0, x1 + cell_x / 2 - 0.5], [0, cell_y, y1 + cell_y / 2 - 0.5]])
            coverage = cv2.warpAffine(grids[index, slot].numpy(), matrix, (width, height), flags=cv2.INTER_LINEAR)
            masks[row] = coverage >= 128
        bitmaps.append(torch.from_numpy(masks))
    return bitmaps
