"""What an importer says of a code base: how to know its files, its names, and the numbers that its files leave out."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from boxwright.backbones.backbone import PYTORCH, PixelStats
from boxwright.backbones.resnet import Style
from boxwright.data.dataset import Category
from boxwright.detectors.cascade_rcnn import CascadeConfig
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.importers.rules import Rule, Unsupported
from boxwright.weights.foreign import ForeignFile


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the tensors of a model do not say, as the source's own published models have it."""

    conventions: Conventions = MODERN
    """Of boxes, anchors and RoIAlign."""
    pixel_stats: PixelStats = PYTORCH
    """What the backbone expects of pixels."""
    style: Style = "pytorch"
    """Where a bottleneck has its stride."""
    extra_relu: bool = False
    """Whether a ReLU stands between P6 and P7 of a RetinaNet."""
    train_norm_affine: bool = True
    """Whether the scales and biases of the backbone's norms learn, should the model be trained on."""
    rpn: RPNConfig = RPNConfig()
    """The numbers of proposals; depth is the tensors' to say."""
    box: BoxConfig = BoxConfig()
    """The numbers of box heads; depth, width, norm and boxes a class are the tensors' to say."""
    cascade: CascadeConfig = CascadeConfig()
    """What differs from stage to stage of a cascade, and how they are joined."""
    mask: MaskConfig = MaskConfig()
    """The numbers of mask heads; width, depth and norm are the tensors' to say."""
    retina: RetinaConfig = RetinaConfig()
    """The numbers of a RetinaNet; depth and norm are the tensors' to say."""
    norm_eps: float = 1e-5
    """What the backbone's norms add to the variance."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A code base whose files are read."""

    name: str
    """As users name it."""
    title: str
    """What it is, for people."""
    recognises: Callable[[Set[str], ForeignFile], bool]
    """Whether a file is one of its, by the names of its tensors and by what stands beside them."""
    rules: Callable[[Set[str]], Sequence[Rule | Unsupported]]
    """The table of names; it may depend on which names there are."""
    settings: Callable[[ForeignFile], Settings]
    """What a file's tensors do not say."""
    categories: Callable[[ForeignFile, int], Sequence[Category] | None] = lambda file, count: None
    """A number of classes as the file or the source names them; None where neither does."""
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    """What is left to do to the tensors under our names."""


def any_starts(names: Set[str], *prefixes: str) -> bool:
    """Whether some name starts with one of these."""
    return any(name.startswith(prefixes) for name in names)
