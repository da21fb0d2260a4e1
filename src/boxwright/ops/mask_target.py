"""Training targets of a mask head: the mask of each object inside a box, at the resolution of the predicted masks.

B images, G object slots, P boxes, M cells per side of a mask grid, S = output_size.
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
    """Compute for each of the S x S cells of a box whether the centre of the cell is on the object.

    The object's mask grid is sampled bilinearly at the cell centres (0 outside the grid) and thresholded at 0.5. If the
    grid holds a bitmap pixel by pixel, this equals RoIAlign of the full bitmap with one aligned sample per cell (the
    rule of Detectron2's `BitMasks.crop_and_resize`). For polygons it equals COCO's rasteriser on an S x S canvas,
    except for the coordinates that COCO rounds (docs/benchmarks/mask_targets.md).

    Args:
        masks: masks of the objects.
        boxes: [B, P, 4] xyxy in pixels of the canvas.
        matched: [B, P] int64, object slot of each box, 0 <= matched < G.
        valid: [B, P] bool; other slots may have any box, including NaN, and an object without a mask.
        output_size: S.
        plus_one: 1 if x2 and y2 are the last pixel inside a box, else 0.

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
    # [B, P, 2, S] x and y in the convention of grid_sample: -1 to 1 over the frame of the mask grid.
    x, y = (2 * (centres - corners) / lengths - 1).unbind(2)
    size = (*x.shape, output_size)
    grid = torch.stack([x[:, :, None].expand(size), y[..., None].expand(size)], -1).flatten(0, 1)
    covered = F.grid_sample(bitmaps[:, None].to(grid.dtype), grid, align_corners=False).view(size)
    return (covered >= 127.5) & valid[..., None, None]
