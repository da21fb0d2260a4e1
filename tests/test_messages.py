"""Every text that a user can see is listed in `messages.txt`, so that a review sees each change of wording.

The texts are read from the source: arguments of raised exceptions, warnings, faults of data sets, log lines, and the
help of commands and options. `python tests/test_messages.py --write` updates the list.

    error | {path}: expected {count} rows, got {len(rows)}
    error |   {hint} = a text that another message contains
"""

from __future__ import annotations

import ast
import difflib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "boxwright"
SNAPSHOT = Path(__file__).with_name("messages.txt")
COMMAND = "python tests/test_messages.py --write"

KIND_OF_CALL = {
    "Fault": "fault",
    "_add_fault": "fault",
    "_add_annotation_fault": "fault",
    "NoMatch": "error",
    "Unsupported": "error",
    "warn": "warning",
    "Option": "help",
    "Argument": "help",
    "Typer": "help",
    "echo": "log",
    "print": "log",
    "log": "log",
    "log_line": "log",
    "add_task": "log",
    "ImageProgress": "log",
}
"""Kind of message of each callable that takes one, by the last part of its name. Exceptions end with "Error"."""
HELP_ARGUMENTS = ("help", "show_default")
"""Arguments of typer that are texts; the others are names."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """Texts in one source file. `texts` returns every text that an expression can have."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, Function)}
        self.assigned = {scope: _assignments(scope) for scope in (tree, *self.functions.values())}

    def messages(self) -> Iterator[tuple[str, str]]:
        """Kind and text of each message."""
        for scope in (self.tree, *self.functions.values()):
            raised = [node.exc for node in _nodes(scope) if isinstance(node, ast.Raise) and node.exc is not None]
            calls = [node for node in _nodes(scope) if isinstance(node, ast.Call)]
            for call in calls:
                kind = "error" if call in raised else _kind(call)
                if kind is None:
                    continue
                arguments = [*call.args, *(word.value for word in call.keywords)]
                if kind == "help":
                    arguments = [word.value for word in call.keywords if word.arg in HELP_ARGUMENTS]
                for argument in arguments:
                    for text in self.texts(argument, scope):
                        yield kind, text
                    for name, text in self.parts(argument, scope):
                        yield kind, f"  {{{name}}} = {text}"
            if isinstance(scope, Function) and _is_command(scope):
                for paragraph in (ast.get_docstring(scope) or "").split("\n\n"):
                    yield "help", " ".join(paragraph.split())

    def texts(self, node: ast.expr, scope: ast.AST, seen: tuple[str, ...] = ()) -> list[str]:
        """Texts that `node` can have in `scope`, with fields in braces; empty if it is not a text."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            return ["".join(_piece(value) for value in node.values)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = (self.texts(side, scope, seen) for side in (node.left, node.right))
            return [a + b for a, b in itertools.product(left or [_field(node.left)], right or [_field(node.right)])]
        if isinstance(node, ast.IfExp):
            return [*self.texts(node.body, scope, seen), *self.texts(node.orelse, scope, seen)]
        if isinstance(node, ast.BoolOp):
            return [text for value in node.values for text in self.texts(value, scope, seen)]
        if isinstance(node, ast.Name) and node.id not in seen:
            values = self.assigned[scope].get(node.id) or self.assigned[self.tree].get(node.id, [])
            return [text for value in values for text in self.texts(value, scope, (*seen, node.id))]
        if isinstance(node, ast.Call):
            return self._texts_of_call(node, scope, seen)
        return []

    def _texts_of_call(self, node: ast.Call, scope: ast.AST, seen: tuple[str, ...]) -> list[str]:
        name = _last_name(node.func)
        if name == "plural":
            return [_piece(node)]
        if name == "join":
            return []
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Constant | ast.JoinedStr):
            return self.texts(node.func.value, scope, seen)  # "...".format(...)
        function = self.functions.get(name)
        if function is None or function.name in seen or "str" not in ast.unparse(function.returns or node):
            return []
        returned = [n.value for n in _nodes(function) if isinstance(n, ast.Return) and n.value is not None]
        return [text for value in returned for text in self.texts(value, function, (*seen, function.name))]

    def parts(self, node: ast.expr, scope: ast.AST) -> Iterator[tuple[str, str]]:
        """Name and text of each variable and function that is a field of a message."""
        values = [node]
        if isinstance(node, ast.Name):
            values = self.assigned[scope].get(node.id, [])
        nodes = [inner for value in values for inner in ast.walk(value)]
        fields = [node.value for node in nodes if isinstance(node, ast.FormattedValue)]
        joins = [node for node in nodes if isinstance(node, ast.Call) and _last_name(node) == "join"]
        for field in [*fields, *joins]:
            part = field.args[0] if field in joins else field
            if isinstance(part, ast.Name | ast.Call) and _last_name(part) != "plural":
                for text in self.texts(part, scope):
                    if " " in text.strip():
                        yield _field(field).strip("{}"), text


def _nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a scope in source order, without the functions inside it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, Function):
            yield child
            yield from _nodes(child)
        elif isinstance(scope, ast.Module | ast.ClassDef | Function):
            yield from (node for default in child.decorator_list for node in ast.walk(default))


def _assignments(scope: ast.AST) -> dict[str, list[ast.expr]]:
    """Values that are assigned to each name, or appended to the list of this name."""
    values: dict[str, list[ast.expr]] = {}
    for node in _nodes(scope):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
            targets, value = [node.func.value], node.args[0]
        for target in targets if value is not None else ():
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=False))
            for name, part in pairs:
                if isinstance(name, ast.Name):
                    values.setdefault(name.id, []).append(part)
    return values


def _kind(call: ast.Call) -> str | None:
    name = _last_name(call.func)
    if name.endswith("Error"):
        return "error"
    if name in ("info", "warning", "error") and isinstance(call.func, ast.Attribute):
        return "log"
    return KIND_OF_CALL.get(name)


def _is_command(function: Function) -> bool:
    """Whether the docstring of a function is the help of a command."""
    decorators = map(ast.unparse, function.decorator_list)
    return any(".command(" in text for text in decorators) or "typer." in ast.unparse(function.args)


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.IfExp):
        node = node.body
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _piece(node: ast.expr) -> str:
    """Text of a part of an f-string."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        conversion = "" if node.conversion == -1 else f"!{chr(node.conversion)}"
        form = "" if node.format_spec is None else f":{_piece(node.format_spec)}"
        field = _piece(node.value)
        return f"{field[:-1]}{conversion}{form}}}" if field.endswith("}") else field
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_piece, node.values))
    if isinstance(node, ast.Call) and _last_name(node) == "plural":
        noun = node.args[-1].value if isinstance(node.args[-1], ast.Constant) else _field(node.args[-1])
        return f"{_field(node.args[0])} {noun}{'s' * (len(node.args) == 2)}"
    return _field(node)


