"""PIL images as they are sent: the server has to see in them what it sees in a file of the same content."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from encoder_svc.client.request import encode_request
from encoder_svc.images.decode import OpenedImage
from encoder_svc.images.limits import Limits

if TYPE_CHECKING:
    from pathlib import Path

TRANSPARENT_RED = Image.new("RGBA", (4, 3), (255, 0, 0, 0))


def seen(image: Image.Image) -> np.ndarray:
    """The pixels that the server sees, [height, width, 3] uint8."""
    sent = encode_request([image], "").images[0]
    if sent.WhichOneof("source") == "raw":
        return np.frombuffer(sent.raw.data, np.uint8).reshape(sent.raw.height, sent.raw.width, 3)
    return OpenedImage(sent.encoded, Limits()).decode()


def greys(mode: str) -> Image.Image:
    """A ramp over 16 bits."""
    values = np.linspace(0, 65_535, 48).reshape(6, 8)
    dtype = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
    return Image.frombytes(mode, (8, 6), values.astype(dtype).tobytes())


def file(image: Image.Image, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **how)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_a_grey_of_16_bits_is_seen_as_its_file(mode: str) -> None:
    of_file = OpenedImage(file(greys("I;16")), Limits()).decode()
    assert of_file.max() == 255
    np.testing.assert_array_equal(seen(greys(mode)), of_file)


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_the_grey_that_is_transparent_is_seen_on_white(mode: str) -> None:
    image = Image.new(mode, (4, 3), 30_000)
    image.info["transparency"] = 30_000
    assert (seen(image) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "PA", "LA", "La"])
def test_what_is_transparent_is_seen_on_white(mode: str) -> None:
    by_way_of = {"RGBa": "RGBA", "La": "LA"}
    assert (seen(TRANSPARENT_RED.convert(by_way_of.get(mode, mode)).convert(mode)) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "PA"])
def test_what_is_half_transparent_is_seen_as_its_file(mode: str) -> None:
    half = Image.new("RGBA", (4, 3), (255, 0, 0, 128))
    np.testing.assert_allclose(seen(half.convert(mode)), OpenedImage(file(half), Limits()).decode(), atol=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_seen_as_their_colours(photos: list[Path], mode: str) -> None:
    image = Image.open(photos[0]).resize((32, 24)).convert(mode)
    np.testing.assert_array_equal(seen(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (Image.new("F", (4, 3), 0.5), r"mode F cannot be sent: no value of it is known to be white; scale it"),
        (Image.new("I", (4, 3), 65_536), r"mode I cannot be sent: its values go from 65536 to 65536, .* scale it"),
        (Image.new("I", (4, 3), -1), r"mode I cannot be sent: its values go from -1 to -1, .* scale it"),
        (Image.new("I", (4, 3), 255), r"mode I cannot be sent: its values go to 255, .* convert it to L or to I;16\."),
    ],
)
def test_values_of_which_nobody_knows_what_they_mean_are_refused(image: Image.Image, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        encode_request([image], "")


def test_a_file_that_is_cut_short_is_refused_for_that(photos: list[Path]) -> None:
    cut = Image.open(io.BytesIO(photos[0].read_bytes()[:2000]))
    with pytest.raises(ValueError, match=r"mode RGB cannot be sent: image file is truncated"):
        encode_request([cut], "")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "La"])
@pytest.mark.parametrize("size", [(0, 3), (4, 0)])
def test_an_image_without_pixels_is_left_to_the_server_to_refuse(mode: str, size: tuple[int, int]) -> None:
    raw = encode_request([Image.new(mode, size)], "").images[0].raw
    assert (raw.width, raw.height, raw.data) == (*size, b"")
