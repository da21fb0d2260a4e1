"""The GPU benchmark runs from end to end; here on the CPU and on small shapes."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import checks, kernels, speed
from benchmarks.gpu.__main__ import items, main
from benchmarks.gpu.results import Result, write
from benchmarks.gpu.scale import FAMILIES, FULL, SMALL
from benchmarks.gpu.worker import Item, Worker, do

from boxwright.benchmark import operations
from boxwright.benchmark.report import read_report

FACTS = {"machine": {"processor": "none"}, "versions": {"torch": str(torch.__version__)}}


def dies() -> Result:
    os._exit(3)


def hangs() -> Result:
    time.sleep(60)
    return Result()


def works() -> Result:
    return Result(detail="fine")


def test_does_every_kind_of_item_and_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_SHAPES", ((32, 32, 3, 40, 40),))
    todo = [
        *(Item(check.__name__, 0, partial(check, SMALL, "rpn")) for check in checks.CHECKS),
        Item("rate", 0, partial(kernels.matrix_rate, SMALL)),
        Item("roi_align", 0, partial(kernels.roi_align, SMALL)),
        Item("nms", 0, partial(kernels.suppression, SMALL)),
        Item("matcher", 0, partial(kernels.matcher, SMALL)),
        Item("train", 0, partial(speed.train, SMALL, "rpn", "eager")),
        Item("infer", 0, partial(speed.infer, SMALL, "rpn", 1)),
        Item("operations", 0, partial(speed.operations, SMALL, "rpn")),
        Item("detect", 0, partial(speed.detect, SMALL, "rpn", 1)),
    ]
    outcomes = [do(item) for item in todo]
    assert [outcome.error for outcome in outcomes] == [""] * len(todo)
    text = write(tmp_path, outcomes, "python -m benchmarks.gpu", FACTS)
    for name in ("rpn_r18_fpn_small", "graphs", "RoIAlign", "Soft-NMS", "matcher", "torchvision", "of the matrix rate"):
        assert name in text
    report = read_report(tmp_path / "benchmark.json")
    assert [(t.case.system, t.case.task) for t in report.timings] == [
        ("boxwright", "train"),
        ("torchvision", "train"),
        ("boxwright", "infer"),
        ("torchvision", "infer"),
    ]
    assert len(report.ratios) == 2
    assert [o.case.task for o in report.operations] == ["train", "infer"]


@pytest.mark.parametrize("scale", [FULL, SMALL], ids=["full", "small"])
def test_looks_at_every_detector_the_checks_first(scale: object) -> None:
    names = [item.name for item in items(scale)]  # type: ignore[arg-type]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        wanted = [f"{family}: {check.__name__}" for check in checks.CHECKS]
        wanted += [f"{family}: train, {mode}" for mode in speed.MODES] + [f"{family}: infer 1", f"{family}: operations"]
        assert set(wanted) <= set(names)
    assert names.index("fast_rcnn: no_host_sync") < names.index("mask_rcnn: train, eager")


def test_an_item_that_fails_dies_or_hangs_is_told_and_the_next_one_is_done(tmp_path: Path) -> None:
    failed = do(Item("fails", 0, partial(checks.equals_cpu, SMALL, "no_such_family")))
    assert "no_such_family" in failed.error
    worker = Worker("cpu")
    try:
        outcomes = [
            worker.do(Item(work.__name__, 0, work), 0.5 if work is hangs else 60) for work in (dies, works, hangs)
        ]
    finally:
        worker.close()
    assert [outcome.error for outcome in outcomes] == ["the process that did it died", "", "stopped after 0 s"]
    assert outcomes[1].result == works()
    assert worker.facts["versions"]["torch"] == torch.__version__
    assert "| dies | failed |" in write(tmp_path, [failed, *outcomes], "", FACTS)


def test_leaves_out_what_comes_too_late(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--small", "--seconds", "0", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["items"]) == len(list(items(SMALL)))
    assert {item["error"] for item in found["items"]} == {"left out: the time was up"}


def test_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--out", str(tmp_path)])
    assert "--small" in capsys.readouterr().err
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["--out", str(tmp_path)]) == 1
    assert "no GPU" in capsys.readouterr().err
