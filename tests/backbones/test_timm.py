from __future__ import annotations

import sys

import pytest
import torch

from boxwright.backbones.timm import TimmBackbone, timm_fpn


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_gives_a_pyramid(name: str) -> None:
    pytest.importorskip("timm", reason="needs the extra boxwright[timm]")
    model = timm_fpn(name=name, channels=32)
    assert isinstance(model.body, TimmBackbone)
    # A canvas other than the size that the model was published for.
    with torch.no_grad():
        maps = model.body(torch.randn(1, 3, 64, 96))
        levels = model(torch.randn(1, 3, 64, 96))
    for x, channels, stride in zip(maps, model.body.channels, (4, 8, 16, 32), strict=True):
        assert x.shape == (1, channels, 64 // stride, 96 // stride)
    assert [tuple(level.shape[-2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


def test_unknown_model_is_named() -> None:
    pytest.importorskip("timm", reason="needs the extra boxwright[timm]")
    with pytest.raises(ValueError, match="resnet18_of_mine"):
        timm_fpn(name="resnet18_of_mine")


def test_model_without_a_pyramid_is_refused() -> None:
    pytest.importorskip("timm", reason="needs the extra boxwright[timm]")
    with pytest.raises(ValueError, match="strides"):
        timm_fpn(name="vit_tiny_patch16_224")


def test_missing_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"boxwright\[timm\]"):
        timm_fpn(name="resnet18")
