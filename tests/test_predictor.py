"""`boxwright.load(...).predict(...)` takes files and arrays and answers in their own pixels."""

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
def picture(data_dir: Path) -> Path:
    return min((data_dir / "bccd" / "JPEGImages").iterdir())


class WholePicture(nn.Module):
    """Finds the whole picture twice, with scores 0.9 and 0.2, and remembers the canvas."""

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


def test_boxes_are_in_pixels_of_the_picture() -> None:
    detector = WholePicture()
    predictor = Predictor(detector, experiment=small(WholePicture), categories=CATEGORIES)
    image = np.zeros((90, 130, 3), dtype=np.uint8)
    found = predictor.predict(image)
    assert detector.canvas == (256, 352)
    np.testing.assert_allclose(found.boxes[0], [0, 0, 130, 90], atol=1e-3)
    assert found.boxes.max() <= 130
    assert found.scores.tolist() == pytest.approx([0.9, 0.2])
    assert found.names == ["dust", "cell"]
    assert found.image_size == (90, 130)

    (found,) = predictor.predict([image], score=0.5, native=True)
    assert detector.canvas == (96, 160)
    np.testing.assert_allclose(found.boxes, [[0, 0, 130, 90]])


class OtherLabel(WholePicture):
    """Gives the last class the label -1, which as an index would be a class too."""

    def detect(self, batch: Batch) -> Detections:
        detections = super().detect(batch)
        return replace(detections, labels=detections.labels - 1)


def test_labels_that_are_no_classes_are_refused() -> None:
    predictor = Predictor(OtherLabel(), experiment=small(OtherLabel), categories=CATEGORIES)
    with pytest.raises(ValueError, match=r"OtherLabel.detect: label -1.*0 to 1"):
        predictor.predict(np.zeros((90, 130, 3), dtype=np.uint8))


def test_there_is_a_category_for_each_class() -> None:
    with pytest.raises(ValueError, match=r"1 categories.*num_classes is 2"):
        Predictor(WholePicture(), experiment=small(WholePicture), categories=CATEGORIES[:1])


class WithMasks(WholePicture):
    """Says that its objects fill the upper halves of their boxes."""

    def detect(self, batch: Batch) -> Detections:
        half = (torch.arange(28) < 14).float()[:, None].expand(1, 3, 28, 28)
        return replace(super().detect(batch), masks=half)


def test_masks_are_in_pixels_of_the_picture() -> None:
    predictor = Predictor(WithMasks(), experiment=small(WithMasks), categories=CATEGORIES)
    image = np.zeros((90, 130, 3), dtype=np.uint8)
    assert Predictor(WholePicture(), experiment=small(WholePicture), categories=CATEGORIES).predict(image).masks is None
    found = predictor.predict(image)
    assert found.masks is not None
    assert len(found.masks) == len(found) == 2
    expected = np.zeros((90, 130), bool)
    expected[:45] = True
    expected[[0, 0, 44, 44], [0, 129, 0, 129]] = False  # bilinear sampling rounds corners off
    np.testing.assert_array_equal(found.masks[0], expected)
    found = predictor.predict(image, score=0.5)
    assert found.masks is not None
    assert [mask.shape for mask in found.masks] == [(90, 130)]


def test_load_and_predict(run: Path, picture: Path) -> None:
    predictor = boxwright.load(run)
    assert predictor.categories == CATEGORIES
    assert predictor.metadata["step"] == 12
    found = predictor.predict(picture)
    assert len(found)
    assert (np.diff(found.scores) <= 0).all()
    assert found.boxes.min() >= 0
    assert (found.boxes.max(axis=0) <= [640, 480, 640, 480]).all()
    from_file, from_pixels = boxwright.load(run / "weights.safetensors").predict([picture, decode_image(picture)])
    for other in (from_file, from_pixels):
        np.testing.assert_array_equal(other.boxes, found.boxes)
        np.testing.assert_array_equal(other.scores, found.scores)


