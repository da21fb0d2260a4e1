"""Write the fixtures `detectron2_*`: what Detectron2's own models detect, see `reference.py`.

To be run by hand:

    git clone https://github.com/facebookresearch/detectron2 CLONE
    pip install fvcore iopath omegaconf hydra-core yacs tabulate cloudpickle termcolor
    PYTHONPATH=src:tests:CLONE python -m importers.make_fixtures_detectron2 CLONE DATA

DATA is what `BOXWRIGHT_DATA` names. The committed ones come from commit 02b5c4e (June 2026) on torch 2.14 and
torchvision 0.29, on a CPU. Nothing of Detectron2 is compiled for it: its RoIAlign and NMS are torchvision's.

Models are those of the model zoo's configurations but for narrower layers and, of the ResNeXt, fewer of them.
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

from importers.reference import Found, Reference, fill, images_of, proposals, thinned

NARROW = {"MODEL.FPN.OUT_CHANNELS": 64, "MODEL.ROI_BOX_HEAD.FC_DIM": 128, "MODEL.ROI_MASK_HEAD.CONV_DIM": 32}
R50 = {**NARROW, "MODEL.RESNETS.WIDTH_PER_GROUP": 16}
"""Bottlenecks of 16, 32, 64 and 128 channels in place of 64 to 512; what comes out of them is as wide as ever."""
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
    # Two convolutions in the RPN, as the models under `new_baselines` have them beside their norms.
    "mask_rcnn_syncbn": (
        "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml",
        {**R50, "MODEL.ROI_BOX_HEAD.CONV_DIM": 32, "MODEL.RPN.CONV_DIMS": [-1, -1]},
    ),
}
GAINS = {
    # Pixels of about 70, where nothing divides them.
    "*.stem.conv1.weight": 0.015,
    # Weak residual branches, as training makes them.
    "*.conv3.norm.weight": 0.3,
    "backbone.fpn_lateral*.weight": 0.3,
    "backbone.fpn_output*.weight": 0.3,
    # Detections of the coarsest level, too.
    "backbone.top_block.p6.weight": 0.33,
    "backbone.top_block.p7.weight": 2.0,
    # Scores that spread, and boxes that stay near their anchors.
    "*.objectness_logits.weight": 0.7,
    "*.anchor_deltas.weight": 0.15,
    "roi_heads.box_predictor*.cls_score.weight": 2.0,
    "roi_heads.box_predictor*.bbox_pred.weight": 1.0,
    "head.cls_score.weight": 0.66,
    "head.bbox_pred.weight": 0.4,
}
RESNEXT_GAINS = {
    "*.stem.conv1.weight": 0.5,
    # So that the threshold on scores leaves fewer detections than there may be.
    "roi_heads.box_predictor*.cls_score.weight": 0.66,
}
"""In place of those, where pixels are divided."""
NORM_GAINS = {
    # Norms bring the scale back that untrained layers before them lose.
    "backbone.fpn_lateral*.weight": 1.0,
    "backbone.fpn_output*.weight": 1.0,
    "roi_heads.box_predictor*.cls_score.weight": 1.0,
}
"""In place of those, where pyramid and heads have norms."""
IN_FLOAT64 = {"mask_rcnn_syncbn"}
"""Its many norms of random numbers make a hundredth of a pixel of float32's rounding."""
KEPT_PROPOSALS = 300
KEPT_MASKS = 10


@torch.inference_mode()
def found_by(model: Any, pixels: np.ndarray, wants_proposals: bool) -> Found:
    """What a model finds in a image at its own size, its masks before they are pasted."""
    size = pixels.shape[:2]
    given: dict[str, Any] = {"image": torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1)}
    if wants_proposals:
        boxes = torch.from_numpy(proposals(pixels))
        given["proposals"] = Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes)))
    kind = type(model).__name__
    if kind == "ProposalNetwork":
        given |= {"height": size[0], "width": size[1]}
        instances = model([given])[0]["proposals"]
        boxes = instances.proposal_boxes.tensor
        scores = instances.objectness_logits.sigmoid()
        kept = slice(KEPT_PROPOSALS)
        labels = torch.zeros(len(scores), dtype=torch.int64)
    else:
        if kind == "RetinaNet":
            instances = model([{**given, "height": size[0], "width": size[1]}])[0]["instances"]
        else:
            instances = model.inference([given], do_postprocess=False)[0]
        boxes, scores, labels = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
        kept = slice(None)
    masks = thinned(instances.pred_masks[:KEPT_MASKS, 0].numpy()) if instances.has("pred_masks") else None
    return Found(
        boxes=boxes[kept].numpy(),
        scores=scores[kept].numpy(),
        labels=labels[kept].numpy(),
        count=len(instances),
        masks=masks,
    )


def _batched_nms(boxes: Tensor, scores: Tensor, *rest: Any) -> Tensor:
    """torchvision's, which wants both of one type; Detectron2 gives it boxes in float32 whatever the scores are."""
    return batched_nms(boxes.to(scores.dtype), scores, *rest)


def main(clone: Path, data: Path, names: list[str]) -> None:
    """Write the fixtures of these models, or of all."""
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
        found = [found_by(model, pixels, cfg.MODEL.LOAD_PROPOSALS) for pixels in images_of(data)]
        about = {"peer": "detectron2", "commit": commit, "config": config, "changes": changes}
        Reference(about=about, shapes=shapes, gains=gains, found=found).save(f"detectron2_{name}")
        for one in found:
            print(name, one.count, len(set(one.labels)), np.quantile(one.scores, [0, 0.5, 1]).round(4))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
