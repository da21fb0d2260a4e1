"""Proposals of an RPN are written to a file, and a Fast R-CNN is trained and tested on them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from boxwright.cli.main import app
from boxwright.data.buckets import Resize
from boxwright.data.dataset import Category
from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.proposals import ProposalFile
from boxwright.data.shapes import write_shapes
from boxwright.detectors.rcnn import fast_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.recipes.common import small
from boxwright.training.experiment import Experiment
from small_model import BACKBONE, small_run

SHAPES = [Category(id=1, name="circle"), Category(id=2, name="square"), Category(id=3, name="triangle")]
FAST = "cli.test_propose:fast"


def fast() -> Experiment:
    """A Fast R-CNN with few parameters."""
    model = partial(fast_rcnn, backbone=BACKBONE, box=BoxConfig(width=32, num_sampled=16, score_threshold=0.0))
    return replace(small(model), resize=Resize(short=96, long=160), epochs=1)


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in `data`, an RPN in `rpn` and its proposals of both splits in `proposals`."""
    folder = tmp_path_factory.mktemp("propose")
    write_shapes(folder / "data", train=8, val=5)
    small_run(folder / "rpn", SHAPES, proposals=True)
    status, output = run(*command(folder), "--out", folder / "proposals")
    assert status == 0, output
    (folder / "output").write_text(output)
    return folder


def command(folder: Path) -> list[str | Path]:
    return ["propose", folder / "rpn", "--data", folder / "data", "--workers", "0", "--device", "cpu"]


def test_both_splits_are_written_and_measured(folder: Path) -> None:
    output = (folder / "output").read_text()
    assert len(re.findall(r"^AR@100 ", output, re.MULTILINE)) == 2
    assert re.search(r"proposals: [\d,]+ proposals for 13 images \(train, val\)", output)
    layout = find_layout(folder / "data")
    for name in ("train", "val"):
        dataset = IndexedDataset(*layout[name])
        file = ProposalFile(folder / "proposals", split=name)
        file.require(dataset.image_ids)
        for image_id, size in zip(dataset.image_ids.tolist(), dataset.image_sizes.tolist(), strict=True):
            assert len(file.of(image_id, size).boxes) > 10
    metadata = file.page
    assert [split["name"] for split in metadata["splits"]] == ["train", "val"]
    assert re.fullmatch("[0-9a-f]{64}", metadata["sha256"])


def test_recall_equals_that_of_boxwright_test(folder: Path) -> None:
    status, output = run(
        "test",
        folder / "rpn",
        "--data",
        folder / "data",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--out",
        folder / "tested",
    )
    assert status == 0, output
    tested = re.search(r"^AR@100 +([\d.]+)", output, re.MULTILINE)[1]
    proposed = re.findall(r"^AR@100 +([\d.]+)", (folder / "output").read_text(), re.MULTILINE)[1]
    assert float(proposed) == pytest.approx(float(tested), abs=0.11)


def test_a_fast_rcnn_is_trained_and_tested_on_them(folder: Path) -> None:
    data = ["--data", folder / "data", "--workers", "0", "--device", "cpu"]
    out = folder / "fast"
    status, output = run("train", FAST, *data, "--out", out, "--proposals", folder / "proposals")
    assert status == 0, output
    assert "AP50" in output
    options = ["--trust", "cli", "--proposals", folder / "proposals"]
    status, output = run("test", out, *data, *options, "--out", folder / "fast_tested")
    assert status == 0, output
    assert "AP50" in output
    assert (folder / "fast_tested" / "report.html").is_file()
    status, output = run("predict", out, folder / "data" / "val", "--trust", "cli", "--out", folder / "fast_detections")
    assert status == 1
    assert "has no RPN and needs proposals" in output
    assert not (folder / "fast_detections").exists()


def test_two_ranks_write_the_same_file_as_one(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "boxwright", *map(str, command(folder)), "--batch-size", "4"]
    ranks = [
        subprocess.Popen(
            [*words, "--out", str(tmp_path / "both")],
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert re.findall(r"^AR.*", outputs[0], re.MULTILINE) == re.findall(
        r"^AR.*", (folder / "output").read_text(), re.MULTILINE
    )
    one, two = load_file(folder / "proposals"), load_file(tmp_path / "both")
    assert one["image_ids"].tolist() == two["image_ids"].tolist()
    assert one["offsets"].tolist() == two["offsets"].tolist()
    np.testing.assert_allclose(one["boxes"], two["boxes"], atol=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["both"]


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    data = ["--data", folder / "data", "--workers", "0", "--device", "cpu"]
    proposals = folder / "proposals"
    other = small_run(tmp_path / "faster", SHAPES)
    only_val = tmp_path / "val"
    assert run(*command(folder), "--split", "val", "--out", only_val)[0] == 0
    cases: list[tuple[list[str | Path], str]] = [
        (["propose", other, *data, "--out", tmp_path / "x"], "is not an RPN"),
        ([*command(folder), "--split", "test", "--out", tmp_path / "x"], "has no split 'test'; it has train, val"),
        (["propose", folder / "rpn", "--out", tmp_path / "x"], "use either --data FOLDER"),
        (["test", other, *data, "--proposals", proposals], "this model has its own RPN"),
        (["train", FAST, *data, "--out", tmp_path / "x"], "Write them with boxwright propose"),
        (["train", FAST, *data, "--out", tmp_path / "x", "--proposals", tmp_path / "none"], "none: No such file"),
        ([*command(folder), "--out", folder], "is a folder. Use the path of a file"),
        ([*command(folder), "--out", proposals / "x"], "x cannot be written: "),
        (["test", folder / "rpn", *data, "--tta"], "--tta: .*rpn is an RPN"),
        (["test", tmp_path / "none", *data], "none does not exist"),
    ]
    for words, message in cases:
        status, output = run(*words)
        assert status == 1, output
        assert re.search(message, output.splitlines()[-1]), output
    assert not (tmp_path / "x").exists()


def test_proposals_of_other_images_are_an_error_with_an_example(folder: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "more", train=9, val=5)
    words = ["--data", tmp_path / "more", "--workers", "0", "--device", "cpu", "--out", tmp_path / "x"]
    status, output = run("train", FAST, *words, "--proposals", folder / "proposals")
    assert status == 1
    assert re.search(r"no proposals for \d+ of 9 images \(for example image id \d+\)", output.splitlines()[-1])
