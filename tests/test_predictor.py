"""`boxwright.load(...).predict(...)` accepts files and arrays, and returns boxes and masks in their pixels."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import boxwright
from boxwright.data.buckets import Resize
from boxwright.data.dataset import Category
from boxwright.data.decode import decode_image
from boxwright.detectors.rcnn import fast_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.layers.packed import PackedConv2d
from boxwright.predictor import Predictor
from boxwright.recipes.common import small
from boxwright.structures import Batch, Detections
from boxwright.training.experiment import build
from boxwright.weights.ours import load_weights, save_weights
from small_model import BACKBONE, small_run
from weights.hosts import serve, whole

CATEGORIES = [Category(id=4, name="cell"), Category(id=2, name="dust")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"), CATEGORIES)


@pytest.fixture(scope="module")
def image_file(data_dir: Path) -> Path:
    return min((data_dir / "bccd" / "JPEGImages").iterdir())


class WholeImage(nn.Module):
    """Predicts the whole image twice, with scores 0.9 and 0.2, and stores the canvas size."""

    num_classes = 2
    max_detections = 3

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def detect(self, batch: Batch) -> Detections:
        self.canvas = tuple(batch.images.shape[-2:])
        height, width = batch.image_sizes[0].tolist()
        box = torch.tensor([0.0, 0.0, width, height])
        return Detections(
            boxes=torch.stack([box, box + 3, torch.full((4,), torch.nan)])[None],
            scores=torch.tensor([[0.9, 0.2, 0.0]]),
            labels=torch.tensor([[1, 0, 0]]),
            valid=torch.tensor([[True, True, False]]),
        )


def test_boxes_are_in_pixels_of_the_image() -> None:
    detector = WholeImage()
    predictor = Predictor(detector, experiment=small(WholeImage), categories=CATEGORIES)
    image = np.zeros((90, 130, 3), dtype=np.uint8)
    prediction = predictor.predict(image)
    assert detector.canvas == (256, 352)
    np.testing.assert_allclose(prediction.boxes[0], [0, 0, 130, 90], atol=1e-3)
    assert prediction.boxes.max() <= 130
    assert prediction.scores.tolist() == pytest.approx([0.9, 0.2])
    assert prediction.names == ["dust", "cell"]
    assert prediction.image_size == (90, 130)

    (prediction,) = predictor.predict([image], score=0.5, native=True)
    assert detector.canvas == (96, 160)
    np.testing.assert_allclose(prediction.boxes, [[0, 0, 130, 90]])


class InvalidLabel(WholeImage):
    """Predicts the label -1, which would be the last class as an index."""

    def detect(self, batch: Batch) -> Detections:
        detections = super().detect(batch)
        return replace(detections, labels=detections.labels - 1)


def test_labels_out_of_range_are_an_error() -> None:
    predictor = Predictor(InvalidLabel(), experiment=small(InvalidLabel), categories=CATEGORIES)
    with pytest.raises(ValueError, match=r"InvalidLabel\.detect: label of a detection: expected 0 to 1 .*, got -1"):
        predictor.predict(np.zeros((90, 130, 3), dtype=np.uint8))


def test_the_number_of_categories_must_match_the_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"1 categories.*num_classes is 2"):
        Predictor(WholeImage(), experiment=small(WholeImage), categories=CATEGORIES[:1])


class WithMasks(WholeImage):
    """Predicts masks that fill the upper half of each box."""

    def detect(self, batch: Batch) -> Detections:
        half = (torch.arange(28) < 14).float()[:, None].expand(1, 3, 28, 28)
        return replace(super().detect(batch), masks=half)


def test_masks_are_in_pixels_of_the_image() -> None:
    predictor = Predictor(WithMasks(), experiment=small(WithMasks), categories=CATEGORIES)
    image = np.zeros((90, 130, 3), dtype=np.uint8)
    assert Predictor(WholeImage(), experiment=small(WholeImage), categories=CATEGORIES).predict(image).masks is None
    prediction = predictor.predict(image)
    assert prediction.masks is not None
    assert len(prediction.masks) == len(prediction) == 2
    expected = np.zeros((90, 130), bool)
    expected[:45] = True
    expected[[0, 0, 44, 44], [0, 129, 0, 129]] = False  # bilinear interpolation cuts the corners
    np.testing.assert_array_equal(prediction.masks[0], expected)
    prediction = predictor.predict(image, score=0.5)
    assert prediction.masks is not None
    assert [mask.shape for mask in prediction.masks] == [(90, 130)]


def test_load_and_predict(run: Path, image_file: Path) -> None:
    predictor = boxwright.load(run)
    assert predictor.categories == CATEGORIES
    assert predictor.metadata["step"] == 12
    prediction = predictor.predict(image_file)
    assert len(prediction)
    assert (np.diff(prediction.scores) <= 0).all()
    assert prediction.boxes.min() >= 0
    assert (prediction.boxes.max(axis=0) <= [640, 480, 640, 480]).all()
    from_file, from_pixels = boxwright.load(run / "weights.safetensors").predict([image_file, decode_image(image_file)])
    for other in (from_file, from_pixels):
        np.testing.assert_array_equal(other.boxes, prediction.boxes)
        np.testing.assert_array_equal(other.scores, prediction.scores)


def test_load_from_a_url_and_from_a_folder_with_one_weights_file(
    run: Path, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    for name in ("BOXWRIGHT_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "published"
    folder.mkdir()
    content = (run / "weights.safetensors").read_bytes()
    (folder / "mine.safetensors").write_bytes(content)
    with serve() as host:
        url = host.answer("mine.safetensors", whole(content))
        predictions = [boxwright.load(source).predict(image_file) for source in (run, folder, url, url)]
        assert len(host.requests) == 1
    for other in predictions[1:]:
        np.testing.assert_array_equal(other.boxes, predictions[0].boxes)
    (folder / "other.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights files: mine\.safetensors, other\.safetensors\. Use the path of one"):
        boxwright.load(folder)


def test_a_loaded_detector_is_bit_identical_to_a_built_one(run: Path, image_file: Path) -> None:
    """Loading skips the initialisation of parameters, but must create buffers that no file has, such as anchors."""
    loaded = boxwright.load(run)
    tensors, _ = load_weights(run / "weights.safetensors")
    built = build(loaded.experiment.model, num_classes=len(CATEGORIES))
    built.load_state_dict(tensors)
    expected, buffers = dict(built.named_buffers()), dict(loaded.detector.named_buffers())
    assert {"normalize.mean", "rpn.anchors.base_0"} <= expected.keys()
    for name, tensor in [*expected.items(), *built.named_parameters()]:
        other = buffers[name] if name in buffers else loaded.detector.get_parameter(name)
        assert torch.equal(tensor, other), name
        assert (tensor.dtype, tensor.requires_grad) == (other.dtype, other.requires_grad), name
    prediction = loaded.predict(image_file)
    other = Predictor(built, experiment=loaded.experiment, categories=CATEGORIES).predict(image_file)
    np.testing.assert_array_equal(prediction.boxes, other.boxes)
    np.testing.assert_array_equal(prediction.scores, other.scores)


def test_invalid_inputs_and_weights_are_an_error(run: Path, tmp_path: Path) -> None:
    predictor = boxwright.load(run)
    with pytest.raises(ValueError, match=r"image: expected uint8 .*got float64 \[4, 4, 3\]"):
        predictor.predict(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="expected a path or an array of pixels, got an object of type Image"):
        predictor.predict(Image.new("RGB", (8, 8)))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"missing\.jpg"):
        predictor.predict(tmp_path / "missing.jpg")
    with pytest.raises(ValueError, match=r"no weights\.safetensors"):
        boxwright.load(tmp_path)
    tensors, metadata = load_weights(run / "weights.safetensors")
    del tensors[next(iter(tensors))]
    save_weights(tmp_path / "other.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match="do not fit"):
        boxwright.load(tmp_path / "other.safetensors")
    save_weights(tmp_path / "other.safetensors", tensors, {})
    with pytest.raises(ValueError, match="experiment and categories"):
        boxwright.load(tmp_path / "other.safetensors")


def test_importing_boxwright_does_not_import_torch() -> None:
    code = "import sys, boxwright; assert 'torch' not in sys.modules; assert boxwright.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_invalid_metadata_of_a_weights_file_is_an_error(run: Path, tmp_path: Path) -> None:
    tensors, metadata = load_weights(run / "weights.safetensors")
    path = tmp_path / "inconsistent.safetensors"
    arguments = metadata["experiment"]["arguments"]
    changes: list[dict[str, Any]] = [
        {"categories": [1, 2]},
        {"categories": [{"name": "cell"}]},
        {"experiment": {}},
        {"experiment": arguments["model"]},
        {"experiment": metadata["experiment"] | {"arguments": arguments | {"model": 5}}},
        {"experiment": metadata["experiment"] | {"arguments": arguments | {"resize": 5}}},
    ]
    for change in changes:
        save_weights(path, tensors, {**metadata, **change})
        with pytest.raises(ValueError, match=r"inconsistent\.safetensors: the model cannot be rebuilt"):
            boxwright.load(path)


def test_a_model_without_an_rpn_needs_proposals(image_file: Path) -> None:
    model = partial(fast_rcnn, backbone=BACKBONE, box=BoxConfig(width=32, score_threshold=0.0))
    experiment = replace(small(model), resize=Resize(short=96, long=160))
    torch.manual_seed(0)
    detector = build(experiment.model, num_classes=2)
    predictor = Predictor(detector, experiment=experiment, categories=CATEGORIES)
    proposals = np.array([[10, 20, 200, 220], [300, 100, 500, 400], [-50, -50, -10, -10]])
    prediction = predictor.predict(image_file, proposals=proposals)
    assert 0 < len(prediction) <= 4, "two classes for each of the two boxes inside the image"
    reordered = predictor.predict([image_file, image_file], proposals=[proposals[::-1], proposals[:0]])
    np.testing.assert_allclose(reordered[0].boxes, prediction.boxes, atol=1e-3)
    assert len(reordered[1]) == 0
    with pytest.raises(ValueError, match="this model has no RPN and needs proposals"):
        predictor.predict(image_file)
    with pytest.raises(ValueError, match="got 1 arrays for 2 images"):
        predictor.predict([image_file, image_file], proposals=[proposals])
    for invalid in (np.zeros((2, 5)), np.full((2, 4), np.nan), np.array([["a"] * 4])):
        with pytest.raises(ValueError, match="proposals: expected finite numbers"):
            predictor.predict(image_file, proposals=invalid)


def test_predictions_of_an_rpn_have_the_name_object(image_file: Path, tmp_path: Path) -> None:
    predictor = boxwright.load(small_run(tmp_path, CATEGORIES, proposals=True))
    assert set(predictor.predict(image_file).names) == {"object"}


def test_a_model_with_an_rpn_does_not_accept_proposals(run: Path, image_file: Path) -> None:
    with pytest.raises(ValueError, match="this model has its own RPN"):
        boxwright.load(run).predict(image_file, proposals=np.zeros((1, 4)))


def test_precision_is_the_one_of_the_experiment_unless_specified(run: Path, image_file: Path) -> None:
    dtypes = []
    for precision in (None, "bfloat16", "float32"):
        model = boxwright.load(run, precision=precision)
        model.detector.backbone.register_forward_hook(lambda _, __, maps: dtypes.append(maps[0].dtype))
        assert model.experiment.precision == (precision or boxwright.load(run).experiment.precision)
        assert any(isinstance(module, PackedConv2d) for module in model.detector.modules())
        assert model.predict(image_file).boxes.dtype == np.float32
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
