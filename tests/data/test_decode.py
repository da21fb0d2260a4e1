"""Decoded pixels equal Pillow's for common file types, and errors name the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from boxwright.data.decode import decode_image

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def reference(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_lossless_files_are_exact(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(PIXELS).convert(mode).save(path)
    decoded = decode_image(path)
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, reference(path))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_differ_by_at_most_2(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(PIXELS).convert(mode).save(path)
    assert np.abs(decode_image(path).astype(int) - reference(path)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif)
    expected = reference(path)
    assert expected.shape[:2] == ((37, 53) if orientation < 5 else (53, 37))
    assert np.abs(decode_image(path).astype(int) - expected).max() <= 2


def test_alpha_is_dropped_without_blending(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])).save(path)
    np.testing.assert_array_equal(decode_image(path), PIXELS)


def test_a_palette_with_transparency_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).convert("P").save(path, transparency=bytes(range(256)))
    assert decode_image(path).shape == PIXELS.shape


def test_16_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    grey = np.random.default_rng(0).integers(0, 1 << 16, (20, 30), dtype=np.uint16)
    Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(decode_image(path), np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.95])
def test_a_truncated_file_is_an_error(tmp_path: Path, suffix: str, fraction: float) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(PIXELS).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match=f"image.{suffix}: cannot be decoded"):
        decode_image(path)


def test_bytes_after_the_end_of_a_jpeg_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(PIXELS).save(path)
    expected = decode_image(path)
    path.write_bytes(path.read_bytes() + b"trailer")
    assert np.abs(decode_image(path).astype(int) - expected).max() <= 2


def test_missing_files_and_text_files_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing.jpg: cannot be read: No such file"):
        decode_image(tmp_path / "missing.jpg")
    (tmp_path / "notes.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes.jpg: cannot be decoded"):
        decode_image(tmp_path / "notes.jpg")


def test_the_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    # The file has no pixel data, so decoding it would raise a different error.
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"image.png: image is too large \(53 x 37"):
        decode_image(path, max_pixels=1000)


def test_a_decompression_bomb_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 10000)).save(path)
    with pytest.raises(ValueError, match=r"bomb.png: image is too large"):
        decode_image(path)


def test_images_of_public_data_sets(data_dir: Path) -> None:
    paths = [
        *sorted((data_dir / "coco_mini" / "val2017").glob("*.jpg"))[:10],
        *sorted((data_dir / "bccd" / "JPEGImages").glob("*.jpg"))[:3],
        *sorted((data_dir / "nuclei" / "images").glob("*.png"))[:5],
    ]
    assert len(paths) == 18
    for path in paths:
        assert np.abs(decode_image(path).astype(int) - reference(path)).max() <= (0 if path.suffix == ".png" else 2)


def test_every_exception_of_pillow_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x05IHDR" + bytes(30))  # a header for which Pillow raises ValueError
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded"):
        decode_image(path)


def test_the_error_of_a_file_that_is_not_an_image_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for content, reason in ((b"", "the file is empty"), (b"hello", "unknown image format")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.jpg: cannot be decoded: .*{reason}[^<]*$"):
            decode_image(path)


def test_pipes_and_folders_are_an_error(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(ValueError, match="not a file"):
            decode_image(path)
