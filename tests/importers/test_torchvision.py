"""Checkpoints of torchvision's models reproduce its detections after `boxwright weights convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18, resnext50_32x4d
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.ops import FrozenBatchNorm2d
from typer.testing import CliRunner

import boxwright
from boxwright.backbones.resnet import ResNet
from boxwright.cli.main import app
from boxwright.data.dataset import Category
from boxwright.importers.convert import convert
from boxwright.importers.torchvision import TORCHVISION
from boxwright.structures import Batch, map_tensors
from boxwright.weights.foreign import ForeignFile, read_foreign
from boxwright.weights.ours import load_weights
from importers.reference import compare, to_detections
from parity.peer import NUM_CLASSES, peer_faster_rcnn, peer_mask_rcnn, peer_retinanet, real_batch

PEERS: dict[str, Callable[[Batch], nn.Module]] = {
    "faster_rcnn": lambda batch: peer_faster_rcnn(batch).float(),
    "mask_rcnn": lambda batch: peer_mask_rcnn(batch, 1000, 0.5).float(),
    "retinanet": lambda batch: peer_retinanet(batch).float(),
}


@pytest.fixture(scope="module")
def batch(data_dir: Path) -> Batch:
    return real_batch(data_dir)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["weights", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def image_of(batch: Batch) -> np.ndarray:
    """The first image without its padding."""
    height, width = batch.image_sizes[0].tolist()
    return batch.images[0, :, :height, :width].permute(1, 2, 0).numpy()


def names_in(folder: Path, count: int) -> Path:
    file = folder / "names.txt"
    file.write_text("\n".join(f"thing {i}" for i in range(count)))
    return file


@torch.inference_mode()
def detections_of(peer: Any, image: np.ndarray) -> dict[str, Tensor]:
    """Run torchvision's model on an image without resizing it."""
    peer.transform.min_size = (min(image.shape[:2]),)
    peer.eval()
    return peer([torch.from_numpy(image).permute(2, 0, 1).float()])[0]


@pytest.mark.parametrize("kind", PEERS)
@torch.inference_mode()
def test_converted_checkpoints_reproduce_torchvisions_detections(kind: str, batch: Batch, tmp_path: Path) -> None:
    peer = PEERS[kind](batch)
    torch.save(peer.state_dict(), tmp_path / "theirs.pth")
    image = image_of(batch)
    names = names_in(tmp_path, NUM_CLASSES)
    run("convert", tmp_path / "theirs.pth", "--out", tmp_path / "ours.safetensors", "--categories", names)
    model = boxwright.load(tmp_path / "ours.safetensors")
    actual = model.predict(image, native=True)
    expected = detections_of(peer, image)
    assert len(actual) == len(expected["scores"]) > 50, "too few detections for a meaningful comparison"
    assert len(set(actual.labels)) > 3
    ours = {name: torch.from_numpy(getattr(actual, name)) for name in ("boxes", "scores", "labels")}
    expected.pop("masks", None)  # Compared below before pasting, because torchvision pastes differently.
    differences = compare(to_detections(ours), to_detections(expected, 0 if kind == "retinanet" else 1))
    assert differences.boxes < 1e-2
    assert differences.scores < 1e-4
    if kind == "mask_rcnn":
        peer.transform.postprocess = lambda detections, *_: detections
        detections = map_tensors(model.detector.detect(map_tensors(batch, lambda t: t[:1])), lambda t: t[0])
        expected = detections_of(peer, image)
        assert expected["masks"].std() > 0.1, "the masks are too uniform for a meaningful comparison"
        ours = {name: getattr(detections, name)[detections.valid] for name in ("boxes", "scores", "labels", "masks")}
        assert compare(to_detections(ours), to_detections(expected, 1)).masks < 1e-3


def test_round_trip_is_bit_identical(batch: Batch, tmp_path: Path) -> None:
    torch.save({"model": peer_retinanet(batch).float().state_dict(), "epoch": 3}, tmp_path / "theirs.pth")
    names = names_in(tmp_path, NUM_CLASSES)
    run("convert", tmp_path / "theirs.pth", "--out", tmp_path / "ours.safetensors", "--categories", names)
    model = boxwright.load(tmp_path / "ours.safetensors")
    first = model.predict(image_of(batch), native=True)
    converted, metadata = load_weights(tmp_path / "ours.safetensors")
    for name, tensor in model.detector.state_dict().items():
        assert torch.equal(tensor, converted[name]), name
    again = boxwright.load(tmp_path / "ours.safetensors").predict(image_of(batch), native=True)
    assert len(first) > 50
    assert np.array_equal(first.boxes, again.boxes)
    assert np.array_equal(first.scores, again.scores)
    assert metadata["source"]["format"] == "torchvision"
    assert "no use" not in run("inspect", tmp_path / "ours.safetensors")


