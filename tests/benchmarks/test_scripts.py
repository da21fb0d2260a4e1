"""Every benchmark script can be imported, so that the names it uses exist in the package."""

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
    # Importing a __main__ module runs it. Peer adapters need an interpreter that has the peer installed.
    if not module.name.endswith("__main__") and not module.name.startswith("benchmarks.peers")
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_can_be_imported(name: str) -> None:
    importlib.import_module(name)


def test_compile_prints_step_times_and_counters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_benchmark.main(["retinanet_r18_fpn_small", "--size", "64x64"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["step 1", "step 2", "step 3"]
    assert "'unique_graphs': 1" in lines[3]
    assert lines[4] == "graph_break: {}"
