"""A trained model, ready for pictures: `boxwright.load("runs/mine").predict("street.jpg")`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import msgspec
import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from boxwright.checks import check_device, check_number
from boxwright.data.buckets import Resize, round_up
from boxwright.data.collate import PlacedSample, collate
from boxwright.data.dataset import Category, Sample
from boxwright.data.decode import decode_image
from boxwright.data.masks import Masks
from boxwright.data.placement import place
from boxwright.data.proposals import GivenProposals
from boxwright.detectors.detector import Detector, as_detector, require_proposals
from boxwright.evaluation.evaluate import file_boxes, file_masks, require_labels, without_non_finite
from boxwright.layers.optimize import optimize_for_cpu, optimize_for_cuda
from boxwright.precision import Precision, autocast, check_precision
from boxwright.structures import to_device
from boxwright.training.experiment import Experiment, build, from_json, not_pretrained
from boxwright.weights.fetch import fetch, is_url, remote_file
from boxwright.weights.hub import hub_file, is_hub_uri
from boxwright.weights.ours import load_weights
from boxwright.zoo import fetch_weights, load_zoo

Image = str | Path | np.ndarray
"""A file, or uint8 [H, W, 3] RGB pixels."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was found in one picture, best first; n detections."""

    boxes: np.ndarray
    """[n, 4] float32, xyxy in pixels of the picture (for a file: of what it shows, EXIF orientation applied)."""
    scores: np.ndarray
    """[n] float32 in 0..1, falling."""
    labels: np.ndarray
    """[n] int64, rows of the predictor's categories."""
    names: list[str]
    """n class names."""
    image_size: tuple[int, int]
    """(height, width) of the picture."""
    masks: Masks | None = None
    """n masks, None of a detector of boxes alone. `masks[i]` is bool [height, width], made when asked for: a hundred
    masks of a large picture would fill a gigabyte."""

    def __len__(self) -> int:
        """The number of detections."""
        return len(self.scores)


