"""What a run does, in order: correctness, training, compilation, latency, then all other items."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu import checks, kernels, speed, transfer
from benchmarks.gpu.convolutions import convolution_rates
from benchmarks.gpu.scale import FAMILIES, Scale
from benchmarks.gpu.worker import Item

GROUPS = ("checks", "training", "compile", "latency", "rest")
"""Groups of items in the order in which they run."""


def items(scale: Scale) -> list[Item]:
    """All items, the most important first."""
    return list(_items(scale))


def _items(scale: Scale) -> Iterator[Item]:
    first, others = FAMILIES[:3], FAMILIES[3:]
    small, large = scale.train_batches

    def item(group: str, name: str, limit: float, work: Any, *arguments: Any, **settings: Any) -> Item:
        return Item(group, name, limit, partial(work, scale, *arguments, **settings))

    for family in first:
        yield item("checks", f"{family}: no host sync", 40, checks.no_host_sync, family)
        yield item("checks", f"{family}: equals CPU", 40, checks.equals_cpu, family)
    yield item("checks", "RoIAlign", 30, kernels.roi_align)
    yield item("checks", "NMS", 30, kernels.suppression)

    for batch in scale.train_batches:
        yield item("training", f"mask_rcnn: train {batch}", 40, speed.train, "mask_rcnn", batch)
        name = f"mask_rcnn: train {batch}, Triton RoIAlign"
        yield item("training", name, 40, speed.train, "mask_rcnn", batch, triton=True)

    yield item("compile", f"mask_rcnn: compile {small}", 250, speed.compile_training, "mask_rcnn", small)

    yield item("latency", "faster_rcnn: detect 1", 30, speed.detect, "faster_rcnn", 1)

    yield item("rest", "copies", 15, transfer.copies)
    yield item("rest", "matrix product", 15, kernels.matrix_rate)
    yield item("rest", "mask_rcnn: convolutions", 45, convolution_rates, "mask_rcnn", small)
    yield item("rest", "loader", 30, transfer.loader)
    yield item("rest", "matcher", 40, kernels.matcher)
    for family in first:
        yield item("rest", f"{family}: train {small}, torchvision", 30, speed.torchvision_train, family, small)
    for family in first[1:]:
        yield item("rest", f"{family}: train {small}", 30, speed.train, family, small)
    for family in (first[0], first[2]):
        yield item("rest", f"{family}: detect 1", 30, speed.detect, family, 1)
    for family in others:
        yield item("rest", f"{family}: no host sync", 40, checks.no_host_sync, family)
        yield item("rest", f"{family}: equals CPU", 40, checks.equals_cpu, family)
    for family in first:
        yield item("rest", f"{family}: detect {scale.detect_batch}", 30, speed.detect, family, scale.detect_batch)
    for family in first[1:]:
        yield item("rest", f"{family}: train {large}", 40, speed.train, family, large)
    yield item("rest", f"mask_rcnn: train {small}, CUDA graphs", 150, speed.train_with_graphs, "mask_rcnn", small)
    for family in FAMILIES:
        yield item("rest", f"{family}: compiled equals eager", 120, checks.compiled_equals_eager, family)
    for family in others:
        yield item("rest", f"{family}: train {small}", 30, speed.train, family, small)
        yield item("rest", f"{family}: detect 1", 30, speed.detect, family, 1)
