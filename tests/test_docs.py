"""The pages keep to what is there: links, commands, imports and recipes on them exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from boxwright.cli.main import app
from boxwright.recipes import built_in_recipes, find_recipe
from boxwright.training.experiment import build
from boxwright.training.settings import with_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and text of each fenced block."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: each heading, as GitHub writes it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `boxwright ...` in fenced blocks and in inline code."""
    lines = [line for language, text in blocks(page) if language not in ("python", "text") for line in _joined(text)]
    lines += re.findall(r"`(boxwright [a-z][^`]*)`", prose(page).replace("\n", " "))
    all_words = []
    for line in lines:
        words = shlex.split(line, comments=True)
        for start in range(len(words)):
            if Path(words[start]).name == "boxwright" and (start == 0 or words[start - 1] == "-m"):
                all_words.append(words[start + 1 :])
                break
    return all_words


def _joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters of the sub-command that the words call.

    Raises:
        ValueError: they call none, or not so.
    """
    command: Any = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in command.commands:
            raise ValueError(f"there is no command {name!r}")
        command = command.commands[name]
    try:
        return command.make_context(command.name, words).params
    except Exception as error:
        # click's, or that of the click that newer versions of typer carry inside.
        if not hasattr(error, "format_message"):
            raise
        raise ValueError(error.format_message()) from error


def names_a_command(words: list[str]) -> bool:
    """Whether the words are a command's name without arguments, as in a sentence."""
    command: Any = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return False
    return True


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: there is no such heading"


@every_page
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        if names_a_command(words) or words in (["--help"], ["--version"]):
            continue
        try:
            parameters = parse(words)
            recipe = parameters.get("recipe", "")
            if recipe.islower() and ":" not in recipe:  # neither RECIPE nor the reader's own
                with_settings(find_recipe(recipe)(), parameters["settings"] or [])
        except ValueError as error:
            pytest.fail(f"{page.name}: boxwright {shlex.join(words)}: {error}")


@every_page
def test_python_parses_and_imports_what_is_there(page: Path) -> None:
    for language, text in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("boxwright"):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{page.name}: {node.module} has no {missing}"


def test_models_page_has_each_recipe_once_with_its_parameters() -> None:
    page = (ROOT / "docs" / "model_zoo" / "models.md").read_text("utf-8")
    rows = [re.findall(r"`(\w+_fpn_\w+)`|(?<=\| )(\d+\.\d\d)(?= \|)", line) for line in page.splitlines()]
    stated = {row[0][0]: [float(number) for _, number in row[1:]] for row in rows if row and row[0][0]}
    recipes = built_in_recipes()
    assert sorted(stated) == sorted(recipes), "docs/model_zoo/models.md has a row for each recipe and no other"
    for name, recipe in recipes.items():
        with torch.device("meta"):
            parameters = list(build(recipe().model, num_classes=80).parameters())
        counts = [sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)]
        expected = [round(count / 1e6, 2) for count in counts]
        assert stated[name][0] == expected[0], name
        if "_r18_" not in name:
            assert stated[name][1] == expected[1], name


def test_mistakes_on_a_page_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`boxwright data`\n```\n$ x\npython -m boxwright train \\\n  a --no-such b  # why\n```\n", "utf-8")
    assert commands(page) == [["train", "a", "--no-such", "b"], ["data"]]
    assert names_a_command(["data", "shapes"])
    assert not names_a_command(["data", "no_such"])
    for words in (["train", "a", "--no-such", "b"], ["no_such"], ["train"], ["data", "shapes", "x", "--train", "none"]):
        with pytest.raises(ValueError):
            parse(words)