def test_a_url_and_a_folder_with_one_weights_file(
    run: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        found = [boxwright.load(place).predict(picture) for place in (run, folder, url, url)]
        assert len(host.requests) == 1
    for other in found[1:]:
        np.testing.assert_array_equal(other.boxes, found[0].boxes)
    (folder / "other.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"contains mine\.safetensors, other\.safetensors\. Use the path of one"):
        boxwright.load(folder)


def test_a_loaded_detector_is_the_built_one_bit_for_bit(run: Path, picture: Path) -> None:
    """Loading skips what fills parameters; anchors and pixel statistics, which no file holds, must be there."""
    loaded = boxwright.load(run)
    tensors, _ = load_weights(run / "weights.safetensors")
    built = build(loaded.experiment.model, num_classes=len(CATEGORIES))
    built.load_state_dict(tensors)
    wanted, given = dict(built.named_buffers()), dict(loaded.detector.named_buffers())
    assert {"normalize.mean", "rpn.anchors.base_0"} <= wanted.keys()
    for name, tensor in [*wanted.items(), *built.named_parameters()]:
        other = given[name] if name in given else loaded.detector.get_parameter(name)
        assert torch.equal(tensor, other), name
        assert (tensor.dtype, tensor.requires_grad) == (other.dtype, other.requires_grad), name
    found = loaded.predict(picture)
    other = Predictor(built, experiment=loaded.experiment, categories=CATEGORIES).predict(picture)
    np.testing.assert_array_equal(found.boxes, other.boxes)
    np.testing.assert_array_equal(found.scores, other.scores)


def test_what_cannot_be_used_is_told(run: Path, tmp_path: Path) -> None:
    predictor = boxwright.load(run)
    with pytest.raises(ValueError, match=r"image: expected uint8 .*got float64 \[4, 4, 3\]"):
        predictor.predict(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="expected a path or an array of pixels, got an object of type Image"):
        predictor.predict(Image.new("RGB", (8, 8)))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"nowhere\.jpg"):
        predictor.predict(tmp_path / "nowhere.jpg")
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


def test_boxwright_alone_does_not_import_torch() -> None:
    code = "import sys, boxwright; assert 'torch' not in sys.modules; assert boxwright.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_whose_parts_were_not_made_for_each_other_is_named(run: Path, tmp_path: Path) -> None:
    tensors, metadata = load_weights(run / "weights.safetensors")
    path = tmp_path / "odd.safetensors"
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
        with pytest.raises(ValueError, match=r"odd\.safetensors: the model cannot be rebuilt"):
            boxwright.load(path)


def test_a_model_without_an_rpn_takes_proposals(picture: Path) -> None:
    model = partial(fast_rcnn, backbone=BACKBONE, box=BoxConfig(width=32, score_threshold=0.0))
    experiment = replace(small(model), resize=Resize(short=96, long=160))
    torch.manual_seed(0)
    detector = build(experiment.model, num_classes=2)
    predictor = Predictor(detector, experiment=experiment, categories=CATEGORIES)
    proposals = np.array([[10, 20, 200, 220], [300, 100, 500, 400], [-50, -50, -10, -10]])
    found = predictor.predict(picture, proposals=proposals)
    assert 0 < len(found) <= 4, "two classes on the two boxes that lie in the picture"
    again = predictor.predict([picture, picture], proposals=[proposals[::-1], proposals[:0]])
    np.testing.assert_allclose(again[0].boxes, found.boxes, atol=1e-3)
    assert len(again[1]) == 0
    with pytest.raises(ValueError, match="this model has no RPN and needs proposals"):
        predictor.predict(picture)
    with pytest.raises(ValueError, match="got 1 arrays for 2 images"):
        predictor.predict([picture, picture], proposals=[proposals])
    for wrong in (np.zeros((2, 5)), np.full((2, 4), np.nan), np.array([["a"] * 4])):
        with pytest.raises(ValueError, match="proposals: expected finite numbers"):
            predictor.predict(picture, proposals=wrong)


def test_proposals_are_of_no_class(picture: Path, tmp_path: Path) -> None:
    predictor = boxwright.load(small_run(tmp_path, CATEGORIES, proposals=True))
    assert set(predictor.predict(picture).names) == {"object"}


def test_a_model_with_an_rpn_takes_none(run: Path, picture: Path) -> None:
    with pytest.raises(ValueError, match="this model has its own RPN"):
        boxwright.load(run).predict(picture, proposals=np.zeros((1, 4)))


def test_precision_is_the_models_own_or_the_one_asked_for(run: Path, picture: Path) -> None:
    seen = []
    for precision in (None, "bfloat16", "float32"):
        model = boxwright.load(run, precision=precision)
        model.detector.backbone.register_forward_hook(lambda _, __, maps: seen.append(maps[0].dtype))
        assert model.experiment.precision == (precision or boxwright.load(run).experiment.precision)
        assert any(isinstance(module, PackedConv2d) for module in model.detector.modules())
        assert model.predict(picture).boxes.dtype == np.float32
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
