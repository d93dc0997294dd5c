"""Images that are sent: each mark makes other bytes of the same image."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from encoder_svc.bench.pictures import EncodedPicture, RawPicture, noise_picture, photo_picture
from encoder_svc.errors import ConfigError
from encoder_svc.images.decode import OpenedImage
from encoder_svc.images.limits import Limits

if TYPE_CHECKING:
    from pathlib import Path

MARKS = (0, 1, 255, 256, 0xFF_D9_FF_D8, 2**64 - 1)


def pixels(data: bytes) -> np.ndarray:
    """What the server makes of it."""
    return OpenedImage(data, Limits()).decode()


def saved(image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(5).integers(0, 256, (37, 51, 3), np.uint8)
    Image.fromarray(noise).save(buffer, image_format, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    return upside_down


@pytest.mark.parametrize(
    "data",
    [
        saved("JPEG"),
        saved("JPEG", progressive=True, exif=exif(), comment=b"mine"),
        saved("PNG"),
        saved("PNG", exif=exif()),
        saved("WEBP"),
        saved("WEBP", lossless=True),
        saved("WEBP", exif=exif()),
    ],
    ids=["jpeg", "jpeg-exif", "png", "png-exif", "webp", "webp-lossless", "webp-exif"],
)
def test_a_marked_file_decodes_to_the_same_pixels(data: bytes) -> None:
    picture = EncodedPicture(data, "made")
    copies = [picture.unique(mark) for mark in MARKS]
    assert len({data, *copies}) == len(MARKS) + 1
    assert picture.plain() == data
    for copy in copies:
        assert np.array_equal(pixels(copy), pixels(data))


def test_marked_photographs_decode_to_the_same_pixels(photos: list[Path]) -> None:
    for photo in photos:
        copy = photo_picture(photo, None).unique(77)
        assert copy != photo.read_bytes()
        assert np.array_equal(pixels(copy), pixels(photo.read_bytes()))


def test_a_mark_changes_the_first_raw_pixels_of_a_copy() -> None:
    black = np.zeros((3, 4, 3), np.uint8)
    picture = RawPicture(black)
    copies = [picture.unique(mark) for mark in MARKS]
    assert len({copy.tobytes() for copy in copies}) == len(MARKS)
    assert all(copy.shape == (3, 4, 3) and not copy[1:].any() for copy in copies)
    assert not black.any()


@pytest.mark.parametrize("image_format", ["jpeg", "png", "raw"])
def test_the_same_seed_makes_the_same_noise(image_format) -> None:
    first, same, other = (noise_picture(50, 30, image_format, seed=seed).plain() for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    decoded = first if image_format == "raw" else pixels(first)
    assert decoded.shape == (30, 50, 3)


def test_noise_takes_as_many_bytes_as_photographs_do() -> None:
    bits = noise_picture(1024, 768, "jpeg", seed=0).num_bytes * 8 / (1024 * 768)
    assert 1 < bits < 2.5


@pytest.mark.parametrize("image_format", ["jpeg", "png", "raw"])
def test_a_photograph_can_be_sent_in_another_format(photos: list[Path], image_format) -> None:
    picture = photo_picture(photos[0], image_format)
    decoded = picture.plain() if image_format == "raw" else pixels(picture.plain())
    assert decoded.shape == pixels(photos[0].read_bytes()).shape


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"hello", "not a JPEG, PNG or WebP file"), (b"\xff\xd8\xff", "a broken image"), (b"\xff\xd8\xff\xe0", "broken")],
)
def test_what_is_no_image_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        photo_picture(tmp_path / "x.jpg", None)
    with pytest.raises(ConfigError, match=r"x\.jpg: not an image"):
        photo_picture(tmp_path / "x.jpg", "raw")


def test_without_pillow_only_raw_noise_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert noise_picture(8, 8, "raw", seed=0).num_bytes == 192
    with pytest.raises(ConfigError, match="Pillow is needed to write a jpeg: pip install pillow"):
        noise_picture(8, 8, "jpeg", seed=0)
