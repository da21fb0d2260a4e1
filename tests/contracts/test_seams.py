"""Code outside `detectors` and `heads` reads attributes of the protocol instead of checking types."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from torch import nn

from boxwright.detectors.detector import Detector

SOURCE = Path(__file__).resolve().parents[2] / "src"
PACKAGE = SOURCE / "boxwright"
ATTRIBUTES = {name for name in vars(Detector) if not name.startswith("_")} | set(Detector.__annotations__)
FREE = ("detectors", "heads")
"""Folders that may check types: they define the detectors and heads."""
CHECKED = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in FREE]


def kinds_imported(tree: ast.AST) -> set[str]:
    """Return the names in a file that are bound to Boxwright's detector or head classes."""
    kinds = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith(("boxwright.detectors", "boxwright.heads"))
        ):
            module = importlib.import_module(node.module)
            for alias in node.names:
                value = getattr(module, alias.name, None)
                if isinstance(value, type) and issubclass(value, nn.Module):
                    kinds.add(alias.asname or alias.name)
    return kinds


def faults(source: str) -> list[str]:
    """List the lines that check a detector or head type, or read a protocol attribute with getattr or hasattr."""
    tree = ast.parse(source)
    kinds, faults_found = kinds_imported(tree), []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id in ("isinstance", "issubclass"):
            names = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            faults_found += [f"line {node.lineno}: type check against {name}" for name in sorted(names & kinds)]
        if node.func.id in ("getattr", "hasattr"):
            names = {name.value for name in node.args[1:2] if isinstance(name, ast.Constant)}
            faults_found += [f"line {node.lineno}: getattr or hasattr of {name}" for name in sorted(names & ATTRIBUTES)]
    return faults_found


@pytest.mark.parametrize("file", CHECKED, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_checks_the_type_of_a_detector_or_head(file: Path) -> None:
    assert not faults(file.read_text("utf-8")), (
        "declare the attribute on Detector (or on the head) and read it directly"
    )


def test_protocol_has_the_expected_attributes() -> None:
    required = {"num_classes", "max_detections", "losses", "detect"}
    assert required | {"needs_masks", "needs_proposals", "class_agnostic", "suppression"} == ATTRIBUTES


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from boxwright.heads.rpn_head import RPNHead\nisinstance(x, (RPNHead, int))", 1),
        ("from boxwright.detectors.proposal_network import ProposalNetwork as P\nisinstance(x, P)", 1),
        ("def f():\n    from boxwright.detectors.rcnn import RCNN\n    return issubclass(type(x), RCNN)", 1),
        ("getattr(detector, 'needs_masks', False)", 1),
        ("hasattr(detector, 'suppression')", 1),
        ("from torchvision.models.detection import RetinaNet\nisinstance(x, RetinaNet)", 0),
        ("from boxwright.heads.rpn_head import RPNConfig\nisinstance(x, RPNConfig)\ngetattr(x, 'image_ids', None)", 0),
    ],
)
def test_type_checks_are_detected(source: str, count: int) -> None:
    assert len(faults(source)) == count