def _field(node: ast.expr) -> str:
    return f"{{{_name(node)}}}"


def _name(node: ast.expr) -> str:
    """Short name of an expression, which is the same in all versions of Python."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, ast.Attribute):
        owner = _name(node.value)
        return node.attr if owner == "self" else f"{owner}.{node.attr}"
    if isinstance(node, ast.Subscript):
        return f"{_name(node.value)}[{_name(node.slice)}]"
    if isinstance(node, ast.Starred):
        return _name(node.value)
    if isinstance(node, ast.IfExp):
        sides = [_piece(side) if isinstance(side, ast.Constant) else _name(side) for side in (node.body, node.orelse)]
        return " or ".join(side or "nothing" for side in sides)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        return f"list of {_name(node.args[0])}"
    if isinstance(node, ast.Call) and len(node.args) == 1 and _last_name(node) in ("sorted", "str", "repr", "int"):
        return _name(node.args[0])
    if isinstance(node, ast.Call) and _last_name(node) == "map":
        return _name(node.args[-1])
    if isinstance(node, ast.GeneratorExp | ast.ListComp):
        return _name(node.generators[0].iter)
    if isinstance(node, ast.Call):
        return f"{_name(node.func)}({', '.join(map(_name, node.args))})"
    return "..."


def messages_of(source: str) -> list[str]:
    """Messages of a source file, sorted, one line each."""
    lines = {
        f"{kind:7} | {text.rstrip()}".replace("\n", "\\n")
        for kind, text in Module(ast.parse(source)).messages()
        if re.search(r"[A-Za-z]{2}", re.sub(r"\{.*?\}", "", text))
    }
    return sorted(lines)


def snapshot() -> str:
    """Messages of the package, grouped by file."""
    groups = {
        file.relative_to(PACKAGE).as_posix(): messages_of(file.read_text("utf-8"))
        for file in sorted(PACKAGE.rglob("*.py"))
    }
    return "\n".join(
        f"{name}\n" + "".join(f"    {line}\n" for line in lines) for name, lines in groups.items() if lines
    )


def check_snapshot(expected: str, actual: str) -> None:
    """Fail with a diff and the command that writes the list, if the messages changed."""
    if actual != expected:
        diff = difflib.unified_diff(expected.splitlines(), actual.splitlines(), "messages.txt", "src", lineterm="", n=0)
        pytest.fail("\n".join([f"Messages changed. Review the changes, then run: {COMMAND}", *diff]), pytrace=False)


def test_messages_equal_the_list() -> None:
    check_snapshot(SNAPSHOT.read_text("utf-8"), snapshot())


def test_a_changed_message_fails_with_a_diff_and_the_command() -> None:
    with pytest.raises(pytest.fail.Exception) as caught:
        check_snapshot(
            "hub.py\n    error | no file\n    log | done\n", "hub.py\n    error | no folder\n    log | done\n"
        )
    lines = str(caught.value).splitlines()
    assert COMMAND in lines[0]
    assert {"-    error | no file", "+    error | no folder"} <= set(lines)
    assert not any("done" in line for line in lines)


SOURCE = '''
HINT = "Use a file."

def read(path, count):
    message = f"{path}: {plural(count, 'image')}" if count else "no images"
    reasons = []
    reasons.append(f"{path} is a folder")
    log(f"read {count:,} " + "rows")
    warnings.warn("old file", DeprecationWarning)
    if reasons:
        raise ValueError(f"cannot read: {', '.join(reasons)}. {HINT}")
    raise OSError(message)

@app.command()
def check(folder: Annotated[str, typer.Option("--folder", help="Folder to check.", metavar="DIR NAME")]):
    """Check a folder.

    Prints all
    faults.
    """
'''


def test_messages_are_found_in_the_source() -> None:
    assert [" ".join(line.split()) for line in messages_of(SOURCE)] == [
        "error | {HINT} = Use a file.",
        "error | {list of reasons} = {path} is a folder",
        "error | cannot read: {list of reasons}. {HINT}",
        "error | no images",
        "error | {path}: {count} images",
        "help | Check a folder.",
        "help | Folder to check.",
        "help | Prints all faults.",
        "log | read {count:,} rows",
        "warning | old file",
    ]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {COMMAND}")
    SNAPSHOT.write_text(snapshot(), "utf-8")
