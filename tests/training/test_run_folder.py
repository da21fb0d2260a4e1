from __future__ import annotations

from pathlib import Path

import pytest

from boxwright.training.run_folder import require_same


def test_changed_fields_have_the_names_of_the_set_option() -> None:
    before = {
        "call": "a.Experiment",
        "arguments": {"model": {"call": "a.m", "arguments": {"depth": 50}}, "at": [8, 11]},
    }
    after = {"call": "a.Experiment", "arguments": {"model": {"call": "a.m", "arguments": {"depth": 101}}, "at": [8]}}
    require_same(before, before, Path("run"))
    with pytest.raises(ValueError, match=r"at\[1\]: 11 -> 'missing'; model.depth: 50 -> 101"):
        require_same(before, after, Path("run"))
