"""Inference with a trained model: `boxwright.load("runs/mine").predict("street.jpg")`."""

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
from boxwright.data.proposals import ImageProposals
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
"""Image file, or uint8 [H, W, 3] RGB pixels."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The n detections in one image, best first."""

    boxes: np.ndarray
    """[n, 4] float32, xyxy in pixels of the image (for a file: after EXIF orientation)."""
    scores: np.ndarray
    """[n] float32 in 0..1, descending."""
    labels: np.ndarray
    """[n] int64, indices into the predictor's categories."""
    names: list[str]
    """n class names."""
    image_size: tuple[int, int]
    """(height, width) of the image."""
    masks: Masks | None = None
    """n masks, or None for a detector without masks. `masks[i]` is bool [height, width] and is computed on access,
    because a hundred masks of a large image would take a gigabyte."""

    def __len__(self) -> int:
        """The number of detections."""
        return len(self.scores)


class Predictor:
    """A trained detector with its categories and image size settings, for inference on images."""

    def __init__(
        self,
        detector: nn.Module,
        *,
        experiment: Experiment,
        categories: Sequence[Category],
        device: torch.device | str = "cpu",
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Prepare a detector for inference.

        Args:
            detector: Detector with trained weights; see `as_detector`.
            experiment: Provides the image size and the precision.
            categories: Categories, in the order of the labels.
            device: Device to run on.
            metadata: Other metadata of the weights file (versions, step).

        Raises:
            ValueError: `detector` is not a detector, the device is not available, or the number of categories differs
                from the detector's number of classes.
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
    def predict(  # type: ignore[overload-overlap]  # a str is also a sequence of str
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
            image: One image, or a sequence of images. For a sequence the result is a list.
            score: Score threshold: detections with a lower score are omitted.
            native: Keep the size of the images and pad them to a multiple of 32, instead of resizing them as in
                training.
            proposals: [n, 4] xyxy in pixels of the image, for a model without an RPN. For a sequence of images, one
                such array per image.

        Raises:
            ValueError: `score` is not in 0..1, a file cannot be read or decoded, an array is not an RGB image, or
                `proposals` are missing, not used by the model, or not boxes.
        """
        check_number("score", score, 0, 1)
        require_proposals(self.detector, proposals is not None)
        if isinstance(image, Sequence) and not isinstance(image, str | bytes):
            per_image = [None] * len(image) if proposals is None else proposals
            if len(per_image) != len(image):
                raise ValueError(
                    f"proposals: expected one array per image, got {len(per_image)} arrays for {len(image)} images"
                )
            return [self._predict_one(item, score, native, boxes) for item, boxes in zip(image, per_image, strict=True)]
        return self._predict_one(image, score, native, proposals)

    def _predict_one(self, image: Image, score: float, native: bool, proposals: Any) -> Prediction:
        pixels = decode_image(image) if isinstance(image, str | Path) else _check_image(image)
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
        given_proposals = None if proposals is None else _to_proposals(proposals)
        slots = None if given_proposals is None else max(len(given_proposals.boxes), 1)
        batch = collate([PlacedSample(sample, place(original, size), 0, given_proposals)], 1, canvas, None, slots)
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


def _check_image(image: np.ndarray) -> np.ndarray:
    """Return the array if it is an RGB image, else raise."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image: expected a path or an array of pixels, got an object of type {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image: expected uint8 [height, width, 3] in RGB order, got {image.dtype} {list(image.shape)}"
        )
    return image


def _to_proposals(boxes: Any) -> ImageProposals:
    """Convert an array of boxes to proposals. Their order does not matter, so all scores are 0."""
    array = np.asarray(boxes)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
        raise ValueError(
            "proposals: expected finite numbers [n, 4], x1, y1, x2, y2 in pixels of the image, got "
            f"{array.dtype} {list(array.shape)}"
        )
    return ImageProposals(array.astype(np.float32), np.zeros(len(array), np.float32))


def load(
    place: str | Path,
    *,
    device: torch.device | str = "cpu",
    precision: Precision | None = None,
    trusted_modules: Collection[str] = (),
) -> Predictor:
    """Load a trained model. The only category of an RPN is "object".

    Args:
        place: A run folder, a folder with one weights file, a weights file, its URL, its repository on the Hugging Face
            hub (`hf:owner/name`), or the name of a model of the zoo, which is downloaded and, if necessary, converted.
        device: Device to run on, such as "cuda".
        precision: Precision of the computation; None for the precision of the training.
        trusted_modules: Your own modules that define parts of the model. Nothing else outside Boxwright is imported or
            called, because a weights file may come from anyone.

    Raises:
        ValueError: The file is not a weights file of Boxwright, is damaged, or names a module that is not trusted.
        OSError: The file cannot be read or downloaded.
    """
    device = check_device(device)
    if precision is not None:
        check_precision(precision)
    file = weights_file(place)
    tensors, metadata = load_weights(file)
    missing = [name for name in ("experiment", "categories") if name not in metadata]
    if missing:
        raise ValueError(
            f"{file}: metadata has no {' and '.join(missing)}, so the model cannot be rebuilt. Use a weights file "
            "that Boxwright wrote."
        )
    try:
        categories = msgspec.convert(metadata["categories"], list[Category])
        experiment = from_json(metadata["experiment"], trusted_modules=trusted_modules)
        if not isinstance(experiment, Experiment) or not isinstance(experiment.resize, Resize):
            raise TypeError("its settings are not an experiment")
        experiment = replace(experiment, model=not_pretrained(experiment.model))
        detector = _build_without_memory(experiment, len(categories), tensors)
        _require_shapes(detector, tensors)
    # Parts that do not fit together, or hyperparameters out of range, can raise any of these.
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, IndexError) as error:
        raise ValueError(f"{file}: the model cannot be rebuilt from the metadata of the file: {error}") from error
    model_state = detector.state_dict()
    tensors = {
        name: tensor.to(model_state[name].dtype) if name in model_state else tensor for name, tensor in tensors.items()
    }
    try:
        # assign=True uses the memory-mapped tensors without a copy. The mapping is private: writes do not reach the
        # file.
        detector.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file}: the weights do not fit the model in its metadata: {error}") from error
    if any(tensor.is_meta for tensor in (*detector.parameters(), *detector.buffers())):  # created by a user's own part
        detector = as_detector(build(experiment.model, num_classes=len(categories)))
        detector.load_state_dict(tensors)
    if detector.class_agnostic:
        categories = [Category(id=1, name="object")]
    if precision is not None:
        experiment = replace(experiment, precision=precision)
    return Predictor(detector, experiment=experiment, categories=categories, device=device, metadata=metadata)


