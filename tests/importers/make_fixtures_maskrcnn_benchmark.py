"""Write the fixtures `maskrcnn_benchmark_*`: detections of maskrcnn-benchmark's own models.

Run it by hand (see `reference.py`):

    git clone https://github.com/facebookresearch/maskrcnn-benchmark CLONE
    pip install yacs
    PYTHONPATH=src:tests:CLONE python -m importers.make_fixtures_maskrcnn_benchmark CLONE DATA

DATA is the folder that `BOXWRIGHT_DATA` names. The committed fixtures come from commit 57eec25 (November 2019) with
torch 2.14 and torchvision 0.29 on a CPU. The compiled extension is not built: `_Compiled` below replaces the two
functions that detection needs, after `csrc/cpu/nms_cpu.cpp` and `csrc/cpu/ROIAlign_cpu.cpp`. `_stand_in` replaces
the other dependencies from 2019: apex, and names that torch and numpy have dropped since.

The models are maskrcnn-benchmark's configurations with narrower layers; the ResNeXt also has fewer layers.
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

from importers.reference import ImageDetections, Reference, fill, images_of, thinned


class _Compiled(ModuleType):
    """Replacement for `maskrcnn_benchmark._C`."""

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        """Return the indices of the boxes to keep, in ascending order.

        A box is suppressed if its IoU is at least `threshold`. The width of a box is x2 - x1 + 1.
        """
        x1, y1, x2, y2 = boxes.unbind(1)
        areas = (x2 - x1 + 1) * (y2 - y1 + 1)
        suppressed = torch.zeros(len(boxes), dtype=torch.bool)
        order = scores.argsort(descending=True)
        for place, best in enumerate(order.tolist()):
            if not suppressed[best]:
                rest = order[place + 1 :]
                width = (torch.minimum(x2[rest], x2[best]) - torch.maximum(x1[rest], x1[best]) + 1).clamp(min=0)
                height = (torch.minimum(y2[rest], y2[best]) - torch.maximum(y1[rest], y1[best]) + 1).clamp(min=0)
                intersection = width * height
                suppressed[rest[intersection / (areas[rest] + areas[best] - intersection) >= threshold]] = True
        return (~suppressed).nonzero().squeeze(1)

    @staticmethod
    def roi_align_forward(maps: Tensor, rois: Tensor, scale: float, height: int, width: int, samples: int) -> Tensor:
        """The formula equals torchvision's `aligned=False`: no half-pixel offset, RoIs at least one cell long."""
        return roi_align(maps, rois, (height, width), scale, samples, aligned=False)


def _stand_in() -> None:
    """Install replacements for the missing modules."""
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
"""Bottlenecks of 16, 32, 64 and 128 channels instead of 64 to 512; the stages' output widths are unchanged."""
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
    # Pixel values are around 70: they are not divided by a standard deviation.
    "*.stem.conv1.weight": 0.015,
    # Weak residual branches, as in a trained network.
    "*.bn3.weight": 0.3,
    "backbone.fpn.fpn_inner*.weight": 0.3,
    "backbone.fpn.fpn_layer*.weight": 0.3,
    # The coarsest levels must produce detections, too.
    "backbone.fpn.top_blocks.p6.weight": 0.4,
    "backbone.fpn.top_blocks.p7.weight": 1.0,
    # Spread the scores and keep boxes near their anchors.
    "rpn.head.bbox_pred.weight": 0.15,
    "rpn.head.cls_logits.weight": 0.7,
    "roi_heads.box.predictor.cls_score.weight": 0.45,
    # Predict several classes per image: some units are active for some boxes only.
    "*.fc6.bias": 24.0,
    "*.fc7.bias": 10.0,
}
RESNEXT_GAINS = {
    # Keep the number of detections above the score threshold below the maximum.
    "roi_heads.box.predictor.cls_score.weight": 0.24,
    "*.fc?.bias": 1.0,
}
RETINA_GAINS = {"rpn.head.cls_logits.weight": 0.35, "rpn.head.bbox_pred.weight": 2.0}
P5_GAINS = RETINA_GAINS | {"backbone.fpn.top_blocks.p6.weight": 3.0}
SPECIAL_GAINS = {"faster_rcnn_resnext": RESNEXT_GAINS, "retinanet": RETINA_GAINS, "retinanet_p5": P5_GAINS}
"""Gains of single models, which take precedence over `GAINS`."""
KEPT_PROPOSALS = 300
KEPT_MASKS = 10


@torch.inference_mode()
def detect_with_peer(model: Any, cfg: Any, pixels: np.ndarray) -> ImageDetections:
    """Run a model on an image without resizing it. Masks are returned before pasting."""
    from maskrcnn_benchmark.data.transforms import transforms
    from maskrcnn_benchmark.structures.image_list import to_image_list

    image, _ = transforms.ToTensor()(pixels, None)
    normalize = transforms.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD, to_bgr255=cfg.INPUT.TO_BGR255)
    (output,) = model(to_image_list([normalize(image)], cfg.DATALOADER.SIZE_DIVISIBILITY))
    only_proposals = not output.has_field("scores")
    scores = output.get_field("objectness" if only_proposals else "scores")
    order = scores.argsort(descending=True)[: KEPT_PROPOSALS if only_proposals else None]
    labels = torch.ones(len(scores), dtype=torch.int64) if only_proposals else output.get_field("labels")
    masks = None
    if output.has_field("mask"):
        masks = thinned(output.get_field("mask")[order[:KEPT_MASKS], 0].numpy())
    return ImageDetections(
        boxes=output.bbox[order].numpy(),
        scores=scores[order].numpy(),
        labels=labels[order].numpy() - 1,
        count=len(output),
        masks=masks,
    )


def main(clone: Path, data: Path, names: list[str]) -> None:
    """Write the fixtures of the named models, or of all models."""
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
        # The state dict also contains the anchors, which are not weights.
        shapes = {k: tuple(tensor.shape) for k, tensor in model.state_dict().items() if "anchor_generator" not in k}
        special = SPECIAL_GAINS.get(name, {})
        gains = special | {pattern: gain for pattern, gain in GAINS.items() if pattern not in special}
        missing, unexpected = model.load_state_dict(fill(shapes, gains), strict=False)
        assert not unexpected, unexpected
        assert all("anchor_generator" in name for name in missing), missing
        detections = [detect_with_peer(model, cfg, pixels) for pixels in images_of(data)]
        about = {"peer": "maskrcnn-benchmark", "commit": commit, "config": config, "changes": changes}
        Reference(about=about, shapes=shapes, gains=gains, detections=detections).save(f"maskrcnn_benchmark_{name}")
        for one in detections:
            print(name, one.count, len(set(one.labels)), np.quantile(one.scores, [0, 0.5, 1]).round(4))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
