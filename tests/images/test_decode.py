"""What is decoded, to which pixels, and that whatever else comes in is refused with a reason."""

from __future__ import annotations

import io
import itertools
import random
import struct
import time
import zlib
from typing import TYPE_CHECKING

import numpy as np
import PIL
import pytest
import simplejpeg
from PIL import Image

from encoder_svc.errors import InvalidInputError, Reason, RequestError
from encoder_svc.images import decode
from encoder_svc.images.decode import decoders
from encoder_svc.images.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from encoder_svc.images.decode import OpenedImage
    from encoder_svc.images.processor import ImageProcessor, ProcessorSettings

WHITE = [255, 255, 255]
DECODE_REASONS = {
    Reason.IMAGE_MISSING,
    Reason.IMAGE_FORMAT,
    Reason.IMAGE_CORRUPT,
    Reason.IMAGE_SIDE,
    Reason.IMAGE_PIXELS,
    Reason.IMAGE_ASPECT_RATIO,
}
ORIENTATIONS: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored.transpose(1, 0, 2)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: stored.transpose(1, 0, 2)[::-1],
}
"""From the pixels as stored to the pixels as seen; EXIF 2.32, tag 0x0112: where row 0 and column 0 of the file lie."""


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def scene() -> Image.Image:
    """24 x 40, and different under each of the eight orientations."""
    height_down, width_across = np.mgrid[0:24, 0:40]
    return Image.fromarray(np.stack([height_down * 10, width_across * 6, height_down * 0 + 40], -1).astype(np.uint8))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


# Formats and colours


@pytest.mark.parametrize(("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})], ids=["png", "webp"])
def test_lossless_files_decode_to_their_exact_pixels(image_format: str, options: dict, open_image) -> None:
    opened = open_image(encode(scene(), image_format, **options))
    assert (opened.height, opened.width) == (24, 40)
    assert np.array_equal(opened.decode(), np.asarray(scene()))


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_jpeg_decodes_to_nearly_its_pixels(options: dict, open_image) -> None:
    decoded = open_image(encode(scene(), "JPEG", quality=95, **options)).decode().astype(int)
    assert np.abs(decoded - np.asarray(scene())).mean() < 2


def test_a_palette_becomes_its_colours(open_image) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([1, 0])
    assert open_image(encode(image, "PNG")).decode().tolist() == [[[40, 50, 60], [10, 20, 30]]]


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(image_format: str, open_image) -> None:
    decoded = open_image(encode(Image.new("L", (8, 8), 100), image_format)).decode()
    assert decoded.tolist() == [[[100, 100, 100]] * 8] * 8


def test_bilevel_becomes_black_and_white(open_image) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert open_image(encode(image, "PNG")).decode().tolist() == [[[0, 0, 0], WHITE]]


@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 255, 255, 0), (255, 0, 0))],
    ids=["paper", "black", "red"],
)
def test_a_cmyk_jpeg_becomes_the_colour_of_its_inks(ink: tuple, colour: tuple, open_image) -> None:
    decoded = open_image(encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)).decode()
    assert np.abs(decoded.astype(int) - colour).max() <= 2


def test_a_full_scale_ramp_of_16_bit_grey_maps_to_the_8_bit_scale(png_file, open_image) -> None:
    ramp = np.arange(65_536, dtype=">u2").reshape(256, 256)
    data = png_file(width=256, height=256, bit_depth=16, colour_type=0, rows=ramp.tobytes())
    decoded = open_image(data).decode()
    assert decoded[:, 0, 0].tolist() == list(range(256))
    assert np.array_equal(decoded, np.repeat((ramp >> 8)[..., None], 3, axis=2))


def test_16_bit_colour_keeps_its_high_bytes(png_file, open_image) -> None:
    rows = struct.pack(">6H", 0x1234, 0x00FF, 0xFFFF, 0x8000, 0x7FFF, 0x0100)
    data = png_file(width=2, height=1, bit_depth=16, colour_type=2, rows=rows)
    assert open_image(data).decode().tolist() == [[[0x12, 0, 255], [0x80, 0x7F, 1]]]


@pytest.mark.parametrize(("bit_depth", "row"), [(2, 0b00_01_10_11), (4, 0x05)], ids=["2-bit", "4-bit"])
def test_coarse_grey_is_widened_to_the_8_bit_scale(bit_depth: int, row: int, png_file, open_image) -> None:
    width = 8 // bit_depth
    data = png_file(width=width, height=1, bit_depth=bit_depth, colour_type=0, rows=bytes([row]))
    expected = [0, 85, 170, 255] if bit_depth == 2 else [0, 85]
    assert open_image(data).decode()[0, :, 0].tolist() == expected


