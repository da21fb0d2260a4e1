"""The pages build as a site: no warning, no broken link, searchable without a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings, among them links and anchors that do not exist, fail the build."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(out / "doctrees"), "-b", "html"]
    done = subprocess.run([*command, str(ROOT / "docs"), str(out / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    navigation = (site / "index.html").read_text("utf-8")
    pages = set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "benchmarks" / "measured" / "README.md"}
    for page in sorted(pages):
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / name).is_file(), name
        assert name == "index.html" or f'href="{name}"' in navigation, f"{name} is not in a toctree of index.md"


def test_search_works_without_a_server(site: Path) -> None:
    index = (site / "searchindex.js").read_text("utf-8")
    assert index.startswith("Search.setIndex(")
    assert "nms" in index


def test_the_reference_shows_shapes_and_errors(site: Path) -> None:
    reference = (site / "reference" / "python.html").read_text("utf-8")
    assert "boxwright.Predictor" in reference
    assert "Raises" in reference
