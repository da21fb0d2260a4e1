"""pycocotools as the oracle of measures, and the least that a data set with an annotation file is."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from boxwright.data.dataset import Category


def silent() -> contextlib.redirect_stdout[io.StringIO]:
    """What pycocotools prints goes nowhere."""
    return contextlib.redirect_stdout(io.StringIO())


@dataclass
class AnnotationFile:
    """As much of a data set as the evaluator looks at."""

    annotations: Path

    @property
    def categories(self) -> list[Category]:
        return [Category(id=c["id"], name=c["name"]) for c in json.loads(self.annotations.read_bytes())["categories"]]

    @property
    def image_ids(self) -> list[int]:
        return [image["id"] for image in json.loads(self.annotations.read_bytes())["images"]]


def oracle(
    annotations: Path, results: Path, *, kind: str = "bbox", use_cats: bool = True, **params: object
) -> COCOeval:
    """Pycocotools' evaluator of a results file, run; `params` are fields of its parameters."""
    with silent():
        truth = COCO(str(annotations))
        evaluator = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluator.params.useCats = int(use_cats)
        for name, value in params.items():
            setattr(evaluator.params, name, value)
        evaluator.evaluate()
        evaluator.accumulate()
        if use_cats:
            evaluator.summarize()
    return evaluator
