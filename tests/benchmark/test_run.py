"""A complete benchmark run: its measurements, JSON report, tables and benchmark page."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from boxwright.benchmark import memory, operations
from boxwright.benchmark.memory import measure_memory
from boxwright.benchmark.page import write_page
from boxwright.benchmark.plan import Plan
from boxwright.benchmark.report import Memory, Report, read_report, write_report
from boxwright.benchmark.run import measure
from boxwright.benchmark.table import markdown
from boxwright.zoo import load_zoo

RECIPE = "rpn_r18_fpn_small"
PLAN = Plan(recipe=RECIPE, size=(64, 64), batch=2, iterations=2, warmup=0, workers=0, threads=1, peer="torchvision")
PHASES = ["train", "infer", "train-loader", "infer-loader", "parts", "flops"]


@pytest.fixture(scope="module")
def report() -> Report:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "_SHAPES", ((32, 32, 3, 40, 40),))
        result = measure([PLAN], PHASES, command="boxwright benchmark ...", log=lambda _: None)
    torch.set_num_threads(threads)
    return result


def test_every_phase_has_the_requested_number_of_times(report: Report) -> None:
    measured = [(t.case.system, t.case.task, t.loading) for t in report.timings]
    assert measured == [
        ("boxwright", "train", False),
        ("torchvision", "train", False),
        ("boxwright", "infer", False),
        ("torchvision", "infer", False),
        ("boxwright", "train", True),
        ("boxwright", "infer", True),
    ]
    for timing in report.timings:
        assert len(timing.seconds) == 2
        assert all(0 < seconds < 30 for seconds in timing.seconds)
        assert (timing.case.batch, timing.case.size, timing.case.precision) == (2, (64, 64), "float32")
    training = report.timings[4]
    assert len(training.data_wait) == 2
    assert all(0 < wait < seconds for wait, seconds in zip(training.data_wait, training.seconds, strict=True))


def test_ratios_compare_times_of_the_same_round(report: Report) -> None:
    for ratio, ours, theirs in zip(report.ratios, report.timings[0:4:2], report.timings[1:4:2], strict=True):
        assert ratio.case == theirs.case
        assert ratio.each == [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
        assert ratio.median == statistics.median(ratio.each)


def test_training_has_two_to_three_times_the_operations_of_inference(report: Report) -> None:
    training, inference = report.operations
    assert training.case.task == "train"
    assert 2 * inference.operations < training.operations <= 3 * inference.operations
    assert training.floor == training.operations / training.rate


def test_a_report_survives_its_file(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "x.json", report)
    assert read_report(tmp_path / "deep" / "x.json") == report


def test_tables_show_median_times_and_images_per_second(report: Report) -> None:
    text = markdown(report)
    timing = report.timings[0]
    assert f"{timing.median:.3f} (" in text
    assert f"{timing.images_per_second:.2f}" in text
    assert timing.images_per_second == pytest.approx(2 / statistics.median(timing.seconds))
    assert report.timings[5].images_per_second == pytest.approx(2 / statistics.mean(report.timings[5].seconds))
    for part in report.parts[0].parts:
        assert f"| {part} |" in text
    assert text.endswith("```\nboxwright benchmark ...\n```\n")


def test_the_page_shows_stored_figures_and_leaves_other_cells_empty(report: Report, tmp_path: Path) -> None:
    peaks = [
        Memory(case=timing.case, peak_rss=size, start_rss=1)
        for timing, size in zip(report.timings[:2], (1_230_000_000, 2_460_000_000), strict=True)
    ]
    report.memory = peaks
    write_report(tmp_path / "one.json", report)
    page = write_page(tmp_path, load_zoo())
    lines = page.splitlines()
    train, infer = report.timings[0], report.timings[5]
    row = next(line for line in lines if line.startswith("| R-18-FPN") and RECIPE in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:8] == ["1.23", f"{train.median:.3f}", f"{infer.images_per_second:.2f}", "", ""]
    assert "64 x 64, 2 images, float32 [1]" in cells[8]
    unmeasured = next(line for line in lines if line.endswith("| `rpn_r50_fpn_1x` |"))
    assert [cell.strip() for cell in unmeasured.strip("|").split("|")][3:8] == [""] * 5
    published = next(line for line in lines if "`rpn_r50_fpn_1x` [B]" in line)
    assert "| 4.8 | 0.407 | 14.5 | 57.1 |" in published
    ratio = f"{report.ratios[0].median:.2f} ("
    speed = next(line for line in lines if f"| `{RECIPE}` |" in line and "torchvision" in line)
    assert ratio in speed
    assert f"| {train.median / report.operations[0].floor:.2f} |" in speed
    assert "| 1.23 | torchvision | 2.46 | 0.50 |" in page


def test_the_floor_may_come_from_another_report_of_the_same_machine(report: Report, tmp_path: Path) -> None:
    timings = msgspec.structs.replace(report, operations=[])
    counted = msgspec.structs.replace(report, timings=[], ratios=[])
    write_report(tmp_path / "one.json", timings)
    assert f"| {report.operations[0].floor:.3f} |" not in write_page(tmp_path, load_zoo())
    write_report(tmp_path / "two.json", counted)
    assert f"| {report.operations[0].floor:.3f} |" in write_page(tmp_path, load_zoo())


def test_a_json_file_that_is_not_a_report_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"command": 3}')
    with pytest.raises(ValueError, match=r"x\.json is not a report"):
        write_page(tmp_path, load_zoo())


def test_memory_is_measured_in_a_new_process() -> None:
    # 512 MiB of this process, which must not be part of the result.
    ballast = torch.ones(2**27, dtype=torch.float32)
    peak = measure_memory(PLAN, "train", "boxwright")
    assert 50 * 2**20 < peak.start_rss < peak.peak_rss
    assert peak.peak_rss < memory.peak_rss() - 2**28
    assert ballast[-1] == 1


def test_the_error_of_a_failed_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no memory left >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(memory.sys, "executable", str(broken))
    with pytest.raises(RuntimeError, match="no memory left"):
        measure_memory(PLAN, "train", "boxwright")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peer": "torchvison"}, "did you mean 'torchvision'"),
        ({"peer": "detectron2"}, "set --peer-python to an interpreter that has detectron2"),
        ({"peer_python": "python3"}, "Remove --peer-python"),
        ({"peer": "", "peer_precision": "bfloat16"}, "Name it with --against"),
        ({"recipe": "fast_rcnn_r18_fpn_small"}, "no equivalent of fast_rcnn"),
        ({"weights": "missing.safetensors"}, "missing.safetensors: weights file not found"),
        ({"recipe": "faster"}, "there is no recipe 'faster'"),
    ],
)
def test_an_invalid_plan_is_rejected_before_the_first_measurement(changes: dict[str, Any], message: str) -> None:
    log: list[str] = []
    invalid = Plan(**({name: getattr(PLAN, name) for name in PLAN.__struct_fields__} | changes))
    with pytest.raises(ValueError, match=message):
        measure([PLAN, invalid], PHASES, command="", log=log.append)
    assert not log
