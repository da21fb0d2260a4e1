from __future__ import annotations

import sys

import pytest
import torch

from boxwright.backbones.timm import TimmBackbone, timm_fpn


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_timm_models_give_a_feature_pyramid(name: str) -> None:
    pytest.importorskip("timm", reason="needs the extra boxwright[timm]")
    model = timm_fpn(name=name, channels=32)
    assert isinstance(model.body, TimmBackbone)
    # The canvas differs from the image size of the published model.
    with torch.no_grad():
        maps = model.body(torch.randn(1, 3, 64, 96))
        levels = model(torch.randn(1, 3, 64, 96))
    for x, channels, stride in zip(maps, model.body.channels, (4, 8, 16, 32), strict=True):
        assert x.shape == (1, channels, 64 // stride, 96 // stride)
    assert [tuple(level.shape[-2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


def test_an_unknown_model_is_an_error() -> None:
    pytest.importorskip("timm", reason="needs the extra boxwright[timm]")
    with pytest.raises(ValueError, match="no_such_model"):
        timm_fpn(name="no_such_model")


def test_a_model_without_the_four_strides_is_an_error() -> None:
    pytest.importorskip("timm", reason="needs the extra boxwright[timm]")
    with pytest.raises(ValueError, match="strides"):
        timm_fpn(name="vit_tiny_patch16_224")


def test_the_error_of_missing_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"boxwright\[timm\]"):
        timm_fpn(name="resnet18")
