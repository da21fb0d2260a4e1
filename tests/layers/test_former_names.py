"""Deprecated names keep working, with a warning that names the replacement."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import boxwright
from boxwright.layers.norm import FrozenBatchNorm2d
from boxwright.layers.optimize import optimize_for_cpu
from boxwright.layers.packed import PackedConv2d


def test_norms_can_be_imported_from_their_former_module() -> None:
    former = importlib.import_module("boxwright.backbones.norm")
    with pytest.warns(DeprecationWarning, match=r"boxwright\.layers\.norm\.FrozenBatchNorm2d"):
        assert former.FrozenBatchNorm2d is FrozenBatchNorm2d
    with pytest.raises(AttributeError, match="nothing"):
        _ = former.nothing


def test_convolve_calls_conv_norm() -> None:
    from boxwright.backbones.convolve import convolve

    conv, x = nn.Conv2d(2, 3, 1), torch.randn(1, 2, 4, 4)
    with pytest.warns(DeprecationWarning, match="conv_norm"):
        y = convolve(conv, None, x, relu=True)
    torch.testing.assert_close(y, conv(x).relu())


def test_pack_convolutions_calls_optimize_for_cpu() -> None:
    from boxwright.detectors.inference import pack_convolutions

    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    with pytest.warns(DeprecationWarning, match="optimize_for_cpu"):
        pack_convolutions(model)
    assert type(model[0]) is PackedConv2d


def test_optimize_for_cpu_can_be_imported_from_the_package() -> None:
    assert boxwright.optimize_for_cpu is optimize_for_cpu