# Transparency


def test_rgba_is_composited_on_white(open_image) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 0, 0), (200, 0, 0, 128), (200, 0, 0, 255)])
    clear, half, solid = open_image(encode(image, "PNG")).decode()[0].tolist()
    assert clear == WHITE
    assert half == pytest.approx([227, 127, 127], abs=1)
    assert solid == [200, 0, 0]


def test_webp_transparency_is_composited_on_white(open_image) -> None:
    image = Image.new("RGBA", (2, 1))
    image.putdata([(200, 0, 0, 0), (200, 0, 0, 255)])
    data = encode(image, "WEBP", lossless=True, exact=True)
    assert open_image(data).decode().tolist() == [[WHITE, [200, 0, 0]]]


def test_grey_with_alpha_is_composited_on_white(open_image) -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(10, 0), (10, 255)])
    assert open_image(encode(image, "PNG")).decode().tolist() == [[WHITE, [10, 10, 10]]]


@pytest.mark.parametrize(
    "transparency", [0, b"\x00\xff", b"\x00"], ids=["one index", "an alpha for each", "fewer alphas than colours"]
)
def test_a_palette_with_transparency_is_composited_on_white(transparency: int | bytes, open_image) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    data = encode(image, "PNG", transparency=transparency)
    assert open_image(data).decode().tolist() == [[WHITE, [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "P with transparency", "I;16", "CMYK"])
def test_an_image_that_is_converted_some_rows_at_a_time_has_the_same_pixels(
    mode: str, monkeypatch: pytest.MonkeyPatch, open_image
) -> None:
    image, options = scene(), {}
    if mode == "I;16":
        image = Image.fromarray(np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 68)
    elif mode.startswith("P"):
        image = image.quantize(16)
        options = {"transparency": 3} if "transparency" in mode else {}
    else:
        image = image.convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(scene().convert("L"))
    data = encode(image, "JPEG" if mode == "CMYK" else "PNG", **options)
    whole = open_image(data).decode()
    monkeypatch.setattr(decode, "_PIXELS_AT_A_TIME", 40 * 7)  # 24 rows are no multiple of 7
    np.testing.assert_array_equal(open_image(data).decode(), whole)
    assert len(np.unique(whole)) > 1


@pytest.mark.parametrize(
    ("bit_depth", "colour_type", "rows", "transparent", "expected"),
    [
        pytest.param(8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 1, 2, 3), [4, 5, 6], id="8-bit colour"),
        pytest.param(
            16,
            2,
            struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x3400, 0x7800, 0xBC00),
            struct.pack(">3H", 0x1234, 0x5678, 0x9ABC),
            [0x34, 0x78, 0xBC],
            id="16-bit colour",
        ),
        pytest.param(8, 0, bytes([7, 8]), struct.pack(">H", 7), [8, 8, 8], id="8-bit grey"),
        pytest.param(
            16, 0, struct.pack(">2H", 0x1234, 0x1235), struct.pack(">H", 0x1234), [0x12] * 3, id="16-bit grey"
        ),
        pytest.param(4, 0, bytes([0x72]), struct.pack(">H", 7), [0x22] * 3, id="4-bit grey"),
        pytest.param(2, 0, bytes([0b01_10_0000]), struct.pack(">H", 1), [170] * 3, id="2-bit grey"),
        pytest.param(1, 0, bytes([0b10_000000]), struct.pack(">H", 1), [0] * 3, id="1-bit grey"),
    ],
)
def test_a_transparent_colour_of_png_is_white_and_no_other(
    bit_depth: int, colour_type: int, rows: bytes, transparent: bytes, expected: list[int], png_file, open_image
) -> None:
    data = png_file(
        width=2,
        height=1,
        bit_depth=bit_depth,
        colour_type=colour_type,
        rows=rows,
        before=[(b"tRNS", transparent)],
    )
    first, second = open_image(data).decode()[0].tolist()
    assert second == expected
    assert first == WHITE


