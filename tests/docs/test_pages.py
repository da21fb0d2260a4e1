"""Every Python block and every command on the pages runs, on small data.

The blocks of a page run in order, in a folder of their own, and share one Python namespace. The folder starts with:

- `shapes/`, a small generated data set, and `mydata`, a link to it,
- `images/` and `street.jpg`, images of its validation split,
- `runs/mine` and `runs/mine_masks`, a Faster R-CNN and a Mask R-CNN trained on it for one epoch.

A Python block whose first line is `# NAME.py` is written to that file instead, and later blocks import it or run it.
`boxwright train` is shortened (tiny images, few steps), and `boxwright data shapes` generates few images. A block that
needs a GPU, the network or COCO is preceded by `<!-- skip: next "reason" -->`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from filelock import FileLock
from PIL import Image
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from typer.testing import CliRunner

from boxwright.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

SHORT_TRAINING = [
    *("resize.short=64", "resize.long=64", "scale_jitter=none", "epochs=1", "images_per_device=2"),
    *("schedule.warmup_steps=2", "evaluate_every=1"),
]
"""Settings that shorten the training of every recipe to a few seconds."""

FEW_IMAGES = ["--train", "24", "--val", "8"]
"""Options of `boxwright data shapes` for a data set that trains in a few seconds."""

REASONS = ("needs a GPU", "needs the network", "needs COCO", "needs several machines", "installs packages", "runs long")
"""Reasons for which a block may be skipped; the comment may say more behind a colon."""


def run_commands(example: Example) -> None:
    """Run the lines of a bash block. `boxwright` runs in this process, everything else in bash."""
    text = example.parsed.replace("\\\n", " ")
    for line in filter(None, (line.strip() for line in text.splitlines())):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[:3] == ["python", "-m", "boxwright"]:
            words = ["boxwright", *words[3:]]
        if words[0] == "boxwright" and not re.search(r"[|&<>;$*]", line):
            run_boxwright(words[1:])
            continue
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def run_boxwright(words: list[str]) -> None:
    """Run a command of the command line in this process; the page fails if the command fails."""
    if words[0] == "train" and "--show" not in words and "--help" not in words:
        words = [*words, *(word for setting in SHORT_TRAINING for word in ("--set", setting))]
    if words[:2] == ["data", "shapes"]:
        words = [*words, *FEW_IMAGES]
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"boxwright {shlex.join(words)}\n{result.output}"


class FileOrPython(PythonEvaluator):
    """Write a Python block whose first line is `# NAME.py` to that file, and execute any other block."""

    def __call__(self, example: Example) -> None:
        name = re.match(r"# (\w+\.py)\n", example.parsed)
        if name is None:
            super().__call__(example)
        else:
            Path(name[1]).write_text(example.parsed, "utf-8")


PARSERS = (
    CodeBlockParser(language="python", evaluator=FileOrPython()),
    CodeBlockParser(language="bash", evaluator=run_commands),
    SkipParser(),
)


def run_page(page: Path) -> None:
    """Run all blocks of a page in the current folder."""
    for example in Document.parse(str(page), *PARSERS).examples():
        reason = reason_to_skip(example)
        assert reason is None or reason.startswith(REASONS), f"{page.name}: {reason!r} is not one of {REASONS}"


def reason_to_skip(example: Example) -> str | None:
    """Run a block. Return None, or the reason for which the page asks to skip it."""
    try:
        example.evaluate()
    except SkipTest as skip:
        return str(skip)
    return None


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder that each page starts with a copy of; all processes of a test run share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "pages"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        if folder.is_dir():
            return folder
        building = folder.with_name("pages_building")
        building.mkdir()
        patch.chdir(building)
        run_boxwright(["data", "shapes", "shapes"])
        Path("images").mkdir()
        for path in sorted(Path("shapes/val").iterdir())[:4]:
            with Image.open(path) as image:
                image.save(f"images/{path.stem}.jpg")
        shutil.copy(next(Path("images").iterdir()), "street.jpg")
        for recipe, run in (("faster_rcnn_r18_fpn_small", "mine"), ("mask_rcnn_r18_fpn_small", "mine_masks")):
            run_boxwright(["train", recipe, "--data", "shapes", "--out", f"runs/{run}"])
        building.rename(folder)
    return folder


@pytest.fixture
def page_folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mydata").symlink_to("shapes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_the_page_run(page: Path, page_folder: Path) -> None:
    modules = set(sys.modules)
    try:
        with torch.random.fork_rng(devices=[]):
            run_page(page)
    finally:
        for name in set(sys.modules) - modules:  # modules that the page wrote; another page may use the same name
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(page_folder)):
                del sys.modules[name]


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert False\n```",
        "```bash\nboxwright no-such-command\n```",
        "```bash\nfalse\n```",
        '<!-- skip: next "because I like" -->\n\n```bash\nfalse\n```',
    ],
)
def test_a_block_that_fails_is_found(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, "utf-8")
    with pytest.raises(AssertionError):
        run_page(page)
