"""Items that work, fail, end their process or hang. The worker imports this file, so that it imports little itself."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any


def works() -> Iterator[dict[str, Any]]:
    yield {"operators": [{"name": "first", "seconds": {"a": [1.0]}}]}
    yield {"operators": [{"name": "second", "seconds": {"a": [2.0]}}]}


def fails() -> Iterator[dict[str, Any]]:
    yield {"before": 1.0}
    raise RuntimeError("broken | here")


def dies() -> Iterator[dict[str, Any]]:
    yield {"before": 2.0}
    os._exit(3)


def hangs() -> Iterator[dict[str, Any]]:
    yield {"process": os.getpid(), "child": subprocess.Popen(["sleep", "600"]).pid}
    time.sleep(600)
