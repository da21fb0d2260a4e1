"""Write the fixtures `detectron2_*`: detections of Detectron2's own models, see `reference.py`.

Run it by hand:

    git clone https://github.com/facebookresearch/detectron2 CLONE
    pip install fvcore iopath omegaconf hydra-core yacs tabulate cloudpickle termcolor
    PYTHONPATH=src:tests:CLONE python -m importers.make_fixtures_detectron2 CLONE DATA

DATA is the folder that `BOXWRIGHT_DATA` names. The committed fixtures come from commit 02b5c4e (June 2026) with torch
2.14 and torchvision 0.29 on a CPU. Detectron2 is used uncompiled: its RoIAlign and NMS come from torchvision.

The models are the model zoo's configurations with narrower layers; the ResNeXt also has fewer layers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.ops import boxes as box_ops

from importers.reference import ImageDetections, Reference, fill, images_of, proposals_for, thinned

NARROW = {"MODEL.FPN.OUT_CHANNELS": 64, "MODEL.ROI_BOX_HEAD.FC_DIM": 128, "MODEL.ROI_MASK_HEAD.CONV_DIM": 32}
R50 = {**NARROW, "MODEL.RESNETS.WIDTH_PER_GROUP": 16}
"""Bottlenecks of 16, 32, 64 and 128 channels instead of 64 to 512; the stages' output widths are unchanged."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "proposal_network": ("COCO-Detection/rpn_R_50_FPN_1x.yaml", R50),
    "fast_rcnn": ("COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml", R50),
    "faster_rcnn": ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", R50),
    "faster_rcnn_resnext": (
        "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
        {**NARROW, "MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.WIDTH_PER_GROUP": 4},
    ),
    "mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", R50),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", R50),
    "cascade_mask_rcnn": ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", R50),
    "mask_rcnn_gn": ("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml", {**NARROW, "MODEL.ROI_BOX_HEAD.CONV_DIM": 32}),
    # The RPN has two convolutions, like the models under `new_baselines`, which also have norms.
    "mask_rcnn_syncbn": (
        "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml",
        {**R50, "MODEL.ROI_BOX_HEAD.CONV_DIM": 32, "MODEL.RPN.CONV_DIMS": [-1, -1]},
    ),
}
GAINS = {
    # Pixel values are around 70: they are not divided by a standard deviation.
    "*.stem.conv1.weight": 0.015,
    # Weak residual branches, as in a trained network.
    "*.conv3.norm.weight": 0.3,
    "backbone.fpn_lateral*.weight": 0.3,
    "backbone.fpn_output*.weight": 0.3,
    # The coarsest levels must produce detections, too.
    "backbone.top_block.p6.weight": 0.33,
    "backbone.top_block.p7.weight": 2.0,
    # Spread the scores and keep boxes near their anchors.
    "*.objectness_logits.weight": 0.7,
    "*.anchor_deltas.weight": 0.15,
    "roi_heads.box_predictor*.cls_score.weight": 2.0,
    "roi_heads.box_predictor*.bbox_pred.weight": 1.0,
    "head.cls_score.weight": 0.66,
    "head.bbox_pred.weight": 0.4,
}
RESNEXT_GAINS = {
    "*.stem.conv1.weight": 0.5,
    # Keep the number of detections above the score threshold below the maximum.
    "roi_heads.box_predictor*.cls_score.weight": 0.66,
}
"""Override `GAINS` for models that divide pixels by a standard deviation."""
NORM_GAINS = {
    # Norms restore the scale that the untrained layers before them lose.
    "backbone.fpn_lateral*.weight": 1.0,
    "backbone.fpn_output*.weight": 1.0,
    "roi_heads.box_predictor*.cls_score.weight": 1.0,
}
"""Override `GAINS` for models with norms in the pyramid and the heads."""
IN_FLOAT64 = {"mask_rcnn_syncbn"}
"""Models whose many randomly initialised norms amplify float32 rounding to a hundredth of a pixel."""
KEPT_PROPOSALS = 300
KEPT_MASKS = 10


@torch.inference_mode()
def detect_with_peer(model: Any, pixels: np.ndarray, needs_proposals: bool) -> ImageDetections:
    """Run a model on an image without resizing it. Masks are returned before pasting."""
    size = pixels.shape[:2]
    inputs: dict[str, Any] = {"image": torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1)}
    if needs_proposals:
        boxes = torch.from_numpy(proposals_for(pixels))
        inputs["proposals"] = Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes)))
    kind = type(model).__name__
    if kind == "ProposalNetwork":
        inputs |= {"height": size[0], "width": size[1]}
        instances = model([inputs])[0]["proposals"]
        boxes = instances.proposal_boxes.tensor
        scores = instances.objectness_logits.sigmoid()
        keep = slice(KEPT_PROPOSALS)
        labels = torch.zeros(len(scores), dtype=torch.int64)
    else:
        if kind == "RetinaNet":
            instances = model([{**inputs, "height": size[0], "width": size[1]}])[0]["instances"]
        else:
            instances = model.inference([inputs], do_postprocess=False)[0]
        boxes, scores, labels = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
        keep = slice(None)
    masks = thinned(instances.pred_masks[:KEPT_MASKS, 0].numpy()) if instances.has("pred_masks") else None
    return ImageDetections(
        boxes=boxes[keep].numpy(),
        scores=scores[keep].numpy(),
        labels=labels[keep].numpy(),
        count=len(instances),
        masks=masks,
    )


def _batched_nms(boxes: Tensor, scores: Tensor, *rest: Any) -> Tensor:
    """Cast boxes to the dtype of the scores, as torchvision requires; Detectron2 always passes float32 boxes."""
    return batched_nms(boxes.to(scores.dtype), scores, *rest)


def main(clone: Path, data: Path, names: list[str]) -> None:
    """Write the fixtures of the named models, or of all models."""
    commit = subprocess.run(
        ["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    for name in names or MODELS:
        config, changes = MODELS[name]
        cfg = get_cfg()
        cfg.merge_from_file(str(clone / "configs" / config))
        cfg.merge_from_list([part for item in changes.items() for part in item])
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
        model = build_model(cfg).eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        gains = GAINS | (RESNEXT_GAINS if "resnext" in name else {})
        gains |= NORM_GAINS if cfg.MODEL.FPN.NORM else {}
        model.load_state_dict(fill(shapes, gains))
        if name in IN_FLOAT64:
            model.double()
            box_ops.batched_nms = _batched_nms
        detections = [detect_with_peer(model, pixels, cfg.MODEL.LOAD_PROPOSALS) for pixels in images_of(data)]
        about = {"peer": "detectron2", "commit": commit, "config": config, "changes": changes}
        Reference(about=about, shapes=shapes, gains=gains, detections=detections).save(f"detectron2_{name}")
        for one in detections:
            print(name, one.count, len(set(one.labels)), np.quantile(one.scores, [0, 0.5, 1]).round(4))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
