"""Decode an image file.

OpenCV decodes JPEG files; Pillow, a dependency of torchvision, decodes all other formats and unusual JPEG files.
`docs/benchmarks/decode.md` has the measurements for this choice. Both decode to the same pixels.
"""

from __future__ import annotations

import io
import stat
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Default maximum number of pixels: Pillow's limit against decompression bombs, 256 MiB as RGB."""

_JPEG_END = b"\xff\xd9"


def decode_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file and apply its EXIF orientation.

    Args:
        path: JPEG, PNG, BMP, GIF (first frame), TIFF or WebP file.
        max_pixels: Maximum number of pixels; the size in the header is checked before any pixel is decoded. Pillow
            always refuses more than 178,956,970 pixels.

    Returns:
        uint8 [H, W, 3] RGB. Grey values are repeated for all channels, 16-bit values are reduced to their high byte,
        palettes are resolved, and alpha is dropped.

    Raises:
        ValueError: The file is missing, not an image, truncated or too large; the message contains its path.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError(f"{path}: cannot be read: it is a folder, pipe or device, not a file")
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        with Image.open(io.BytesIO(data)) as header:
            width, height = header.size
            if width * height > max_pixels:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            # OpenCV fills a truncated JPEG with grey without an error, so a JPEG without its end marker goes to Pillow.
            if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L") and data.endswith(_JPEG_END):
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
                if pixels is not None:
                    return pixels
            return _decode_with_pillow(header)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path}: image is too large ({error}; the limit is {max_pixels} pixels). Downscale it, or increase "
            "max_pixels"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: cannot be decoded: {_why_not_an_image(data)}") from error
    except Exception as error:  # Pillow's decoders raise many types of exceptions for damaged files
        raise ValueError(
            f"{path}: cannot be decoded ({error}); the file is damaged, truncated or not an image. Copy it again, or "
            "remove it from the data set."
        ) from error


def _why_not_an_image(data: bytes) -> str:
    return "unknown image format" if data else "the file is empty"


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # 16-bit grey. Some versions of Pillow clip instead of scaling.
        grey = (np.clip(np.asarray(upright), 0, 0xFFFF) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.mode == "F":
        raise OSError("floating-point pixels have no known range. Save the image with 8 or 16 bits per channel")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # converting directly to RGB warns about the alpha channel
    return np.array(upright.convert("RGB"))