# Orientation


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_pixels_come_out_upright(image_format: str, orientation: int, open_image) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(image_format, {})
    opened = open_image(encode(scene(), image_format, exif=exif(orientation), **options))
    expected = ORIENTATIONS[orientation](np.asarray(scene())).astype(int)
    assert (opened.height, opened.width) == expected.shape[:2]
    assert np.abs(opened.decode() - expected).max() <= (4 if image_format == "JPEG" else 0)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_exif_counts_before_and_after_the_pixels_of_a_png(place: str, orientation: int, png_file, open_image) -> None:
    chunk = (b"eXIf", exif(orientation).removeprefix(b"Exif\0\0"))
    opened = open_image(
        png_file(
            width=40,
            height=24,
            bit_depth=8,
            colour_type=2,
            rows=scene().tobytes(),
            **{place: [(b"tEXt", b"a\0b"), chunk]},
        )
    )
    expected = ORIENTATIONS[orientation](np.asarray(scene()))
    assert (opened.height, opened.width) == expected.shape[:2]
    assert np.array_equal(opened.decode(), expected)


def test_exif_in_a_pngs_raw_profile_counts(png_file, open_image) -> None:
    """As ImageMagick wrote it before PNG had an eXIf chunk."""
    body = exif(6)
    profile = f"\nexif\n{len(body):8}\n{body.hex()}\n".encode()
    opened = open_image(
        png_file(
            width=40,
            height=24,
            bit_depth=8,
            colour_type=2,
            rows=scene().tobytes(),
            before=[(b"tEXt", b"Raw profile type exif\0" + profile)],
        )
    )
    assert np.array_equal(opened.decode(), ORIENTATIONS[6](np.asarray(scene())))


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_exif_does_not_know_is_taken_as_upright(orientation: int, open_image) -> None:
    assert np.array_equal(open_image(encode(scene(), "PNG", exif=exif(orientation))).decode(), np.asarray(scene()))


@pytest.mark.parametrize("block", [b"", b"nonsense", b"Exif\0\0", b"II*\0\xff\xff\xff\xff"])
def test_a_broken_exif_block_does_not_lose_the_pixels(block: bytes, png_file, open_image) -> None:
    data = png_file(width=40, height=24, bit_depth=8, colour_type=2, rows=scene().tobytes(), before=[(b"eXIf", block)])
    assert np.array_equal(open_image(data).decode(), np.asarray(scene()))


def test_limits_hold_for_the_sides_as_stored_and_as_seen(open_image) -> None:
    tall = encode(Image.new("RGB", (1, 201)), "PNG", exif=exif(6))
    with pytest.raises(RequestError) as refused:
        open_image(tall)
    assert refused.value.reason == Reason.IMAGE_ASPECT_RATIO


# More than one picture


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("WEBP", {"lossless": True, "duration": 50}), ("PNG", {"duration": 50})],
    ids=["animated WebP", "APNG"],
)
def test_an_animation_gives_its_first_frame(image_format: str, options: dict, open_image) -> None:
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in colours]
    data = encode(first, image_format, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert open_image(data).decode().tolist() == [[list(colours[0])] * 8] * 8


def test_a_jpeg_with_several_pictures_gives_its_first(open_image) -> None:
    second = Image.new("RGB", (40, 24), (0, 0, 255))
    data = encode(scene(), "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.array_equal(open_image(data).decode(), open_image(encode(scene(), "JPEG", quality=95)).decode())


# What is refused


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused_though_pillow_reads_them(image_format: str, open_image) -> None:
    data = encode(scene(), image_format)
    with pytest.raises(InvalidInputError) as refused:
        open_image(data)
    assert refused.value.reason == Reason.IMAGE_FORMAT


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"hello, this is not an image",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        b"%PDF-1.7\n",
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        bytes(4096),
    ],
    ids=["one byte", "text", "SVG", "PDF", "WAV", "zeros"],
)
def test_what_is_no_image_is_refused_as_a_format(data: bytes, open_image) -> None:
    with pytest.raises(InvalidInputError) as refused:
        open_image(data)
    assert refused.value.reason == Reason.IMAGE_FORMAT


def test_no_bytes_are_refused_as_missing(open_image) -> None:
    with pytest.raises(InvalidInputError) as refused:
        open_image(b"")
    assert refused.value.reason == Reason.IMAGE_MISSING


