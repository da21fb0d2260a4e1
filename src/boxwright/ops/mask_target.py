"""What a mask head learns: an object's mask inside a box, at the resolution that the head predicts.

B images, G object slots, P boxes, M cells a side of a mask's grid, S = output_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from boxwright.structures import MaskGrids, take_slots


@torch.no_grad()
def mask_target(
    masks: MaskGrids, boxes: Tensor, matched: Tensor, valid: Tensor, *, output_size: int, plus_one: float = 0.0
) -> Tensor:
    """Whether the centre of each of S x S cells of a box lies on its object.

    The centres read the object's grid bilinearly, 0 beside it, and count from a half on. Of a bitmap that the grid
    holds pixel by pixel, this is what RoIAlign with one aligned sample a cell reads off the whole bitmap (the rule of
    Detectron2's `BitMasks.crop_and_resize`). Of polygons it is COCO's rasteriser on a canvas of S x S, but for what
    that rounds (docs/benchmarks/mask_targets.md).

    Args:
        masks: the objects'.
        boxes: [B, P, 4] xyxy in pixels of the canvas.
        matched: [B, P] int64, the object slot of each box, 0 <= matched < G.
        valid: [B, P] bool; other slots may hold any box, and an object without a mask, NaN included.
        output_size: S.
        plus_one: 1 where x2 and y2 name the last pixel inside a box.

    Returns:
        [B, P, S, S] bool; False in invalid slots.
    """
    num_images, num_slots = masks.valid.shape
    if num_slots == 0:
        return valid.new_zeros((*valid.shape, output_size, output_size))
    rows = matched + num_slots * torch.arange(num_images, device=matched.device)[:, None]
    bitmaps = masks.bitmaps.flatten(0, 1).index_select(0, rows.flatten())
    boxes = torch.where(valid[..., None], boxes, 0.0)
    frames = take_slots(masks.frames, matched)
    corners = torch.where(valid[..., None], frames[..., :2], 0.0)[..., None]
    lengths = torch.where(valid[..., None], frames[..., 2:] - frames[..., :2], 1.0)[..., None]
    shares = (torch.arange(output_size, device=boxes.device) + 0.5) / output_size
    sides = boxes[..., 2:] - boxes[..., :2] + plus_one
    centres = boxes[..., :2, None] + sides[..., None] * shares
    # [B, P, 2, S] x and y as grid_sample takes them, from -1 to 1 over the frame.
    x, y = (2 * (centres - corners) / lengths - 1).unbind(2)
    size = (*x.shape, output_size)
    grid = torch.stack([x[:, :, None].expand(size), y[..., None].expand(size)], -1).flatten(0, 1)
    covered = F.grid_sample(bitmaps[:, None].to(grid.dtype), grid, align_corners=False).view(size)
    return (covered >= 127.5) & valid[..., None, None]
