"""Every benchmark can be started: what it takes from the package is there."""

import importlib
import pkgutil
from functools import partial

import pytest
import torch

import benchmarks
from benchmarks import compile as compile_benchmark

SCRIPTS = [
    module.name
    for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    # They start at once where they are imported; of peers, an interpreter that has the peer imports them.
    if not module.name.endswith("__main__") and not module.name.startswith("benchmarks.peers")
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(name: str) -> None:
    importlib.import_module(name)


def test_compile_tells_steps_and_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_benchmark.main(["retinanet_r18_fpn_small", "--size", "64x64"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["step 1", "step 2", "step 3"]
    assert "'unique_graphs': 1" in lines[3]
    assert lines[4] == "graph_break: {}"
