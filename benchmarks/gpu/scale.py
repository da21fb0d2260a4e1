"""How large a run is: whole detectors on a GPU, or small ones on a CPU to test the benchmark itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from boxwright.benchmark.plan import Plan

FAMILIES = ("mask_rcnn", "faster_rcnn", "retinanet", "cascade_rcnn", "rpn", "fast_rcnn")
"""All detectors, the most wanted first."""
WITH_PEER = ("mask_rcnn", "faster_rcnn", "retinanet", "rpn")
"""Those that torchvision has."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What detectors are run on, and how often."""

    device: str
    """cuda or cpu."""
    recipe: str
    """Of a family, which stands for `{}`."""
    size: tuple[int, int]
    """(height, width) that pictures are brought to where time is measured."""
    checked_size: tuple[int, int]
    """The same where the CPU computes everything too."""
    batches: tuple[int, ...]
    """Images at a time of inference."""
    iterations: int
    """Times that count."""
    warmup: int
    """Times before them."""
    backend: str
    """Of torch.compile in checks."""
    matrix: int
    """Rows and columns of the matrices whose product tells the device's rate."""

    def plan(self, family: str, *, settings: tuple[str, ...] = (), peer: bool = False, **changes: Any) -> Plan:
        """What `boxwright benchmark` is to measure of a family."""
        given: dict[str, Any] = {
            "recipe": self.recipe.format(family),
            "settings": list(settings),
            "size": self.size,
            "iterations": self.iterations,
            "warmup": self.warmup,
            "precision": "bfloat16" if self.device == "cuda" else "float32",
            "device": self.device,
            "workers": 0,
            "peer": "torchvision" if peer and family in WITH_PEER else "",
        }
        return Plan(**given | changes)


FULL = Scale(
    device="cuda",
    recipe="{}_r50_fpn_1x",
    size=(800, 1333),
    checked_size=(320, 480),
    batches=(2, 8, 16),
    iterations=8,
    warmup=2,
    backend="inductor",
    matrix=8192,
)
SMALL = Scale(
    device="cpu",
    recipe="{}_r18_fpn_small",
    size=(64, 64),
    checked_size=(64, 64),
    batches=(2,),
    iterations=1,
    warmup=0,
    backend="eager",
    matrix=64,
)
