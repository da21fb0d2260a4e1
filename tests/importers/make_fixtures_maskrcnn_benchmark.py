"""Write the fixtures `maskrcnn_benchmark_*`: what its own models detect, see `reference.py`.

To be run by hand:

    git clone https://github.com/facebookresearch/maskrcnn-benchmark CLONE
    pip install yacs
    PYTHONPATH=src:tests:CLONE python -m importers.make_fixtures_maskrcnn_benchmark CLONE DATA

DATA is what `BOXWRIGHT_DATA` names. The committed ones come from commit 57eec25 (November 2019) on torch 2.14 and
torchvision 0.29, on a CPU. Its compiled part is not built: `_Compiled` below stands in for the two functions that
detection needs, after `csrc/cpu/nms_cpu.cpp` and `csrc/cpu/ROIAlign_cpu.cpp`. What else it wants of 2019 (apex, names
that torch and numpy dropped) is given to it.

Models are those of its configurations but for narrower layers and, of the ResNeXt, fewer of them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from importers.reference import Found, Reference, fill, images_of, thinned


class _Compiled(ModuleType):
    """`maskrcnn_benchmark._C`."""

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        """Indices of the boxes that stay, rising; a box goes from `threshold` on, and is x2 - x1 + 1 wide."""
        x1, y1, x2, y2 = boxes.unbind(1)
        areas = (x2 - x1 + 1) * (y2 - y1 + 1)
        gone = torch.zeros(len(boxes), dtype=torch.bool)
        order = scores.argsort(descending=True)
        for place, best in enumerate(order.tolist()):
            if not gone[best]:
                rest = order[place + 1 :]
                width = (torch.minimum(x2[rest], x2[best]) - torch.maximum(x1[rest], x1[best]) + 1).clamp(min=0)
                height = (torch.minimum(y2[rest], y2[best]) - torch.maximum(y1[rest], y1[best]) + 1).clamp(min=0)
                shared = width * height
                gone[rest[shared / (areas[rest] + areas[best] - shared) >= threshold]] = True
        return (~gone).nonzero().squeeze(1)

    @staticmethod
    def roi_align_forward(maps: Tensor, rois: Tensor, scale: float, height: int, width: int, samples: int) -> Tensor:
        """Its formula is torchvision's `aligned=False`: no half pixel, boxes at least a cell long."""
        return roi_align(maps, rois, (height, width), scale, samples, aligned=False)


def _stand_in() -> None:
    """Put in place what is missing."""
    names = ("apex", "apex.amp", "torch._six", "cityscapesscripts", "cityscapesscripts.helpers")
    apex, amp, six, _, helpers = modules = [ModuleType(name) for name in names]
    sys.modules |= dict(zip(names, modules, strict=True))
    amp.float_function = lambda function: function
    apex.amp = amp
    helpers.csHelpers = None
    six.PY3 = True
    torch._six = six
    setattr(np, "float", float)  # noqa: B010
    compiled = sys.modules["maskrcnn_benchmark._C"] = _Compiled("maskrcnn_benchmark._C")
    import maskrcnn_benchmark

    maskrcnn_benchmark._C = compiled


