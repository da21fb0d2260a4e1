"""The errors on the FAQ page are those that the commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from boxwright.cli.main import app
from boxwright.training.parts import from_json

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faq.md"
RECIPE = "faster_rcnn_r18_fpn_small"


def quoted() -> list[str]:
    """The text blocks of the page."""
    return re.findall(r"^```text\n(.*?)\n```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def require_quoted(message: str) -> None:
    """Check that a block of the page quotes a message; the block may end in `...`."""
    message = " ".join(message.split())
    for block in quoted():
        start, dots, _ = " ".join(block.split()).partition("...")
        if message == start or (dots and message.startswith(start.rstrip())):
            return
    pytest.fail(f"docs/faq.md does not quote: {message}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a folder of images only, and a run that has a checkpoint."""
    folder = tmp_path_factory.mktemp("faq")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert CliRunner().invoke(app, ["data", "shapes", "mydata", "--train", "2", "--val", "1"]).exit_code == 0
    (folder / "images").mkdir()
    (folder / "runs" / "mine" / "checkpoints" / "step_1").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["train", RECIPE, "--data", "images"],
        ["train", "faster_rcn_r50", "--data", "mydata"],
        ["train", RECIPE, "--data", "mydata", "--set", "optimizer.learning_rate=0.1"],
        ["train", RECIPE, "--data", "mydata", "--out", "runs/mine"],
        ["train", "fast_rcnn_r18_fpn_small", "--data", "mydata"],
        ["predict", "runs/nothing", "street.jpg", "--out", "predictions"],
        ["predict", "runs/nothing", "street.jpg", "--out", "predictions", "--device", "cuda"],
    ],
    ids=["format", "recipe", "setting", "run", "proposals", "model", "cuda"],
)
def test_error_is_quoted(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    require_quoted(result.output[result.output.index("boxwright: ") :])


def test_error_of_an_untrusted_module_is_quoted() -> None:
    with pytest.raises(ValueError, match="trust") as error:
        from_json({"call": "my_models.MyHead", "arguments": {}}, ())
    require_quoted(str(error.value))
