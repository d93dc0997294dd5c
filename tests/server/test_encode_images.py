"""EncodeImages and GetModelInfo on a real server, message by message."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from encoder_svc._generated.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from encoder_svc.client import EncoderClient, PixelValues
from encoder_svc.images.types import GridThw
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.tower import load_tower, make_attention
from encoder_svc.platforms import platform_for_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.serving import ServerProcess

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def respond(server: ServerProcess, *images: encoder_pb2.Image, request_id: str = "") -> list:
    with grpc.insecure_channel(server.target) as channel:
        request = encoder_pb2.EncodeImagesRequest(images=images, request_id=request_id)
        return list(encoder_pb2_grpc.EncoderStub(channel).EncodeImages(request, timeout=60))


def events(responses: list, index: int) -> list[str]:
    names = [(response.WhichOneof("event"), response) for response in responses]
    return [name for name, r in names if name != "summary" and getattr(r, name).index == index]


@pytest.fixture
def photo(photos: list[Path]) -> encoder_pb2.Image:
    return encoder_pb2.Image(encoded=photos[0].read_bytes())


def test_an_image_is_a_header_then_chunks_then_done(server: Callable[..., ServerProcess], photo) -> None:
    responses = respond(server("qwen3_vl"), photo)
    names = events(responses, 0)
    assert names[0] == "header"
    assert names[-1] == "done"
    assert set(names[1:-1]) == {"chunk"}


def test_the_summary_comes_last_and_adds_up(server, photo) -> None:
    responses = respond(server("qwen2_5_vl"), photo, photo, encoder_pb2.Image(), request_id="r-1")
    headers = [r.header for r in responses if r.HasField("header")]
    summary = responses[-1].summary
    assert (summary.num_images, summary.num_failed) == (3, 1)
    assert summary.num_rows == sum(header.rows for header in headers)
    assert summary.num_bytes == sum(header.byte_length for header in headers)
    assert summary.request_id == "r-1"


def test_chunks_follow_each_other_and_match_the_checksum(server, photo) -> None:
    responses = respond(server("qwen3_vl", "--max-pixels", "4000000"), photo)
    data = b""
    for chunk in (r.chunk for r in responses if r.HasField("chunk")):
        assert chunk.offset == len(data)
        assert 0 < len(chunk.data) <= 2**20
        data += chunk.data
    header = next(r.header for r in responses if r.HasField("header"))
    done = next(r.done for r in responses if r.HasField("done"))
    assert len(data) == header.byte_length == header.rows * header.width * 4
    assert zlib.crc32(data) == done.crc32


def test_a_large_image_comes_in_several_chunks(server) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), np.uint8)
    raw = encoder_pb2.Image(raw=encoder_pb2.RawImage(height=1600, width=1600, data=noise.tobytes()))
    responses = respond(server("qwen3_vl", "--max-pixels", "4000000"), raw)
    assert events(responses, 0).count("chunk") > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_transformers_with_its_own_processor(
    server, family, tiny_checkpoint, photos: list[Path]
) -> None:
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(family), dtype=torch.float32).eval()
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny_checkpoint(family))
    pixels = processor([Image.open(photo).convert("RGB") for photo in photos], return_tensors="pt")
    with torch.inference_mode():
        out = model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
    wanted = torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], dim=-1).numpy()
    with EncoderClient(server(family, "--resize", "pillow").target) as client:
        images = client.encode(photos)
    assert [image.grid_thw for image in images] == [tuple(grid) for grid in pixels["image_grid_thw"].tolist()]
    got = np.concatenate([image.embeddings for image in images])
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_one_pixel_equals_the_reference(server, tiny_checkpoint) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixel = Image.new("RGB", (1, 1), (200, 100, 50))
    pixels = Qwen2VLImageProcessorPil.from_pretrained(tiny_checkpoint("qwen2_5_vl"))([pixel], return_tensors="np")
    with EncoderClient(server("qwen2_5_vl", "--resize", "pillow").target) as client:
        grid = tuple(pixels["image_grid_thw"][0].tolist())
        [as_image, as_values] = client.encode([pixel, PixelValues(pixels["pixel_values"], grid)])
    assert as_image.grid_thw == grid
    np.testing.assert_allclose(as_image.embeddings, as_values.embeddings, rtol=0, atol=1e-5)


def test_raw_pixels_and_a_file_of_the_same_pixels_give_the_same_bytes(server, photos: list[Path]) -> None:
    buffer = io.BytesIO()
    image = Image.open(photos[1])
    image.save(buffer, "PNG")
    with EncoderClient(server("qwen2_vl").target) as client:
        [from_file, from_pixels] = client.encode([buffer.getvalue(), np.asarray(image)])
    assert from_file.embeddings.tobytes() == from_pixels.embeddings.tobytes()
    assert from_file.content_key != from_pixels.content_key


def test_the_same_image_has_the_same_key_and_another_has_another(server, photos: list[Path]) -> None:
    with EncoderClient(server("qwen2_vl").target) as client:
        keys = [image.content_key for image in client.encode([photos[0], photos[1], photos[0]])]
    assert keys[0] == keys[2] != keys[1]
    assert len(keys[0]) == 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_single(server, dtype, photos: list[Path]) -> None:
    def encode(*options: str) -> np.ndarray:
        with EncoderClient(server("qwen3_vl", *options).target) as client:
            return client.encode(photos[:1])[0].embeddings

    exact, rounded = encode(), encode("--dtype", dtype)
    assert rounded.dtype.name == dtype
    difference = np.linalg.norm(rounded.astype(np.float32) - exact) / np.linalg.norm(exact)
    assert 0 < difference < 5e-2


def test_model_info_says_what_is_served(server, tiny_checkpoint) -> None:
    with EncoderClient(server("qwen3_vl").target) as client:
        info = client.info()
    assert (info.family, info.dtype, info.platform) == ("qwen3_vl", "float32", "cpu")
    assert (info.out_hidden_size, info.num_deepstack, info.width) == (64, 3, 256)
    assert (info.patch_size, info.temporal_patch_size, info.spatial_merge_size) == (16, 2, 2)
    assert (info.attention.backend, info.attention.source) == ("TORCH_SDPA", "platform")
    assert info.processor.resize == "torch"
    assert info.transports == ("stream", "retain")
    assert info.model == tiny_checkpoint("qwen3_vl").name
    assert info.revision.startswith("sha256:")


def test_an_overridden_backend_serves_and_agrees(server, photos: list[Path]) -> None:
    results = []
    for backend in ("TORCH_SDPA", "torch_naive"):
        with EncoderClient(server("qwen2_5_vl", "--mm-encoder-attn-backend", backend).target) as client:
            attention = client.info().attention
            assert (attention.backend, attention.source) == (backend.upper(), "override")
            results.append(client.encode(photos[:2]))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one.embeddings, other.embeddings, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def tower(tiny_checkpoint) -> Iterator:
    checkpoint = Checkpoint(str(tiny_checkpoint("qwen2_5_vl")))
    platform = platform_for_device("cpu")
    attention = make_attention(checkpoint, platform=platform, dtype="float32", override=None)
    settings = checkpoint.processor_settings(resize="torch")
    return load_tower(checkpoint, settings, lambda: attention, platform=platform, device="cpu", dtype="float32")


def test_pixel_values_with_several_frames_are_encoded(server, tower) -> None:
    grid = GridThw(3, 4, 6)
    values = np.random.default_rng(1).standard_normal((grid.num_patches, tower.settings.patch_dim), np.float32)
    with torch.inference_mode():
        wanted = tower.encoder([torch.from_numpy(values)], tower.encoder.build_inputs([grid])).numpy()
    with EncoderClient(server("qwen2_5_vl").target) as client:
        [image] = client.encode([PixelValues(values, tuple(grid))])
    np.testing.assert_allclose(image.embeddings, wanted, rtol=0, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_a_gpu_agrees_with_the_cpu(server, photos: list[Path], family: str, dtype: str, tolerance: float) -> None:
    def encode(*options: str) -> np.ndarray:
        with EncoderClient(server(family, *options).target) as client:
            images = client.encode(photos)
        return np.concatenate([image.embeddings.astype(np.float32) for image in images])

    on_cpu, on_gpu = encode(), encode("--device", "cuda", "--dtype", dtype)
    assert np.linalg.norm(on_gpu - on_cpu) <= tolerance * np.linalg.norm(on_cpu)
