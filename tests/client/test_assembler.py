"""An answer that breaks the protocol is never taken for embeddings."""

from __future__ import annotations

import gc
import weakref
import zlib

import pytest

from encoder_svc._generated.encoder.v1 import encoder_pb2 as pb
from encoder_svc.client.assembler import Assembler, all_good
from encoder_svc.client.types import EncodedImage
from encoder_svc.errors import RequestError, request_error

DATA = bytes(range(24))


def header(index: int = 0, **changes: int) -> pb.EncodeImagesResponse:
    fields = {"rows": 2, "width": 3, "dtype": pb.DTYPE_FLOAT32, "byte_length": 24} | changes
    return pb.EncodeImagesResponse(header=pb.ItemHeader(index=index, grid_thw=pb.GridThw(t=1, h=2, w=4), **fields))


def chunk(offset: int, data: bytes, index: int = 0) -> pb.EncodeImagesResponse:
    return pb.EncodeImagesResponse(chunk=pb.ItemChunk(index=index, offset=offset, data=data))


def done(crc32: int | None = None, index: int = 0) -> pb.EncodeImagesResponse:
    return pb.EncodeImagesResponse(done=pb.ItemDone(index=index, crc32=zlib.crc32(DATA) if crc32 is None else crc32))


SUMMARY = pb.EncodeImagesResponse(summary=pb.Summary(num_images=1))


def feed(*responses: pb.EncodeImagesResponse, num_images: int = 1) -> list:
    assembler = Assembler(num_images)
    settled = [assembler.feed(response) for response in responses]
    assembler.finish()
    return [result for result in settled if result is not None]


def test_a_good_answer_becomes_an_image() -> None:
    [image] = feed(header(), chunk(0, DATA[:10]), chunk(10, DATA[10:]), done(), SUMMARY)
    assert isinstance(image, EncodedImage)
    assert image.embeddings.tobytes() == DATA
    assert image.embeddings.shape == (2, 3)


def test_images_may_be_interleaved() -> None:
    images = feed(
        header(0), header(1), chunk(0, DATA, 1), chunk(0, DATA, 0), done(index=1), done(index=0), SUMMARY, num_images=2
    )
    assert [image.index for image in images] == [1, 0]


@pytest.mark.parametrize(
    "responses",
    [
        [header(byte_length=25)],
        [header(byte_length=2**40, rows=2)],
        [header(rows=2**31, width=2**20, byte_length=2**53)],
        [header(rows=2**32 - 1, width=2**30 - 1, byte_length=(2**32 - 1) * (2**30 - 1) * 4)],
        [header(num_deepstack=1)],
        [header(dtype=0)],
        [header(1)],
        [header(), header()],
        [chunk(0, DATA)],
        [header(), chunk(1, DATA[1:])],
        [header(), chunk(0, DATA + b"x")],
        [header(), chunk(0, DATA[:12]), chunk(0, DATA[12:])],
        [header(), chunk(0, DATA[:12]), done()],
        [done()],
        [header(), chunk(0, DATA), done(), done()],
        [header(), chunk(0, DATA), done()],
        [header(), chunk(0, DATA), SUMMARY],
    ],
)
def test_a_broken_answer_is_refused(responses: list[pb.EncodeImagesResponse]) -> None:
    with pytest.raises(RequestError) as caught:
        feed(*responses)
    assert caught.value.reason == "PROTOCOL_ERROR"


def test_an_image_that_failed_keeps_none_of_the_others() -> None:
    def told() -> weakref.ref[object]:
        [image] = feed(header(), chunk(0, DATA), done(), SUMMARY)
        reference = weakref.ref(image.embeddings)
        broken = request_error("IMAGE_CORRUPT", "Broken.", image_index=1, retry_after_s=2.0)
        try:
            all_good([image, broken], EncodedImage)
        except RequestError as error:  # pytest.raises would itself be held by the error
            assert str(error) == str(broken)
            assert vars(error) == vars(broken)
        return reference

    gc.disable()
    try:
        reference = told()
        assert reference() is None
    finally:
        gc.enable()


def test_damaged_bytes_are_found_by_the_checksum() -> None:
    with pytest.raises(RequestError) as caught:
        feed(header(), chunk(0, DATA[:-1] + b"\xff"), done(), SUMMARY)
    assert (caught.value.reason, caught.value.code) == ("CHECKSUM_MISMATCH", "DATA_LOSS")
