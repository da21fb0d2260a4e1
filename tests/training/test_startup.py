"""Log lines at the start of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from boxwright.backbones.fpn import resnet_fpn
from boxwright.detectors.rcnn import faster_rcnn
from boxwright.training.loop import Training
from boxwright.training.startup import log_start
from training.fakes import FakeImages
from training.runs import tiny_experiment


def test_warns_about_a_backbone_with_frozen_untrained_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tiny_experiment(model=partial(faster_rcnn, backbone=partial(resnet_fpn, depth=18)))
    run = Training(experiment, FakeImages(), tmp_path, num_workers=0)
    log = partial(log_start, experiment, run.plan, run.detector, device=torch.device("cpu"), num_without_mask=0)
    log(step=0)
    assert "will not learn" in capsys.readouterr().out
    log(step=1)
    assert "will not learn" not in capsys.readouterr().out
    for name, buffer in run.detector.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(0.5)
    log(step=0)
    assert "will not learn" not in capsys.readouterr().out
