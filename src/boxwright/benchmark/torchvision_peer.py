"""torchvision's detector of the same architecture and weights as ours, to be trained, tested or timed beside it.

n objects of one image.
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
    """Torchvision's detector beside ours; see `torchvision_model`.

    Args:
        model: the experiment's.
        ours: what it built.

    Raises:
        ValueError: torchvision has no such model.
    """
    return TorchvisionDetector(torchvision_model(model, ours), ours.num_classes, ours.max_detections)


class TorchvisionDetector(Detector):
    """A torchvision detector behind Boxwright's protocol, so that both train and test by the same code."""

    def __init__(self, model: nn.Module, num_classes: int, max_detections: int) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model
        self.num_classes = num_classes
        self.max_detections = max_detections
        # All but RetinaNet count background as a class, the first.
        self.first_label = 0 if isinstance(model, RetinaNet) else 1
        self.needs_masks = isinstance(model, MaskRCNN)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The model's own losses."""
        self.model.train()
        return self.model(pictures_of(batch), self.targets_of(batch))

    def detect(self, batch: Batch) -> Detections:
        """The model's own detections but for masks, padded to as many slots as it can give."""
        self.model.eval()
        found = self.model(pictures_of(batch))

        def padded(name: str) -> Tensor:
            rows = [one[name] for one in found]
            return torch.stack(
                [F.pad(row, (0, 0) * (row.ndim - 1) + (0, self.max_detections - len(row))) for row in rows]
            )

        valid = torch.stack(
            [torch.arange(self.max_detections, device=one["scores"].device) < len(one["scores"]) for one in found]
        )
        labels = (padded("labels") - self.first_label).clamp(min=0)
        return Detections(boxes=padded("boxes"), scores=padded("scores"), labels=labels, valid=valid)

    def targets_of(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The objects of each image: boxes [n, 4], labels [n] and, for a mask head, masks [n, height, width]."""
        assert batch.targets is not None, "losses need targets"
        wanted = batch.targets.valid & ~batch.targets.crowd
        targets = [
            {"boxes": boxes[use], "labels": labels[use] + self.first_label}
            for boxes, labels, use in zip(batch.targets.boxes, batch.targets.labels, wanted, strict=True)
        ]
        if self.needs_masks:
            for target, masks in zip(targets, object_bitmaps(batch, wanted), strict=True):
                target["masks"] = masks.to(target["boxes"].device)
        return targets


class TorchvisionSystem:
    """A torchvision detector as a thing to time, trained by the plain loop of torchvision's reference scripts."""

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
            kind: Any = partial(torch.optim.SGD, momentum=0.9) if isinstance(optimizer, SGD) else torch.optim.AdamW
            self._optimizer: torch.optim.Optimizer = kind(trained, lr=0.0, weight_decay=optimizer.weight_decay)

    def prepare(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]], list[tuple[int, int]]]:
        """Pictures as torchvision takes them, objects, and the files' sizes."""
        sizes = [(int(height), int(width)) for height, width in batch.original_sizes.tolist()]
        moved = to_device(batch, self._device)
        return pictures_of(moved), self.detector.targets_of(moved) if self._training else [], sizes

    def train_step(self, given: tuple[list[Tensor], list[dict[str, Tensor]], Any]) -> None:
        """Losses, gradients, optimizer."""
        images, targets, _ = given
        with autocast(self._device, self._precision):
            losses = self.detector.model(images, targets)
        self._optimizer.zero_grad()
        sum(losses.values()).backward()
        self._optimizer.step()

    def infer(self, given: tuple[list[Tensor], Any, list[tuple[int, int]]]) -> None:
        """The model's own inference, to boxes and pasted masks in the pixels of the files, brought to the host."""
        images, _, sizes = given
        transform: Any = self.detector.model.transform
        transform.file_sizes = sizes
        with torch.inference_mode(), autocast(self._device, self._precision):
            found = self.detector.model(images)
        for one in found:
            for tensor in one.values():
                tensor.cpu()

    def close(self) -> None:
        """Nothing is held elsewhere."""


def pictures_of(batch: Batch) -> list[Tensor]:
    """The images without padding, in 0..1."""
    sizes = batch.image_sizes.tolist()
    return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, sizes, strict=True)]


def object_bitmaps(batch: Batch, wanted: Tensor) -> list[Tensor]:
    """Of each image the masks of the wanted objects as pixels, [n, height, width] uint8."""
    assert batch.targets is not None, "losses need targets"
    assert batch.targets.masks is not None, "a mask head needs masks in its targets"
    grids, frames = batch.targets.masks.bitmaps.cpu(), batch.targets.masks.frames.cpu()
    images = []
    for image, (height, width) in enumerate(batch.image_sizes.tolist()):
        slots = wanted[image].cpu().nonzero()[:, 0].tolist()
        pixels = np.zeros((len(slots), height, width), np.uint8)
        for row, slot in enumerate(slots):
            x1, y1, x2, y2 = frames[image, slot].tolist()
            cell_x, cell_y = ((end - start) / grids.shape[-1] for start, end in ((x1, x2), (y1, y2)))
            # From the centres of cells to those of pixels.
            matrix = np.array([[cell_x, 0, x1 + cell_x / 2 - 0.5], [0, cell_y, y1 + cell_y / 2 - 0.5]])
            shares = cv2.warpAffine(grids[image, slot].numpy(), matrix, (width, height), flags=cv2.INTER_LINEAR)
            pixels[row] = shares >= 128
        images.append(torch.from_numpy(pixels))
    return images
