"""`python -m boxwright` is `boxwright`, which is what torchrun needs."""

from __future__ import annotations

from boxwright.cli.main import app

app()