def files() -> dict[str, bytes]:
    noise = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    return {
        "JPEG": encode(image, "JPEG", exif=exif(6)),
        "progressive JPEG": encode(image, "JPEG", progressive=True),
        "PNG": encode(image, "PNG", exif=exif(6)),
        "WebP": encode(image, "WEBP", exif=exif(6)),
        "lossless WebP": encode(image, "WEBP", lossless=True),
        "animated WebP": encode(image, "WEBP", save_all=True, append_images=[image.rotate(180)]),
    }


FILES = files()


@pytest.mark.parametrize("cut", [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("file", FILES)
def test_a_truncated_image_is_refused_as_corrupt(file: str, cut: float, open_image) -> None:
    data = FILES[file]
    with pytest.raises(InvalidInputError) as refused:
        open_image(data[: int(len(data) * cut)]).decode()
    assert refused.value.reason == Reason.IMAGE_CORRUPT


@pytest.mark.parametrize("length", range(3, 64))
@pytest.mark.parametrize("file", ["JPEG", "PNG", "WebP"])
def test_a_file_cut_within_its_header_is_refused(file: str, length: int, open_image) -> None:
    with pytest.raises(InvalidInputError) as refused:
        open_image(FILES[file][:length]).decode()
    whole_signature = {"JPEG": 3, "PNG": 8, "WebP": 12}[file]
    assert refused.value.reason == (Reason.IMAGE_CORRUPT if length >= whole_signature else Reason.IMAGE_FORMAT)


def test_a_png_whose_pixels_are_fewer_than_its_header_says_is_refused_as_corrupt(png_file, open_image) -> None:
    data = png_file(width=40, height=30, bit_depth=8, colour_type=2, rows=bytes(40 * 3 * 3))
    with pytest.raises(InvalidInputError) as refused:
        open_image(data).decode()
    assert refused.value.reason == Reason.IMAGE_CORRUPT


def test_a_png_that_declares_far_too_many_pixels_is_told_how_many_are_taken(png_file) -> None:
    data = png_file(width=2**31, height=2**31, bit_depth=8, colour_type=2, rows=b"")
    with pytest.raises(InvalidInputError) as caught:
        decode.OpenedImage(data, Limits(max_image_pixels=12_345))
    assert caught.value.reason == "IMAGE_PIXELS"
    assert caught.value.message.endswith("at most 12345.")


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_file_that_declares_a_side_of_0_is_refused_as_corrupt(side: str, open_image) -> None:
    data = bytearray(encode(scene(), "PNG"))
    start = {"width": 16, "height": 20}[side]
    data[start : start + 4] = bytes(4)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))  # the header's own
    with pytest.raises(InvalidInputError) as caught:
        open_image(bytes(data))
    assert caught.value.reason == "IMAGE_CORRUPT"


def test_a_png_with_a_broken_chunk_amid_its_pixels_is_refused_as_corrupt(open_image) -> None:
    """Pillow reports this one as a SyntaxError, and only once the pixels are read."""
    noise = np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "PNG")
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    opened = open_image(data[:second] + b"\xff\xff\xff\xff" + data[second + 4 :])
    with pytest.raises(InvalidInputError) as refused:
        opened.decode()
    assert refused.value.reason == Reason.IMAGE_CORRUPT
    assert isinstance(refused.value.__cause__, SyntaxError)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of oddities and reads on, as it does in service
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("file", FILES)
def test_random_damage_never_yields_anything_but_pixels_or_a_reason(
    file: str, seed: int, processor: ImageProcessor, open_image
) -> None:
    dice = random.Random(f"{file} {seed}")
    data = bytearray(FILES[file])
    # Half of the damage goes where the structure is: the first bytes.
    reach = len(data) if seed % 2 else 200
    for _ in range(dice.choice([1, 2, 8, 40])):
        data[dice.randrange(reach)] = dice.randrange(256)
    try:
        opened = open_image(bytes(data))
        assert opened.decode().shape == (opened.height, opened.width, 3)
    except RequestError as error:
        assert error.reason in DECODE_REASONS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("photo", ["cat.jpg", "rocket.jpg"])
def test_random_damage_to_a_photograph_never_yields_anything_but_pixels_or_a_reason(
    photo: str, photo_files: dict[str, bytes], open_image
) -> None:
    outcomes = set()
    for seed in range(25):
        dice = random.Random(seed)
        data = bytearray(photo_files[photo])
        for _ in range(seed + 1):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            outcomes.add(open_image(bytes(data)).decode().ndim)
        except RequestError as error:
            outcomes.add(error.reason)
    assert outcomes <= {3, *DECODE_REASONS}


