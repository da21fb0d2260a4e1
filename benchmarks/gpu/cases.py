"""Detectors and batches to measure. Everything is generated here, so that no data set and no reader of one is needed.

B images, G object slots, P proposals.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.gpu.scale import Scale
from boxwright.benchmark.random_weights import SEED, settle
from boxwright.data.masks.mask_grid import GRID_SIZE
from boxwright.precision import Precision, autocast
from boxwright.recipes import find_recipe
from boxwright.structures import Batch, MaskGrids, Proposals, Targets, to_device
from boxwright.training.experiment import Experiment, build
from boxwright.training.optimizer import build_optimizer
from boxwright.training.step import TrainStep

NUM_CLASSES = 80
_NUM_PROPOSALS = 1000


def precision_of(scale: Scale) -> Precision:
    """Precision of timed items."""
    return "bfloat16" if scale.device == "cuda" else "float32"


def make_batch(scale: Scale, family: str, batch_size: int, *, canvas: tuple[int, int] | None = None) -> Batch:
    """A batch on the CPU: smooth random images, objects of any size, masks for Mask R-CNN, proposals for Fast R-CNN."""
    generator = torch.Generator().manual_seed(SEED)
    height, width = canvas or scale.canvas
    coarse = torch.rand(batch_size, 3, height // 16, width // 16, generator=generator)
    images = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    sizes = torch.tensor([[height, width]]).repeat(batch_size, 1)
    valid = (torch.arange(scale.slots) < scale.objects).repeat(batch_size, 1)
    boxes = random_boxes(batch_size, scale.slots, (height, width), generator)
    labels = torch.randint(NUM_CLASSES, (batch_size, scale.slots), generator=generator)
    masks = None
    if family == "mask_rcnn":
        disc = (torch.linspace(-1, 1, GRID_SIZE).square()[:, None] + torch.linspace(-1, 1, GRID_SIZE).square()) < 1
        bitmaps = (255 * disc.to(torch.uint8)).expand(batch_size, scale.slots, -1, -1).contiguous()
        masks = MaskGrids(bitmaps=bitmaps, frames=boxes.clone(), valid=valid.clone())
    proposals = None
    if family == "fast_rcnn":
        shape = batch_size, _NUM_PROPOSALS
        proposals = Proposals(
            boxes=random_boxes(*shape, (height, width), generator),
            scores=torch.linspace(1, 0, _NUM_PROPOSALS).repeat(batch_size, 1),
            valid=torch.ones(shape, dtype=torch.bool),
            sources=torch.arange(_NUM_PROPOSALS).repeat(batch_size, 1),
        )
    return Batch(
        images=(255 * images).to(torch.uint8).contiguous(memory_format=torch.channels_last),
        image_sizes=sizes,
        original_sizes=sizes.clone(),
        transforms=torch.eye(3)[:2].repeat(batch_size, 1, 1),
        image_ids=torch.arange(batch_size),
        seeds=torch.arange(batch_size) + 1,
        targets=Targets(boxes=boxes, labels=labels, valid=valid, crowd=torch.zeros_like(valid), masks=masks),
        proposals=proposals,
    )


def random_boxes(batch_size: int, count: int, canvas: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[batch_size, count, 4] boxes with sides from 16 pixels to the whole canvas."""
    limits = torch.tensor([float(canvas[1]), float(canvas[0])])
    sides = 16 * (limits / 16) ** torch.rand(batch_size, count, 2, generator=generator)
    corners = torch.rand(batch_size, count, 2, generator=generator) * (limits - sides)
    return torch.cat([corners, corners + sides], -1)


def make_detector(scale: Scale, family: str) -> nn.Module:
    """A detector on the CPU in training mode, with random weights under which it does as much work as a trained one."""
    torch.manual_seed(SEED)
    detector = build(experiment_of(scale, family).model, num_classes=NUM_CLASSES)
    settle(detector, make_batch(scale, family, 1, canvas=scale.checked_canvas))
    return cast(nn.Module, detector.train())


def experiment_of(scale: Scale, family: str) -> Experiment:
    """The recipe's experiment."""
    return cast(Experiment, find_recipe(scale.recipe.format(family))())


class Training:
    """A detector, its training step and a batch on the device."""

    def __init__(self, scale: Scale, family: str, batch_size: int, *, compile: bool = False, graphs: bool = False):
        """Build all, and do nothing yet."""
        device = torch.device(scale.device)
        self.detector = make_detector(scale, family).to(device).to(memory_format=torch.channels_last)
        experiment = experiment_of(scale, family)
        self.optimizer = build_optimizer(experiment.optimizer, self.detector)
        self.batch = to_device(make_batch(scale, family, batch_size), device)
        self._step = TrainStep(
            self.detector,
            self.optimizer,
            device=device,
            precision=precision_of(scale),
            clip_norm=experiment.clip_norm,
            compile=compile,
            cuda_graphs=graphs,
            allowed_non_finite=10**9,
        )

    def step(self) -> dict[str, Tensor]:
        """One step with learning rate 0, so that every step does the same work."""
        return self._step([self.batch], 0.0)


class Detecting:
    """A detector in evaluation mode and a batch on the device."""

    def __init__(self, scale: Scale, family: str, batch_size: int) -> None:
        """Build all, and detect nothing yet."""
        self._device, self._precision = torch.device(scale.device), precision_of(scale)
        self.detector = make_detector(scale, family).eval().to(self._device).to(memory_format=torch.channels_last)
        self.batch = to_device(make_batch(scale, family, batch_size), self._device)
        self._detect: Any = cast(Any, self.detector).detect

    def step(self) -> Any:
        """Detections of the batch; they stay on the device."""
        with torch.inference_mode(), autocast(self._device, self._precision):
            return self._detect(self.batch)
