"""Test the Triton form of `nms` without a GPU: interpreted and compared to the CPU form, and compiled for GPUs.

Triton reads TRITON_INTERPRET when it is imported, so the comparison runs in a separate process.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from boxwright.ops.nms import nms

triton = pytest.importorskip("triton")


def compare() -> None:
    """Run both forms on the same candidates; called in the process with TRITON_INTERPRET."""
    from boxwright.ops.nms_triton import greedy_nms

    torch.manual_seed(0)
    for num_candidates, num_groups, size, max_keep, threshold in [
        (200, 3, 60.0, 200, 0.5),
        (200, 1, 60.0, 250, 0.3),
        (200, 3, 30.0, 20, 0.7),
        (64, 2, 40.0, 1, 0.5),
        (1, 1, 40.0, 1, 0.5),
        (0, 1, 40.0, 3, 0.5),
    ]:
        corner = (torch.rand(3, num_candidates, 2) * size).round()
        boxes = torch.cat([corner, corner + (1 + torch.rand(3, num_candidates, 2) * 20).round()], -1)
        scores = torch.rand(3, num_candidates).mul(50).round()  # With ties.
        groups = torch.randint(num_groups, (3, num_candidates)) - 1
        valid = torch.rand(3, num_candidates) < torch.tensor([[0.7], [1.0], [0.0]])
        boxes = torch.where(valid[..., None], boxes, torch.nan)
        scores = torch.where(valid, scores, torch.nan)
        expected = nms(boxes, scores, groups, valid, iou_threshold=threshold, max_keep=max_keep)
        result = greedy_nms(boxes, scores, groups, valid, threshold, max_keep)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


def test_the_interpreted_kernel_equals_the_cpu_form() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_kernel_compiles_for_gpus(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from boxwright.ops import nms_triton

    pointers = dict.fromkeys(("groups", "order", "num_valid", "indices", "num_kept"), "*i64")
    scalars = {"num_candidates": "i32", "max_keep": "i32", "iou_threshold": "fp32"}
    source = ASTSource(
        nms_triton._greedy_kernel,
        {"boxes": "*fp32", **pointers, **scalars, "BLOCK": "constexpr"},
        {"BLOCK": nms_triton.BLOCK},
    )
    options = {"num_warps": nms_triton.NUM_WARPS, "enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert "bar.sync" in code
    assert "fma" not in code
    assert "div.rn.f32" in code


if __name__ == "__main__":
    compare()
