"""`Source`: how the files of a library are recognised, its tensor names, and settings that its files do not contain."""

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
    """Settings that the tensors do not determine. Each source takes them from its published models."""

    conventions: Conventions = MODERN
    """Conventions of boxes, anchors and RoIAlign."""
    pixel_stats: PixelStats = PYTORCH
    """Pixel statistics that the backbone expects."""
    style: Style = "pytorch"
    """Position of the stride in a bottleneck: "caffe" for the first 1x1 convolution, "pytorch" for the 3x3 one."""
    extra_relu: bool = False
    """Whether there is a ReLU between P6 and P7 of a RetinaNet."""
    train_norm_affine: bool = True
    """Whether scales and biases of the backbone's norm layers are trainable in further training."""
    rpn: RPNConfig = RPNConfig()
    """Hyperparameters of the RPN. Its depth is read from the tensors."""
    box: BoxConfig = BoxConfig()
    """Hyperparameters of the box head. Depth, width, norm and number of boxes per class are read from the tensors."""
    cascade: CascadeConfig = CascadeConfig()
    """Hyperparameters of the stages of a cascade."""
    mask: MaskConfig = MaskConfig()
    """Hyperparameters of the mask head. Width, depth and norm are read from the tensors."""
    retina: RetinaConfig = RetinaConfig()
    """Hyperparameters of the RetinaNet head. Depth and norm are read from the tensors."""
    norm_eps: float = 1e-5
    """Epsilon of the backbone's norm layers."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A library whose weights files can be imported."""

    name: str
    """Name for the option --source."""
    title: str
    """Description for messages."""
    recognises: Callable[[Set[str], ForeignFile], bool]
    """Called with the tensor names and the file. Returns whether the library wrote the file."""
    rules: Callable[[Set[str]], Sequence[Rule | Unsupported]]
    """Called with the tensor names. Returns the rules that rename the tensors."""
    settings: Callable[[ForeignFile], Settings]
    """Returns the settings that the tensors of a file do not determine."""
    categories: Callable[[ForeignFile, int], Sequence[Category] | None] = lambda file, count: None
    """Called with the file and the number of classes. Returns the classes, or None if their names are unknown."""
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    """Called with the renamed tensors. Returns them after changes such as adding missing statistics of norm layers."""


def any_starts(names: Set[str], *prefixes: str) -> bool:
    """Whether any name starts with one of the prefixes."""
    return any(name.startswith(prefixes) for name in names)
