"""No source file has more than 350 lines, and no function more than 12 parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "boxwright"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 350
MAX_PARAMETERS = 12
EXCEPTIONS = {
    # Typer commands: each parameter is a command-line option.
    ("cli/benchmark.py", "benchmark"),
    ("cli/test.py", "measure"),
    ("cli/train.py", "train"),
    # Triton kernels take every pointer, stride and block size as a separate argument.
    ("ops/roi_align_triton.py", "_pool_kernel"),
    ("ops/roi_align_triton.py", "_backward_kernel"),
    # Recipes and weights files of all versions refer to its parameters by name.
    ("backbones/fpn.py", "resnet_fpn"),
}


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield name and parameter count, without `self` and `cls`, of each function with too many parameters."""
    tree = ast.parse(source)
    methods = {node for kind in ast.walk(tree) if isinstance(kind, ast.ClassDef) for node in kind.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
            arguments = node.args
            count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
            count -= node in methods and not static
            if count > MAX_PARAMETERS:
                yield node.name, count


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_is_too_long(file: Path) -> None:
    num_lines = len(file.read_text("utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{file.name} has {num_lines} lines: split it by topic"


def test_no_function_has_too_many_parameters() -> None:
    exceeding = {
        (file.relative_to(PACKAGE).as_posix(), name)
        for file in FILES
        for name, _ in long_functions(file.read_text("utf-8"))
    }
    assert exceeding == EXCEPTIONS, "group the parameters in a dataclass; remove exceptions that are no longer needed"


@pytest.mark.parametrize(
    ("signature", "count"),
    [
        ("def f(" + ", ".join(f"a{i}" for i in range(12)) + "): ...", None),
        ("def f(a0, /, " + ", ".join(f"a{i}" for i in range(1, 7)) + ", *, " + "b1, b2, b3, b4, b5, b6): ...", 13),
        ("class C:\n    def f(self, " + ", ".join(f"a{i}" for i in range(12)) + "): ...", None),
        ("class C:\n    @staticmethod\n    def f(" + ", ".join(f"a{i}" for i in range(13)) + "): ...", 13),
    ],
)
def test_parameters_are_counted(signature: str, count: int | None) -> None:
    assert dict(long_functions(signature)) == ({} if count is None else {"f": count})