@pytest.mark.filterwarnings("ignore")
def test_chunks_in_any_order_never_yield_anything_but_pixels_or_a_reason(png_file, open_image) -> None:
    extra = [(b"tRNS", bytes(6)), (b"eXIf", b"II"), (b"PLTE", bytes(3)), (b"acTL", struct.pack(">II", 2, 0))]
    for order in itertools.permutations(extra):
        for colour_type, bit_depth in [(0, 2), (0, 16), (2, 8), (2, 16), (3, 4), (4, 8), (6, 8)]:
            data = png_file(
                width=2, height=1, bit_depth=bit_depth, colour_type=colour_type, rows=bytes(16), before=order
            )
            try:
                assert open_image(data).decode().shape == (1, 2, 3)
            except RequestError as error:
                assert error.reason in DECODE_REASONS


@pytest.mark.alone
def test_a_png_of_countless_empty_chunks_is_refused_quickly(png_file, open_image) -> None:
    data = png_file(width=4, height=4, bit_depth=8, colour_type=2, rows=bytes(48), before=[(b"teSt", b"")] * 1_000_000)
    started_s = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        open_image(data)
    assert caught.value.reason == "IMAGE_CORRUPT"
    assert time.perf_counter() - started_s < 1


@pytest.mark.alone
@pytest.mark.parametrize(
    "body",
    [b"\xff" * (20 << 20), b"\xff\xe0\0\2" * (5 << 20), b"\xff\x01" * (10 << 20), bytes(20 << 20)],
    ids=["filling", "empty segments", "markers alone", "no markers"],
)
def test_a_jpeg_of_countless_markers_is_refused_quickly(body: bytes, open_image) -> None:
    started_s = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        open_image(b"\xff\xd8\xff" + body)
    assert caught.value.reason == "IMAGE_CORRUPT"
    assert time.perf_counter() - started_s < 1


def with_scans_again(times: int, between: bytes = b"") -> bytes:
    """A progressive JPEG, 8 million pixels in 48 kB, whose last scan comes that many times more."""
    file = encode(Image.new("RGB", (8000, 1000), (90, 120, 30)), "JPEG", progressive=True)
    last_scan = file[file.rindex(b"\xff\xda") : -2]
    return file[:-2] + (between + last_scan) * times + file[-2:]


@pytest.mark.alone
@pytest.mark.parametrize("between", [b"", b"\xff\xfe\0\6\xff\xd9\0\0"], ids=["", "an end within a comment"])
def test_a_jpeg_of_countless_scans_is_refused_quickly(between: bytes, open_image) -> None:
    data = with_scans_again(50_000, between)
    started_s = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        open_image(data)
    assert caught.value.reason == "IMAGE_CORRUPT"
    assert time.perf_counter() - started_s < 1


def test_scans_count_up_to_the_end_of_the_first_picture(open_image) -> None:
    photo = encode(scene(), "JPEG", progressive=True)
    assert open_image(photo + b"\xff\xda" * 1_000).decode().shape == (24, 40, 3)
    assert open_image(with_scans_again(5)).decode().shape == (1000, 8000, 3)


# JPEG without Pillow


def test_a_colour_jpeg_is_decoded_to_pillows_bits_into_memory_that_may_be_written(
    open_image: Callable[[bytes], OpenedImage], photo_files: dict[str, bytes]
) -> None:
    for photo in photo_files.values():
        pixels = open_image(photo).decode()
        assert pixels.flags.writeable  # what Pillow gives is not
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(photo)).convert("RGB")))


def test_decoders_are_named_with_their_versions_and_part_of_the_processors_hash(
    settings: ProcessorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decoders() == f"pillow {PIL.__version__} simplejpeg {simplejpeg.__version__}"
    before = settings.hash()
    assert settings.hash() == before
    monkeypatch.setattr("encoder_svc.images.processor.decoders", lambda: "pillow 99")
    assert settings.hash() != before


def test_a_jpeg_that_libjpeg_warns_of_is_pillows_to_judge(
    open_image: Callable[[bytes], OpenedImage], photo_files: dict[str, bytes]
) -> None:
    photo = next(iter(photo_files.values()))
    garbled = photo[:-2] + b"\x00" * 64 + photo[-2:]
    wanted = np.asarray(Image.open(io.BytesIO(garbled)).convert("RGB"))
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(garbled)
    assert np.array_equal(open_image(garbled).decode(), wanted)