def test_retinanet_v1_and_v2_are_distinguished_and_keep_their_labels(tmp_path: Path) -> None:
    """v2 has P6 from C5 and GroupNorm in the head, v1 has P6 from P5. Class row 0 was never trained in either model."""
    models = {}
    for name, make in (("v1", retinanet_resnet50_fpn), ("v2", retinanet_resnet50_fpn_v2)):
        peer = make(weights=None, weights_backbone=None)
        file = ForeignFile(path=tmp_path / name, sha256="00", tensors=peer.state_dict(), about={})
        models[name] = convert(file)
    v1, v2 = models["v1"].experiment.model.keywords, models["v2"].experiment.model.keywords
    assert (v1["backbone"].keywords["extra"], v1["retina"].norm) == ("p5", None)
    assert (v2["backbone"].keywords["extra"], v2["retina"].norm) == ("c5", "gn")
    assert [(c.id, c.name) for c in models["v2"].categories[:2]] == [(0, "N/A 0"), (1, "person")]
    assert [c.name for c in models["v1"].categories if c.id in (12, 13, 90)] == ["N/A 12", "stop sign", "toothbrush"]
    peer_norm = peer.head.regression_head.conv[3][1]
    assert torch.equal(models["v2"].tensors["head.box_convs.10.weight"], peer_norm.weight)


def test_norms_of_the_published_v1_weights_have_no_eps() -> None:
    file = ForeignFile(path=Path("x.pth"), sha256="258fb6c6" + 56 * "0", tensors={}, about={})
    assert TORCHVISION.settings(file).norm_eps == 0.0
    assert TORCHVISION.settings(ForeignFile(path=Path("x"), sha256=64 * "0", tensors={}, about={})).norm_eps == 1e-5


def timm_resnet18() -> nn.Module:
    return timm.create_model("resnet18")


@pytest.mark.parametrize("make", [resnet18, resnext50_32x4d, timm_resnet18])
def test_classification_weights_become_a_backbone_with_equal_feature_maps(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    peer = make()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.01, 2)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.1, 0.5)
    # timm publishes safetensors, torchvision pickled state dicts.
    if make is timm_resnet18:
        save_file(peer.state_dict(), tmp_path / "theirs")
    else:
        torch.save(peer.state_dict(), tmp_path / "theirs")
    printed = run("convert", tmp_path / "theirs", "--out", tmp_path / "ours.safetensors")
    assert "fc.weight" in printed, "unused tensors must be listed"
    tensors, _ = load_weights(tmp_path / "ours.safetensors")
    body = ResNet(50, groups=32, width_per_group=4) if make is resnext50_32x4d else ResNet(18)
    body.eval()
    body.load_state_dict({name.removeprefix("backbone.body."): tensor for name, tensor in tensors.items()})
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        peer.eval()
        x = peer.maxpool(peer.bn1(peer.conv1(images)).relu())
        for stage, actual in enumerate(body(images), start=1):
            x = getattr(peer, f"layer{stage}")(x)
            assert torch.allclose(actual, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


def test_a_backbone_has_neither_settings_nor_classes(tmp_path: Path) -> None:
    file = ForeignFile(path=tmp_path / "x.pth", sha256="00", tensors=resnet18().state_dict(), about={})
    with pytest.raises(ValueError, match="a backbone has neither"):
        convert(file, changes=["resize.short=600"])


def test_norms_with_another_eps_are_rescaled_to_equal_outputs(batch: Batch, tmp_path: Path) -> None:
    peer = peer_retinanet(batch)
    torch.save(peer.state_dict(), tmp_path / "theirs.pth")
    file = read_foreign(tmp_path / "theirs.pth")
    names = [Category(i, str(i)) for i in range(NUM_CLASSES)]
    tensors = convert(file, categories=names, norm_eps=0.0).tensors
    theirs = FrozenBatchNorm2d(64, eps=0.0)
    prefix = "backbone.body.bn1."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in file.tensors.items() if k.startswith(prefix)})
    ours = FrozenBatchNorm2d(64, eps=1e-5)
    ours.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    x = torch.randn(1, 64, 4, 4)
    assert torch.allclose(theirs(x), ours(x), rtol=0, atol=1e-5 * theirs(x).abs().max().item())
