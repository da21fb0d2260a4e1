from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from boxwright import predictor
from boxwright.cli.main import app
from boxwright.recipes import find_recipe

COMMANDS = {
    "predict": ["street.jpg"],
    "test": ["--annotations", "boxes.json", "--images", "."],
    "propose": ["--annotations", "boxes.json", "--images", "."],
}


@pytest.mark.parametrize("precision", ["bfloat16", "float32", None])
@pytest.mark.parametrize("command", COMMANDS)
def test_precision_reaches_the_model(
    command: str, precision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, precision: str | None, **__: Any) -> NoReturn:
        raise ValueError(f"loaded in {precision}")

    monkeypatch.setattr(predictor, "load", load)
    monkeypatch.setattr(predictor, "weights_file", Path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "street.jpg").touch()
    option = [] if precision is None else ["--precision", precision]
    result = CliRunner().invoke(app, [command, "model", *COMMANDS[command], "--out", "out", *option])
    assert f"loaded in {precision}" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_precision_is_an_error(command: str) -> None:
    result = CliRunner().invoke(app, [command, "model", *COMMANDS[command], "--out", "out", "--precision", "half"])
    assert result.exit_code == 2
    assert "'bfloat16'" in result.output


def test_a_recipe_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `python -m`; only commands extend `sys.path`, `find_recipe` leaves it as it is."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes_of_this_folder.py").write_text("def small():\n    return 3\n")
    with pytest.raises(ValueError, match="no module 'recipes_of_this_folder'"):
        find_recipe("recipes_of_this_folder:small")
    assert str(tmp_path) not in sys.path
    result = CliRunner().invoke(app, ["train", "recipes_of_this_folder:small", "--show"])
    assert "recipes_of_this_folder:small is not a recipe: it returned int" in " ".join(result.output.split())
    monkeypatch.delitem(sys.modules, "recipes_of_this_folder")
