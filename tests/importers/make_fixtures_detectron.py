"""Write the fixtures `detectron_*`: detections of Detectron's own code, see `reference.py`.

Run it by hand:

    git clone https://github.com/facebookresearch/Detectron CLONE
    pip install six pyyaml pycocotools opencv-python-headless
    PYTHONPATH=src:tests:CLONE python -m importers.make_fixtures_detectron CLONE DATA

DATA is the folder that `BOXWRIGHT_DATA` names. The committed fixtures come from commit 04155a0 (October 2023).

Detectron ran its networks on Caffe2, which is no longer available. `Workspace` runs the same layers in torch, after
`ResNet.py`, `FPN.py`, `fast_rcnn_heads.py`, `mask_rcnn_heads.py` and `retinanet_heads.py` of Detectron's `modeling/`.
Everything else is Detectron's own code: image preprocessing, anchors, proposals and their levels, box decoding,
thresholds and NMS, in `utils/blob.py`, `ops`, `core/test.py`, `test_retinanet.py` and `rpn_generator.py`. NMS is the
only compiled part that detection needs; `nms` below replaces it, after `utils/cython_nms.pyx`.

The models are Detectron's baselines with narrower layers; the ResNeXt also has fewer layers. Images are not resized.
DEDUP_BOXES is off: otherwise Fast R-CNN merges proposals that are equal after rounding to multiples of 16 pixels.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torchvision.ops import roi_align

from importers.reference import ImageDetections, Reference, fill, images_of, proposals_for, thinned

MISSING = [
    "caffe2",
    "caffe2.proto",
    "caffe2.python",
    "future",
    "future.utils",
    "past",
    "past.builtins",
    "detectron.datasets",
    "detectron.datasets.json_dataset",
    "detectron.datasets.task_evaluation",
    "detectron.modeling.model_builder",
    "detectron.modeling.ResNet",
    "detectron.roi_data",
    "detectron.roi_data.fast_rcnn",
    "detectron.utils.c2",
    "detectron.utils.cython_bbox",
    "detectron.utils.cython_nms",
    "detectron.utils.env",
    "detectron.utils.image",
    "detectron.utils.keypoints",
    "detectron.utils.net",
    "detectron.utils.segms",
    "detectron.utils.subprocess",
]
"""Modules that Detectron imports but detection hardly uses; `stand_in` replaces them with mocks."""
BASELINES = "configs/12_2017_baselines"
MODELS = {
    "proposal_network": "rpn_R-50-FPN_1x.yaml",
    "fast_rcnn": "fast_rcnn_R-50-FPN_1x.yaml",
    "faster_rcnn": "e2e_faster_rcnn_R-50-FPN_1x.yaml",
    "faster_rcnn_resnext": "e2e_faster_rcnn_X-101-32x8d-FPN_1x.yaml",
    "mask_rcnn": "e2e_mask_rcnn_R-50-FPN_1x.yaml",
    "retinanet": "retinanet_R-50-FPN_1x.yaml",
}
BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}
CHANNELS, WIDTH, MASK_WIDTH, CLASSES = 64, 128, 32, 81
GAINS = {
    # Pixel values are around 70: they are not divided by a standard deviation.
    "conv1_w": 0.015,
    # Weak residual branches, as in a trained network.
    "*_branch2c_bn_s": 0.3,
    # The coarsest levels must produce detections, too.
    "fpn_6_w": 0.4,
    "fpn_7_w": 1.0,
    "fpn_*_w": 0.3,
    # Spread the scores, predict several classes per image, and keep boxes near their anchors.
    "rpn_bbox_pred_fpn2_w": 0.16,
    "rpn_cls_logits_fpn2_w": 0.7,
    "fc6_b": 10.0,
    "fc7_b": 20.0,
    "cls_score_w": 0.4,
    "bbox_pred_w": 0.5,
    "retnet_cls_pred_fpn3_w": 0.35,
    "retnet_bbox_pred_fpn3_w": 0.4,
}
KEPT_PROPOSALS = 300
KEPT_MASKS = 10


def nms(detections: np.ndarray, threshold: float) -> np.ndarray:
    """Return the indices of the boxes to keep, best first.

    A box is suppressed if its IoU is at least `threshold`. The width of a box is x2 - x1 + 1.
    """
    x1, y1, x2, y2, scores = detections.T
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    order = scores.argsort()[::-1]
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        width = np.maximum(0, np.minimum(x2[order], x2[best]) - np.maximum(x1[order], x1[best]) + 1)
        height = np.maximum(0, np.minimum(y2[order], y2[best]) - np.maximum(y1[order], y1[best]) + 1)
        intersection = width * height
        order = order[intersection / (areas[order] + areas[best] - intersection) < threshold]
    return np.array(kept, np.int64)


class Blob:
    """Replacement for the Caffe2 blobs that Detectron's operators read and write."""

    def __init__(self, data: np.ndarray | None = None) -> None:
        self.data = np.zeros(0, np.float32) if data is None else data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def reshape(self, shape: tuple[int, ...]) -> None:
        self.data = np.zeros(shape, self.data.dtype)

    def init(self, shape: list[int], kind: Any) -> None:
        self.data = np.zeros(shape, np.int32)


