"""A file imports only from floors below its own, so that the house can be read from the ground up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "boxwright"
FLOORS = [
    {"checks", "text"},
    {"structures", "geometry", "cache", "precision", "distributed"},
    {"weights"},
    {"data"},
    {"ops"},
    {"losses"},
    {"layers"},
    {"backbones"},
    {"assign"},
    {"heads"},
    {"detectors"},
    {"evaluation"},
    {"training"},
    {"importers"},
    {"zoo"},
    {"report"},
    {"predictor"},
    {"recipes"},
    {"publish", "hub", "benchmark"},
    {"cli"},
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}


def imports_of(file: Path) -> set[str]:
    """The folders and top-level files of the package that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "boxwright" and len(parts) > 1 and parts[1] != "__version__":
                found.add(parts[1])
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_from_floors_below(file: Path) -> None:
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if own in ("__init__", "__main__"):
        return
    assert own in HEIGHT, f"{own} stands on no floor: add it to FLOORS here and to the design"
    above = {name for name in imports_of(file) if name != own and HEIGHT[name] >= HEIGHT[own]}
    assert not above, f"{file.name} imports {sorted(above)}, which stand on its own floor or above"
