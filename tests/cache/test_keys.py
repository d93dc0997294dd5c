from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_svc.cache.keys import ContentKeys
from encoder_svc.images.types import EncodedImageBytes, GridThw, ImageSource, PixelValues, RawRgb

FIELDS = st.lists(st.binary(max_size=12), max_size=5)


def key(image: ImageSource, *, config_hash: str = "config", processor_hash: str = "processor") -> str:
    return ContentKeys(config_hash, processor_hash).key(image.key_fields())


def test_a_key_is_64_hex_digits() -> None:
    assert len(bytes.fromhex(key(EncodedImageBytes(b"image")))) == 32


def test_a_key_stays_the_same_between_versions() -> None:
    """A shared store outlives a process; a change here wants a new number in the key's domain."""
    expected = "dcfc77ceeb1e2467a5ea98ac9f2bd62103517af5fbfa5d9e43dfcdefaf4a994b"
    assert ContentKeys("config", "processor").key([b"encoded", b"image"]) == expected


def test_the_same_image_has_the_same_key_in_another_process_configured_alike() -> None:
    assert key(EncodedImageBytes(b"image")) == key(EncodedImageBytes(b"image"))


def test_one_key_leaves_no_trace_in_the_next() -> None:
    keys = ContentKeys("config", "processor")
    first = keys.key([b"a"])
    keys.key([b"b"])
    assert keys.key([b"a"]) == first


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([b"ab", b"c"], [b"a", b"bc"]),
        ([b"abc"], [b"ab", b"c"]),
        ([b"a"], [b"a", b""]),
        ([], [b""]),
        ([b"a", b"b"], [b"b", b"a"]),
        ([bytes(8)], [b"", b""]),
    ],
)
def test_fields_do_not_run_together(one: list[bytes], other: list[bytes]) -> None:
    keys = ContentKeys("config", "processor")
    assert keys.key(one) != keys.key(other)


@settings(deadline=None)
@given(FIELDS, FIELDS)
def test_keys_are_equal_only_for_equal_fields(one: list[bytes], other: list[bytes]) -> None:
    keys = ContentKeys("config", "processor")
    assert (keys.key(one) == keys.key(other)) == (one == other)


def test_the_hashes_do_not_run_together() -> None:
    assert ContentKeys("ab", "c").key([]) != ContentKeys("a", "bc").key([])


def test_the_encoder_and_the_processor_each_change_the_key() -> None:
    image = EncodedImageBytes(b"image")
    keys = {key(image), key(image, config_hash="other"), key(image, processor_hash="other")}
    assert len(keys) == 3


def test_everything_that_tells_two_images_apart_changes_the_key() -> None:
    images: list[ImageSource] = [
        EncodedImageBytes(bytes(12)),
        EncodedImageBytes(bytes(11) + b"\1"),
        RawRgb(1, 4, bytes(12)),
        RawRgb(4, 1, bytes(12)),
        RawRgb(2, 2, bytes(12)),
        RawRgb(2, 2, bytes(11) + b"\1"),
        PixelValues(GridThw(1, 2, 4), "float32", bytes(12)),
        PixelValues(GridThw(1, 4, 2), "float32", bytes(12)),
        PixelValues(GridThw(2, 2, 2), "float32", bytes(12)),
        PixelValues(GridThw(1, 2, 4), "float16", bytes(12)),
        PixelValues(GridThw(1, 2, 4), "bfloat16", bytes(12)),
        PixelValues(GridThw(1, 2, 4), "float32", bytes(11) + b"\1"),
    ]
    assert len({key(image) for image in images}) == len(images)
