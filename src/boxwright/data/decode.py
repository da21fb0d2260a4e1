"""From a picture's file to its pixels.

JPEG goes through OpenCV, everything else and every odd JPEG through Pillow, which torchvision brings along:
`docs/benchmarks/decode.md` has the measurement behind the choice. Both give the same pixels.
"""

from __future__ import annotations

import io
import stat
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""What a picture may hold unless told otherwise: Pillow's guard against decompression bombs, 256 MiB as RGB."""

_JPEG_END = b"\xff\xd9"


def decode_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in a file, upright.

    Args:
        path: a JPEG, PNG, BMP, GIF (first frame), TIFF or WebP file.
        max_pixels: refuse a picture with more pixels than this, by its header, before any pixel is decoded. Pillow
            itself refuses more than 178,956,970.

    Returns:
        uint8 [H, W, 3], RGB, EXIF orientation applied. Grey is repeated over the channels, 16-bit values keep their
        high byte, palettes are resolved and alpha is dropped.

    Raises:
        ValueError: the file is missing, not a picture, cut short, or too large; the message names it.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError(f"{path}: cannot be read: it is a folder, pipe or device, no file")
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        with Image.open(io.BytesIO(data)) as header:
            width, height = header.size
            if width * height > max_pixels:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            # A JPEG without its end marker may be cut short, which OpenCV fills with grey and does not tell.
            if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L") and data.endswith(_JPEG_END):
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
                if pixels is not None:
                    return pixels
            return _decode_with_pillow(header)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path}: refused as too large ({error}; the limit is {max_pixels} pixels): shrink it or raise max_pixels"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: cannot be decoded: {_not_a_picture(data)}") from error
    except Exception as error:  # of damaged files Pillow's readers raise whatever they stumble over
        raise ValueError(
            f"{path}: cannot be decoded: the file is damaged, cut short or no picture ({error})"
        ) from error


def _not_a_picture(data: bytes) -> str:
    return "it is of no picture format that can be read" if data else "the file is empty"


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion clips instead of scaling in some versions.
        grey = (np.clip(np.asarray(upright), 0, 0xFFFF) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.mode == "F":
        raise OSError("floating-point pixels have no known range: save it with 8 or 16 bits a channel")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # straight to RGB, Pillow warns about the alpha that is dropped on purpose
    return np.array(upright.convert("RGB"))
