"""The public names are importable from the top, are shown by `dir`, and cost nothing until they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import boxwright


@pytest.mark.parametrize("name", [name for name in boxwright.__all__ if name != "__version__"])
def test_public_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(boxwright, name)
    assert value.__name__ == name
    assert value.__module__.startswith("boxwright.")


def test_dir_shows_the_public_names() -> None:
    assert {"load", "Predictor", "train", "Experiment", "Detector", "Batch", "Targets", "Detections"} <= set(
        dir(boxwright)
    )
    assert dir(boxwright) == sorted(boxwright.__all__)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(boxwright.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {(node.names[0].asname, node.module) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert imported == set(boxwright._MODULES.items())


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = boxwright.nothing  # type: ignore[attr-defined]


def test_help_does_not_import_torch() -> None:
    code = "import sys, boxwright.cli.main, boxwright; dir(boxwright); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
