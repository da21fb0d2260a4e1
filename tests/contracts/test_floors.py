"""A file imports only from lower layers ("floors") of the package, so the package can be read bottom-up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "boxwright"
FLOORS = [
    {"text"},
    {"checks"},
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
    """Return the folders and top-level modules of the package that a file imports, including local imports."""
    imports = set()
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
                imports.add(parts[1])
    return imports


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_from_floors_below(file: Path) -> None:
    part = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if part in ("__init__", "__main__"):
        return
    assert part in HEIGHT, f"{part} has no floor: add it to FLOORS in this file and to the design page"
    above = {name for name in imports_of(file) if name != part and HEIGHT[name] >= HEIGHT[part]}
    assert not above, f"{file.name} imports {sorted(above)}, which are not below its floor"
