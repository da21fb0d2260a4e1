"""The GPU check runs from end to end; here on the CPU and on small shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.fixture(autouse=True)
def restored_backend_flags() -> None:
    torch._dynamo.reset()


def test_writes_every_check_and_timing(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {(c["detector"], c["check"]) for c in results["checks"]} == {
        (kind, check)
        for kind in ("rpn", "faster_rcnn")
        for check in ("check_equals_cpu", "check_no_host_sync", "check_compiled_equals_eager")
    }
    assert all(row["seconds"] > 0 and not row["error"] for row in results["timings"])
    assert {row["system"] for row in results["timings"]} == {"boxwright", "torchvision"}
    assert (tmp_path / "gpu.md").read_text().count("\n") == len(results["timings"]) + 2


def test_a_failing_check_is_told_and_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise AssertionError("losses differ")

    monkeypatch.setattr(gpu, "check_equals_cpu", broken)
    monkeypatch.setattr(gpu, "check_compiled_equals_eager", broken)
    monkeypatch.setattr(gpu, "rows_for", lambda *_: [])
    assert gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path)]) == 1
    passed = {
        (c["detector"], c["check"]): c["passed"] for c in json.loads((tmp_path / "gpu.json").read_text())["checks"]
    }
    assert passed["rpn", "check_no_host_sync"]
    assert not passed["faster_rcnn", "broken"]


def test_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "no GPU" in capsys.readouterr().err
