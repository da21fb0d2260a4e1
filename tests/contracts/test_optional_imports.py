"""Detectors, recipes and training steps are imported without the libraries that only data sets and reports need.

`python -m benchmarks.gpu` runs on machines that have PyTorch and little else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib, pkgutil, sys

OPTIONAL = {"hotcoco", "msgspec", "rich", "supervision", "tensorboard", "typer"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for name in ("boxwright.detectors", "boxwright.recipes", "boxwright.training"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
for name in ("boxwright.data.loader", "benchmarks.gpu.__main__"):
    importlib.import_module(name)
"""


def test_training_is_imported_without_optional_libraries() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    process = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