class Predictor:
    """A detector with what is needed to feed it pictures and to read what it says."""

    def __init__(
        self,
        detector: nn.Module,
        *,
        experiment: Experiment,
        categories: Sequence[Category],
        device: torch.device | str = "cpu",
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Put a detector to work.

        Args:
            detector: With its weights; see `as_detector`.
            experiment: Gives the size that pictures are brought to, and the precision.
            categories: The classes by label.
            device: Where to run.
            metadata: What else the weights file says (versions, step).

        Raises:
            ValueError: `detector` is no detector, the device is not there, or there is no category for each class.
        """
        self.device = check_device(device)
        self.detector = as_detector(detector).to(self.device).eval()
        if len(categories) != self.detector.num_classes:
            raise ValueError(
                f"{len(categories)} categories for a {type(detector).__name__} whose num_classes is "
                f"{self.detector.num_classes}: give one category for each class"
            )
        if self.device.type == "cpu":
            optimize_for_cpu(self.detector)
        elif self.device.type == "cuda":
            optimize_for_cuda(self.detector)
        self.experiment = experiment
        self.categories = list(categories)
        self.metadata = metadata or {}

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, image: Image, *, score: float = 0.0, native: bool = False, proposals: np.ndarray | None = None
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        image: Sequence[Image],
        *,
        score: float = 0.0,
        native: bool = False,
        proposals: Sequence[np.ndarray] | None = None,
    ) -> list[Prediction]: ...

    def predict(
        self,
        image: Image | Sequence[Image],
        *,
        score: float = 0.0,
        native: bool = False,
        proposals: np.ndarray | Sequence[np.ndarray] | None = None,
    ) -> Prediction | list[Prediction]:
        """Detect objects.

        Args:
            image: One picture, or a sequence of them, which gives a list.
            score: Detections below it are left out.
            native: Take pictures at their own size, padded to a multiple of 32, instead of resizing them as in
                training.
            proposals: [n, 4] xyxy in pixels of the picture, for a model without a network of its own for them; one
                such array a picture where there is a sequence.

        Raises:
            ValueError: `score` is not in 0..1, a file cannot be read or decoded, an array is no RGB image, or proposals
                are missing, have no use or are no boxes.
        """
        check_number("score", score, 0, 1)
        require_proposals(self.detector, proposals is not None)
        if isinstance(image, Sequence) and not isinstance(image, str | bytes):
            given = [None] * len(image) if proposals is None else proposals
            if len(given) != len(image):
                raise ValueError(f"{len(given)} arrays of proposals for {len(image)} pictures: give one for each")
            return [self._predict_one(item, score, native, own) for item, own in zip(image, given, strict=True)]
        return self._predict_one(image, score, native, proposals)

    def _predict_one(self, image: Image, score: float, native: bool, proposals: Any) -> Prediction:
        pixels = decode_image(image) if isinstance(image, str | Path) else _checked(image)
        original = (pixels.shape[0], pixels.shape[1])
        size = original if native else self.experiment.resize.size(*original)
        sample = Sample(
            image=pixels,
            image_id=0,
            file_name="",
            boxes=np.zeros((0, 4), np.float32),
            labels=np.zeros(0, np.int64),
            crowd=np.zeros(0, bool),
            object_ids=np.zeros(0, np.int64),
        )
        canvas = (round_up(size[0]), round_up(size[1]))
        given = None if proposals is None else _checked_proposals(proposals)
        slots = None if given is None else max(len(given.boxes), 1)
        batch = collate([PlacedSample(sample, place(original, size), 0, given)], 1, canvas, None, slots)
        with torch.inference_mode(), autocast(self.device, self.experiment.precision):
            detections = without_non_finite(self.detector.detect(to_device(batch, self.device)))
        require_labels(detections, self.detector)
        scores = detections.scores[0].float().cpu()
        valid = detections.valid[0].cpu()
        kept = valid & (scores >= score)
        labels = detections.labels[0].cpu()[kept].numpy()
        return Prediction(
            boxes=file_boxes(batch, detections)[0][kept].float().numpy(),
            scores=scores[kept].numpy(),
            labels=labels,
            names=[self.categories[label].name for label in labels],
            image_size=original,
            masks=None if detections.masks is None else file_masks(batch, detections).select(kept[valid].numpy()),
        )


def _checked(image: np.ndarray) -> np.ndarray:
    """The array, if it is an RGB picture."""
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"an object of type {type(image).__name__} is no picture: give a file's path, or its pixels as an array"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"an array of {image.dtype} {list(image.shape)} is no picture: give uint8 [height, width, 3] in RGB order"
        )
    return image


def _checked_proposals(boxes: Any) -> GivenProposals:
    """The array as proposals, if it is one of boxes. They stand in the order given, which plays no part."""
    array = np.asarray(boxes)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
        raise ValueError(
            f"an array of {array.dtype} {list(array.shape)} is no set of proposals: give finite numbers [n, 4], "
            "x1, y1, x2, y2 in pixels of the picture"
        )
    return GivenProposals(array.astype(np.float32), np.zeros(len(array), np.float32))


def load(
    place: str | Path,
    *,
    device: torch.device | str = "cpu",
    precision: Precision | None = None,
    trusted_modules: Collection[str] = (),
) -> Predictor:
    """Load a trained model; one that only proposes boxes calls all of them "object".

    Args:
        place: A run's folder, a folder that holds one weights file, such a file, its URL, its repository on the
            Hugging Face hub (`hf:owner/name`), or the name of a model of the zoo, which is fetched and converted where
            need be.
        device: Where to run it, such as "cuda".
        precision: What the detector computes in; None for what it was trained in.
        trusted_modules: Modules of your own that the model's parts come from; nothing else outside Boxwright is
            imported or called, since a weights file may come from anyone.

    Raises:
        ValueError: It is no weights file of Boxwright's, it is damaged, or it names a module that is not trusted.
        OSError: It cannot be read or fetched.
    """
    device = check_device(device)
    if precision is not None:
        check_precision(precision)
    file = weights_file(place)
    tensors, metadata = load_weights(file)
    missing = [name for name in ("experiment", "categories") if name not in metadata]
    if missing:
        raise ValueError(f"{file} does not say its {' and '.join(missing)}, so the model cannot be rebuilt from it")
    try:
        categories = msgspec.convert(metadata["categories"], list[Category])
        experiment = from_json(metadata["experiment"], trusted_modules=trusted_modules)
        if not isinstance(experiment, Experiment) or not isinstance(experiment.resize, Resize):
            raise TypeError("its settings are of other kinds than an experiment's")
        experiment = replace(experiment, model=not_pretrained(experiment.model))
        detector = _unfilled(experiment, len(categories), tensors)
        _require_shapes(detector, tensors)
    # Whatever parts raise that were not made for each other, or that are given numbers out of range.
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, IndexError) as error:
        raise ValueError(f"{file}: the model cannot be rebuilt from what the file says: {error}") from error
    own = detector.state_dict()
    tensors = {name: tensor.to(own[name].dtype) if name in own else tensor for name, tensor in tensors.items()}
    try:
        # The file's own memory, which is mapped: nothing is copied, and what is written later stays out of the file.
        detector.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file}: the weights do not fit the model that it names: {error}") from error
    if any(tensor.is_meta for tensor in (*detector.parameters(), *detector.buffers())):  # a part of the user's own
        detector = as_detector(build(experiment.model, num_classes=len(categories)))
        detector.load_state_dict(tensors)
    if detector.class_agnostic:
        categories = [Category(id=1, name="object")]
    if precision is not None:
        experiment = replace(experiment, precision=precision)
    return Predictor(detector, experiment=experiment, categories=categories, device=device, metadata=metadata)


_MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full)
"""What layers make their parameters and statistics with."""


class _NoLargerThan(TorchFunctionMode):
    """Within it no model is made that is far larger than what a file holds, and its parameters take no memory.

    `torch.empty` gives what `torch.device("meta")` gives for all tensors: parameters begin so, and what fills them is
    skipped. Tensors that are made of values stay real, such as anchors and pixel statistics, which no weights file
    holds. Layers are made one by one, so that counting them stops a loop of a billion at once. A model may make a bit
    more than it keeps, as timm's do with their classifiers.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._tensors_left = 2 * len(tensors) + 100
        self._numbers_left = 2 * sum(tensor.numel() for tensor in tensors.values()) + 10**6

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in _MAKERS and kwargs.get("device") is None and kwargs.get("out") is None:
            shape_alone: torch.Tensor = function(*args, **{**kwargs, "device": "meta"})
            self._tensors_left -= 1
            if function is not torch.empty:
                self._numbers_left -= shape_alone.numel()
            if min(self._tensors_left, self._numbers_left) < 0:
                raise ValueError("the model that it names is larger than all the weights in it")
            if function is torch.empty:
                return shape_alone
        return function(*args, **kwargs)


def _unfilled(experiment: Experiment, num_classes: int, tensors: Mapping[str, torch.Tensor]) -> Detector:
    """The detector, its parameters without memory, so that a file that names a huge model takes none either."""
    with _NoLargerThan(tensors):
        return as_detector(build(experiment.model, num_classes=num_classes))


def _require_shapes(detector: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that a file's tensors are of the model's shapes; what is missing or over is told when they are loaded.

    Raises:
        ValueError: some are of other shapes.
    """
    for name, tensor in detector.state_dict().items():
        if name in tensors and tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} is {list(tensors[name].shape)} in the file and {list(tensor.shape)} in the model")


def weights_file(place: str | Path) -> Path:
    """The weights file of a run, of a published model, at a URL or of the zoo, which are fetched; or the file itself.

    Raises:
        ValueError: The folder holds none, or several.
        OSError: There is nothing at the path, or it cannot be fetched.
    """
    if isinstance(place, str) and is_url(place):
        return fetch(remote_file(place))
    if isinstance(place, str) and is_hub_uri(place):
        return fetch(hub_file(place))
    path = Path(place)
    if not path.exists():
        zoo = load_zoo()
        if str(place) in zoo:
            return fetch_weights(zoo[str(place)])
        raise FileNotFoundError(
            f"{path}: there is no such run: give the folder of one, a weights file, or a name that boxwright zoo list "
            "prints"
        )
    if not path.is_dir():
        return path
    file = path / "weights.safetensors"
    if file.is_file():
        return file
    others = sorted(path.glob("*.safetensors"))
    if not others:
        raise ValueError(f"{path} holds no weights.safetensors: give a run's folder or a weights file")
    if len(others) > 1:
        raise ValueError(f"{path} holds {', '.join(other.name for other in others)}: name one of them")
    return others[0]