class Workspace:
    """The parts of `caffe2.python.workspace` that inference needs: blobs by name, and nets that run on them."""

    def __init__(self, cfg: Any, weights: dict[str, Tensor]) -> None:
        self.cfg, self.weights = cfg, weights
        self.blobs: dict[str, np.ndarray] = {}

    def FeedBlob(self, name: str, value: np.ndarray) -> None:
        self.blobs[name] = value

    def FetchBlob(self, name: str) -> np.ndarray:
        return self.blobs[name]

    def FetchBlobs(self, names: list[str]) -> list[np.ndarray]:
        return [self.blobs[name] for name in names]

    @torch.inference_mode()
    def RunNet(self, name: str) -> None:
        getattr(self, name)()

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        """Convolution with "same" padding, followed by its bias or by its AffineChannel layer."""
        weight = self.weights[name + "_w"]
        x = F.conv2d(x, weight, self.weights.get(name + "_b"), stride, weight.shape[-1] // 2, groups=groups)
        norm = "res_conv1_bn" if name == "conv1" else name + "_bn"
        if norm + "_s" not in self.weights:
            return x
        scale, bias = (self.weights[f"{norm}_{part}"].view(-1, 1, 1) for part in "sb")
        return x * scale + bias

    def body(self) -> dict[int, Tensor]:
        """Return the outputs of stages 2 to 5."""
        x = torch.from_numpy(self.blobs["data"])
        x = F.max_pool2d(self.conv(x, "conv1", 2).relu(), 3, 2, 1)
        stages = {}
        for stage, num_blocks in BLOCKS.items():
            for block in range(num_blocks):
                prefix = f"res{stage}_{block}_branch"
                stride = 2 if stage > 2 and block == 0 else 1
                first, second = (stride, 1) if self.cfg.RESNETS.STRIDE_1X1 else (1, stride)
                branch = self.conv(x, prefix + "2a", first).relu()
                branch = self.conv(branch, prefix + "2b", second, self.cfg.RESNETS.NUM_GROUPS).relu()
                shortcut = self.conv(x, prefix + "1", stride) if block == 0 else x
                x = (self.conv(branch, prefix + "2c") + shortcut).relu()
            stages[stage] = x
        return stages

    def pyramid(self) -> dict[int, Tensor]:
        """Return P2 to P6, or P3 to P7 for RetinaNet."""
        stages, retina = self.body(), self.cfg.FPN.EXTRA_CONV_LEVELS
        levels, inner = {}, None
        for stage in range(5, 2 if retina else 1, -1):
            name = f"res{stage}_{BLOCKS[stage] - 1}_sum"
            lateral = self.conv(stages[stage], f"fpn_inner_{name}{'' if inner is None else '_lateral'}")
            inner = lateral if inner is None else lateral + F.interpolate(inner, scale_factor=2, mode="nearest")
            levels[stage] = self.conv(inner, f"fpn_{name}")
        if retina:
            levels[6] = self.conv(stages[5], "fpn_6", 2)
            levels[7] = self.conv(levels[6].relu(), "fpn_7", 2)
        else:
            levels[6] = F.max_pool2d(levels[5], 1, 2)
        return levels

    def detect(self) -> None:
        """Run the network that predicts boxes."""
        self.levels = self.pyramid()
        if self.cfg.RETINANET.RETINANET_ON:
            self.retinanet()
        if "conv_rpn_fpn2_w" in self.weights:
            self.rpn()
        if "fc6_w" in self.weights:
            hidden = self.pooled("rois", self.cfg.FAST_RCNN).flatten(1)
            for name in ("fc6", "fc7"):
                hidden = F.linear(hidden, self.weights[name + "_w"], self.weights[name + "_b"]).relu()
            scores, deltas = (
                F.linear(hidden, self.weights[f"{name}_w"], self.weights[f"{name}_b"])
                for name in ("cls_score", "bbox_pred")
            )
            self.blobs |= {"cls_prob": scores.softmax(1).numpy(), "bbox_pred": deltas.numpy()}

    def retinanet(self) -> None:
        for level, x in self.levels.items():
            outputs = []
            for branch in ("cls", "bbox"):
                hidden = x
                for index in range(self.cfg.RETINANET.NUM_CONVS):
                    hidden = self.conv(hidden, f"retnet_{branch}_conv_n{index}_fpn3").relu()
                outputs.append(self.conv(hidden, f"retnet_{branch}_pred_fpn3"))
            self.blobs[f"retnet_cls_prob_fpn{level}"] = outputs[0].sigmoid().numpy()
            self.blobs[f"retnet_bbox_pred_fpn{level}"] = outputs[1].numpy()

    def rpn(self) -> None:
        """Run Detectron's operators on each level, then the operator that collects the proposals of all levels."""
        from detectron.modeling.generate_anchors import generate_anchors
        from detectron.ops import collect_and_distribute_fpn_rpn_proposals as collecting
        from detectron.ops.generate_proposals import GenerateProposalsOp

        fpn = self.cfg.FPN
        levels = range(fpn.RPN_MIN_LEVEL, fpn.RPN_MAX_LEVEL + 1)
        proposals = {}
        for level in levels:
            hidden = self.conv(self.levels[level], "conv_rpn_fpn2").relu()
            scores = self.conv(hidden, "rpn_cls_logits_fpn2").sigmoid()
            deltas = self.conv(hidden, "rpn_bbox_pred_fpn2")
            size = fpn.RPN_ANCHOR_START_SIZE * 2.0 ** (level - fpn.RPN_MIN_LEVEL)
            anchors = generate_anchors(stride=2.0**level, sizes=(size,), aspect_ratios=fpn.RPN_ASPECT_RATIOS)
            proposals[level] = [Blob(), Blob()]
            inputs = [Blob(scores.numpy()), Blob(deltas.numpy()), Blob(self.blobs["im_info"])]
            GenerateProposalsOp(anchors, 0.5**level, train=False).forward(inputs, proposals[level])
            self.blobs[f"rpn_rois_fpn{level}"], self.blobs[f"rpn_roi_probs_fpn{level}"] = (
                b.data for b in proposals[level]
            )
        if self.cfg.MODEL.FASTER_RCNN:
            outputs = [Blob() for _ in range(6)]
            collected = [proposals[level][part] for part in range(2) for level in levels]
            collecting.CollectAndDistributeFpnRpnProposalsOp(train=False).forward(collected, outputs)
            names = ["rois", *(f"rois_fpn{level}" for level in range(2, 6)), "rois_idx_restore_int32"]
            self.blobs |= {name: blob.data for name, blob in zip(names, outputs, strict=True)}

    def pooled(self, rois: str, settings: Any) -> Tensor:
        """Apply RoIAlign per level, then restore the original order of the boxes."""
        assert settings.ROI_XFORM_METHOD == "RoIAlign"
        size, samples = settings.ROI_XFORM_RESOLUTION, settings.ROI_XFORM_SAMPLING_RATIO
        levels = [
            roi_align(self.levels[level], torch.from_numpy(boxes), size, 0.5**level, samples, aligned=False)
            for level in range(2, 6)
            for boxes in [self.blobs[f"{rois}_fpn{level}"].astype(np.float32)]
        ]
        return torch.cat(levels)[torch.from_numpy(self.blobs[f"{rois}_idx_restore_int32"]).long()]

    def masks(self) -> None:
        """Run the network that predicts masks; `detect` must run first."""
        hidden = self.pooled("mask_rois", self.cfg.MRCNN)
        for index in range(1, 5):
            hidden = self.conv(hidden, f"_[mask]_fcn{index}").relu()
        hidden = F.conv_transpose2d(hidden, self.weights["conv5_mask_w"], self.weights["conv5_mask_b"], 2).relu()
        self.blobs["mask_fcn_probs"] = self.conv(hidden, "mask_fcn_logits").sigmoid().numpy()


def stand_in(clone: Path) -> None:
    """Install replacements for the modules that Detectron imports."""
    sys.modules |= {name: MagicMock() for name in MISSING}
    sys.modules["future.utils"].iteritems = dict.items
    sys.modules["past.builtins"].basestring = str
    sys.modules["detectron.utils.env"].yaml_load = yaml.safe_load
    sys.modules["detectron.utils.cython_nms"].nms = nms
    sys.modules["caffe2.python"].core.ScopedName = str
    sys.path.insert(0, str(clone))


def shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a model's blobs."""

    def layer(name: str, *shape: int) -> None:
        shapes.update({f"{name}_w": shape, f"{name}_b": shape[:1]})

    def normed(name: str, *shape: int) -> None:
        shapes.update({f"{name}_w": shape, f"{name}_bn_s": shape[:1], f"{name}_bn_b": shape[:1]})

    shapes: dict[str, tuple[int, ...]] = {"conv1_w": (64, 3, 7, 7), "res_conv1_bn_s": (64,), "res_conv1_bn_b": (64,)}
    groups, inputs = 32 if "resnext" in kind else 1, 64
    for stage, num_blocks in BLOCKS.items():
        inner = (128 if groups > 1 else 16) * 2 ** (stage - 2)
        for block in range(num_blocks):
            prefix = f"res{stage}_{block}_branch"
            normed(prefix + "2a", inner, inputs, 1, 1)
            normed(prefix + "2b", inner, inner // groups, 3, 3)
            normed(prefix + "2c", 2 ** (stage + 6), inner, 1, 1)
            if block == 0:
                normed(prefix + "1", 2 ** (stage + 6), inputs, 1, 1)
            inputs = 2 ** (stage + 6)
    for stage in range(3 if kind == "retinanet" else 2, 6):
        name = f"res{stage}_{BLOCKS[stage] - 1}_sum"
        layer(f"fpn_inner_{name}{'' if stage == 5 else '_lateral'}", CHANNELS, 2 ** (stage + 6), 1, 1)
        layer(f"fpn_{name}", CHANNELS, CHANNELS, 3, 3)
    if kind == "retinanet":
        layer("fpn_6", CHANNELS, 2048, 3, 3)
        layer("fpn_7", CHANNELS, CHANNELS, 3, 3)
        for branch, outputs in (("cls", 9 * (CLASSES - 1)), ("bbox", 36)):
            for index in range(4):
                layer(f"retnet_{branch}_conv_n{index}_fpn3", CHANNELS, CHANNELS, 3, 3)
            layer(f"retnet_{branch}_pred_fpn3", outputs, CHANNELS, 3, 3)
        return shapes
    if kind != "fast_rcnn":
        layer("conv_rpn_fpn2", CHANNELS, CHANNELS, 3, 3)
        layer("rpn_cls_logits_fpn2", 3, CHANNELS, 1, 1)
        layer("rpn_bbox_pred_fpn2", 12, CHANNELS, 1, 1)
    if kind != "proposal_network":
        layer("fc6", WIDTH, CHANNELS * 49)
        layer("fc7", WIDTH, WIDTH)
        layer("cls_score", CLASSES, WIDTH)
        layer("bbox_pred", 4 * CLASSES, WIDTH)
    if kind == "mask_rcnn":
        for index in range(1, 5):
            layer(f"_[mask]_fcn{index}", MASK_WIDTH, MASK_WIDTH if index > 1 else CHANNELS, 3, 3)
        layer("mask_fcn_logits", CLASSES, MASK_WIDTH, 1, 1)
        shapes |= {"conv5_mask_w": (MASK_WIDTH, MASK_WIDTH, 2, 2), "conv5_mask_b": (MASK_WIDTH,)}
    return shapes


def detect_with_peer(kind: str, cfg: Any, pixels: np.ndarray) -> ImageDetections:
    """Run Detectron's inference functions on an image. Masks are returned before pasting."""
    from detectron.core import rpn_generator, test, test_retinanet

    nets = {name: SimpleNamespace(Proto=lambda name=name: SimpleNamespace(name=name)) for name in ("detect", "masks")}
    model = SimpleNamespace(net=nets["detect"], mask_net=nets["masks"])
    cfg.TEST.SCALE, cfg.TEST.MAX_SIZE = min(pixels.shape[:2]), 10**6
    image = pixels[:, :, ::-1].copy()
    masks = None
    if kind == "proposal_network":
        boxes, scores = rpn_generator.im_proposals(model, image)
        return ImageDetections(
            boxes=boxes[:KEPT_PROPOSALS],
            scores=scores[:KEPT_PROPOSALS],
            labels=np.zeros(KEPT_PROPOSALS, np.int64),
            count=len(boxes),
        )
    if kind == "retinanet":
        by_class = test_retinanet.im_detect_bbox(model, image)
    else:
        given_boxes = proposals_for(pixels) if kind == "fast_rcnn" else None
        scores, boxes, scale = test.im_detect_bbox(model, image, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE, boxes=given_boxes)
        _, boxes, by_class = test.box_results_with_nms_and_limit(scores, boxes)
        assert scale == 1
    labels = np.concatenate([np.full(len(rows), label, np.int64) for label, rows in enumerate(by_class)])
    rows = np.vstack([rows for rows in by_class if len(rows)])
    order = rows[:, 4].argsort()[::-1]
    if cfg.MODEL.MASK_ON:
        probabilities = test.im_detect_mask(model, scale, boxes)[np.arange(len(boxes)), labels]
        masks = thinned(probabilities[order[:KEPT_MASKS]])
    return ImageDetections(
        boxes=rows[order, :4], scores=rows[order, 4], labels=labels[order] - 1, count=len(rows), masks=masks
    )


def main(clone: Path, data: Path, names: list[str]) -> None:
    """Write the fixtures of the named models, or of all models."""
    stand_in(clone)
    from detectron.core import rpn_generator, test, test_retinanet
    from detectron.core.config import cfg, merge_cfg_from_cfg, merge_cfg_from_file

    commit = subprocess.run(
        ["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    defaults = copy.deepcopy(cfg)
    for name in names or MODELS:
        merge_cfg_from_cfg(defaults)
        merge_cfg_from_file(str(clone / BASELINES / MODELS[name]))
        cfg.DEDUP_BOXES = 0.0
        shapes = shapes_of(name)
        workspace = Workspace(cfg, fill(shapes, GAINS))
        for module in (rpn_generator, test, test_retinanet):
            module.workspace = workspace
        detections = [detect_with_peer(name, cfg, pixels) for pixels in images_of(data)]
        changes = {"DEDUP_BOXES": 0, "TEST.SCALE": "the image's short side"}
        about = {"peer": "Detectron", "commit": commit, "config": MODELS[name], "changes": changes}
        Reference(about=about, shapes=shapes, gains=GAINS, detections=detections).save(f"detectron_{name}")
        for one in detections:
            print(name, one.count, len(set(one.labels)), np.quantile(one.scores, [0, 0.5, 1]).round(4))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
