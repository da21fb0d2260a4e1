"""Test the Triton form of RoIAlign without a GPU: interpreted against `pool_every_level`, and compiled for GPUs.

Triton reads TRITON_INTERPRET when it is imported, so the comparison runs in a separate process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from boxwright.ops.roi_align import pool_every_level

triton = pytest.importorskip("triton")

STRIDES = [4, 8, 16]
SIZES = [(16, 20), (8, 10), (4, 5)]
CHANNELS = 5
SIZE = 2
LAST, FIRST = torch.channels_last, torch.contiguous_format
CASES = {
    # Memory format, sampling ratio, aligned, keep_narrow.
    torch.float32: [(LAST, 2, True, False), (FIRST, 2, False, False), (LAST, 2, False, True), (LAST, 0, True, False)],
    torch.bfloat16: [(LAST, 2, True, False)],
    torch.float64: [(LAST, 2, True, False)],
}


def compare(dtype: torch.dtype) -> None:
    """Compare values and gradients of both forms; called in the process with TRITON_INTERPRET."""
    from boxwright.ops import roi_align_triton

    torch.manual_seed(0)
    # Inside the canvas, beyond it on both ends, narrower than a feature cell, without area, and one without a level.
    boxes = torch.tensor([[10.3, 8, 31.7, 40], [-30, -9, 20, 90], [70, 50.1, 71, 51.3], [5, 5, 5, 5], [0, 0, 9, 9]])
    boxes = boxes + torch.tensor([0.0, 0.37])[:, None, None]
    level = torch.tensor([[0, 2, 1, 0, 3], [1, 2, 0, 1, 3]])
    # bfloat16 results are rounded from float32 sums, and the order of summation differs between the forms.
    close = {"rtol": 2**-7, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    heights, widths = ([size[side] for size in SIZES] for side in (0, 1))
    for memory_format, sampling_ratio, aligned, keep_narrow in CASES[dtype]:
        options = (sampling_ratio, aligned, keep_narrow)
        features = [torch.randn(2, CHANNELS, *size).to(dtype) for size in SIZES]
        features = [feature.to(memory_format=memory_format).requires_grad_() for feature in features]
        reference = pool_every_level(features, boxes, level, STRIDES, SIZE, *options)
        ours = roi_align_triton.pool(features, boxes, level, STRIDES, SIZE, *options)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, reference, **close)
        assert not ours[level == len(STRIDES)].any()
        weight = torch.randn_like(reference)
        expected = torch.autograd.grad(reference, features, weight)
        actual = roi_align_triton.pool_backward(weight, boxes, level, heights, widths, STRIDES, *options)
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, **close)


def test_the_interpreted_kernel_equals_pool_every_level() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "maps", "write_instruction"),
    [
        ("_pool_kernel", "*bf16", r"st\.global\.v2\.b32"),
        ("_backward_kernel", "*fp32", r"(atom|red)\.global.*add(\.v\d)?\.f32"),
    ],
)
def test_the_kernels_compile_to_vector_instructions(name: str, maps: str, write_instruction: str) -> None:
    """The kernels read and add several channels per instruction."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from boxwright.ops import roi_align_triton

    kernel = getattr(roi_align_triton, name)
    signature = {argument: "constexpr" if argument.isupper() else "i32" for argument in kernel.arg_names}
    signature |= {argument: maps for argument in kernel.arg_names if argument.startswith("map")}
    signature |= {"boxes": "*fp32", "levels": "*i64", "cells": "*bf16"}
    # PyTorch aligns its memory to 16 bytes, and the number of channels is a multiple of 16.
    aligned = [
        (position,)
        for position, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or argument == "channels"
    ]
    source = ASTSource(
        kernel,
        signature,
        {"SHIFT": 0.5, "WIDEN": False, "SAMPLES": 2, "BLOCK": roi_align_triton.MAX_BLOCK},
        {position: [["tt.divisibility", 16]] for position in aligned},
    )
    options = {"num_warps": roi_align_triton.NUM_WARPS}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "ld.global.v2.b32" in code  # four bfloat16 at a time
    assert re.search(write_instruction, code)


if __name__ == "__main__":
    for dtype in CASES:
        compare(dtype)