_TENSOR_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full)
"""Functions with which layers create parameters and running statistics."""


class _ModelSizeLimit(TorchFunctionMode):
    """Torch function mode that raises if a model is much larger than the weights, and allocates no parameters.

    `torch.empty` returns tensors on the meta device, as in `torch.device("meta")`: layers create their parameters with
    it, and initialising a meta tensor does nothing. Unlike `torch.device("meta")`, tensors that are computed from
    values stay real, such as anchors and pixel statistics, which weights files do not contain. Layers are created one
    by one, so counting the tensors stops a loop over a billion layers early. A model may create somewhat more than it
    keeps, as timm models do with their classifier.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._tensors_left = 2 * len(tensors) + 100
        self._elements_left = 2 * sum(tensor.numel() for tensor in tensors.values()) + 10**6

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in _TENSOR_FACTORIES and kwargs.get("device") is None and kwargs.get("out") is None:
            meta: torch.Tensor = function(*args, **{**kwargs, "device": "meta"})
            self._tensors_left -= 1
            if function is not torch.empty:
                self._elements_left -= meta.numel()
            if min(self._tensors_left, self._elements_left) < 0:
                raise ValueError("the model in the metadata is larger than the weights in the file")
            if function is torch.empty:
                return meta
        return function(*args, **kwargs)


def _build_without_memory(experiment: Experiment, num_classes: int, tensors: Mapping[str, torch.Tensor]) -> Detector:
    """Build the detector without memory for its parameters, also if a file specifies a huge model."""
    with _ModelSizeLimit(tensors):
        return as_detector(build(experiment.model, num_classes=num_classes))


def _require_shapes(detector: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the shapes of a file's tensors. `load_state_dict` reports missing and unexpected tensors later.

    Raises:
        ValueError: a shape differs from the shape in the model.
    """
    for name, tensor in detector.state_dict().items():
        if name in tensors and tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)} in the model, {list(tensors[name].shape)} in the file"
            )


def weights_file(place: str | Path) -> Path:
    """Path of the weights file of a run, a folder, a URL, a hub repository or a zoo model; downloads it if necessary.

    Raises:
        ValueError: The folder contains no weights file, or several.
        OSError: The path does not exist, or the file cannot be downloaded.
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
            f"{path} does not exist. Use a run folder, a weights file, or a name that boxwright zoo list prints."
        )
    if not path.is_dir():
        return path
    file = path / "weights.safetensors"
    if file.is_file():
        return file
    others = sorted(path.glob("*.safetensors"))
    if not others:
        raise ValueError(f"{path} contains no weights.safetensors. Use a run folder or a weights file.")
    if len(others) > 1:
        names = ", ".join(other.name for other in others)
        raise ValueError(f"{path} contains several weights files: {names}. Use the path of one.")
    return others[0]