NARROW = {
    "MODEL.RESNETS.BACKBONE_OUT_CHANNELS": 64,
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM": 128,
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS": (32, 32, 32, 32),
}
R50 = {**NARROW, "MODEL.RESNETS.WIDTH_PER_GROUP": 16}
"""Bottlenecks of 16, 32, 64 and 128 channels in place of 64 to 512; what comes out of them is as wide as ever."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "proposal_network": ("rpn_R_50_FPN_1x.yaml", R50),
    "faster_rcnn": ("e2e_faster_rcnn_R_50_FPN_1x.yaml", R50),
    "faster_rcnn_resnext": (
        "e2e_faster_rcnn_X_101_32x8d_FPN_1x.yaml",
        {**NARROW, "MODEL.BACKBONE.CONV_BODY": "R-50-FPN", "MODEL.RESNETS.WIDTH_PER_GROUP": 4},
    ),
    "mask_rcnn": ("e2e_mask_rcnn_R_50_FPN_1x.yaml", R50),
    "retinanet": ("retinanet/retinanet_R-50-FPN_1x.yaml", R50),
    "retinanet_p5": ("retinanet/retinanet_R-50-FPN_P5_1x.yaml", R50),
}
GAINS = {
    # Pixels of about 70, which nothing divides.
    "*.stem.conv1.weight": 0.015,
    # Weak residual branches, as training makes them.
    "*.bn3.weight": 0.3,
    "backbone.fpn.fpn_inner*.weight": 0.3,
    "backbone.fpn.fpn_layer*.weight": 0.3,
    # Detections of the coarsest level, too.
    "backbone.fpn.top_blocks.p6.weight": 0.4,
    "backbone.fpn.top_blocks.p7.weight": 1.0,
    # Scores that spread, and boxes that stay near their anchors.
    "rpn.head.bbox_pred.weight": 0.15,
    "rpn.head.cls_logits.weight": 0.7,
    "roi_heads.box.predictor.cls_score.weight": 0.45,
    # Several classes in a image: units that are on for some boxes alone.
    "*.fc6.bias": 24.0,
    "*.fc7.bias": 10.0,
}
RESNEXT_GAINS = {
    # So that the threshold on scores leaves fewer detections than there may be.
    "roi_heads.box.predictor.cls_score.weight": 0.24,
    "*.fc?.bias": 1.0,
}
RETINA_GAINS = {"rpn.head.cls_logits.weight": 0.35, "rpn.head.bbox_pred.weight": 2.0}
P5_GAINS = RETINA_GAINS | {"backbone.fpn.top_blocks.p6.weight": 3.0}
SPECIAL_GAINS = {"faster_rcnn_resnext": RESNEXT_GAINS, "retinanet": RETINA_GAINS, "retinanet_p5": P5_GAINS}
"""What comes first, of single models."""
KEPT_PROPOSALS = 300
KEPT_MASKS = 10


@torch.inference_mode()
def found_by(model: Any, cfg: Any, pixels: np.ndarray) -> Found:
    """What a model finds in a image at its own size, its masks before they are pasted."""
    from maskrcnn_benchmark.data.transforms import transforms
    from maskrcnn_benchmark.structures.image_list import to_image_list

    image, _ = transforms.ToTensor()(pixels, None)
    normalize = transforms.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD, to_bgr255=cfg.INPUT.TO_BGR255)
    (found,) = model(to_image_list([normalize(image)], cfg.DATALOADER.SIZE_DIVISIBILITY))
    only_proposals = not found.has_field("scores")
    scores = found.get_field("objectness" if only_proposals else "scores")
    order = scores.argsort(descending=True)[: KEPT_PROPOSALS if only_proposals else None]
    labels = torch.ones(len(scores), dtype=torch.int64) if only_proposals else found.get_field("labels")
    masks = None
    if found.has_field("mask"):
        masks = thinned(found.get_field("mask")[order[:KEPT_MASKS], 0].numpy())
    return Found(
        boxes=found.bbox[order].numpy(),
        scores=scores[order].numpy(),
        labels=labels[order].numpy() - 1,
        count=len(found),
        masks=masks,
    )


def main(clone: Path, data: Path, names: list[str]) -> None:
    """Write the fixtures of these models, or of all."""
    _stand_in()
    from maskrcnn_benchmark.config import cfg as defaults
    from maskrcnn_benchmark.modeling.detector import build_detection_model

    commit = subprocess.run(
        ["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    for name in names or MODELS:
        config, changes = MODELS[name]
        cfg = defaults.clone()
        cfg.merge_from_file(str(clone / "configs" / config))
        cfg.merge_from_list([part for item in changes.items() for part in item])
        cfg.merge_from_list(["MODEL.DEVICE", "cpu"])
        model = build_detection_model(cfg).eval()
        # The anchors are in its files, too; they are no weights.
        shapes = {k: tuple(tensor.shape) for k, tensor in model.state_dict().items() if "anchor_generator" not in k}
        special = SPECIAL_GAINS.get(name, {})
        gains = special | {pattern: gain for pattern, gain in GAINS.items() if pattern not in special}
        missing, unexpected = model.load_state_dict(fill(shapes, gains), strict=False)
        assert not unexpected, unexpected
        assert all("anchor_generator" in name for name in missing), missing
        found = [found_by(model, cfg, pixels) for pixels in images_of(data)]
        about = {"peer": "maskrcnn-benchmark", "commit": commit, "config": config, "changes": changes}
        Reference(about=about, shapes=shapes, gains=gains, found=found).save(f"maskrcnn_benchmark_{name}")
        for one in found:
            print(name, one.count, len(set(one.labels)), np.quantile(one.scores, [0, 0.5, 1]).round(4))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
