"""The shape of the code: arrows between folders, the public surface, nothing forbidden."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import encoder_svc.client

ROOT = Path(__file__).parents[1]
SOURCES = [path for path in (ROOT / "encoder_svc").rglob("*.py") if "_generated" not in path.parts]


def test_arrows_between_folders_point_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_clients_public_surface_is_what_it_declares() -> None:
    assert set(encoder_svc.client.__all__) == {
        "ROUND_ROBIN",
        "AsyncEncoderClient",
        "AttentionInfo",
        "CancelledError",
        "DeadlineError",
        "EncodedImage",
        "EncoderClient",
        "ImageInput",
        "InternalError",
        "InvalidInputError",
        "LimitsInfo",
        "ModelInfo",
        "NotFoundError",
        "OverloadedError",
        "PixelValues",
        "ProcessorInfo",
        "RequestError",
        "RetainedImage",
        "StageTimings",
        "UnavailableError",
    }
    assert all(hasattr(encoder_svc.client, name) for name in encoder_svc.client.__all__)


@pytest.mark.parametrize("forbidden", [r"\bpickle\b.*import|import pickle", r"torch\.load\(", r"trust_remote_code"])
def test_nothing_reads_pickles_or_remote_code(forbidden: str) -> None:
    assert [path.name for path in SOURCES if re.search(forbidden, path.read_text())] == []


def test_only_the_config_reads_the_environment() -> None:
    readers = {path.relative_to(ROOT).as_posix() for path in SOURCES if "os.environ" in path.read_text()}
    assert readers <= {"encoder_svc/cli.py", "encoder_svc/config.py"}


def test_generated_code_is_that_of_the_proto() -> None:
    """Every field of the .proto stands in the committed code, with its number."""
    from encoder_svc._generated.encoder.v1 import encoder_pb2

    text = (ROOT / "protos/encoder/v1/encoder.proto").read_text()
    declared = {
        message: dict(re.findall(r"^\s+(?:repeated |optional )?[\w.]+ (\w+) = (\d+);", body, re.MULTILINE))
        for message, body in re.findall(r"^message (\w+) \{(?:\}|(.*?)^\})", text, re.MULTILINE | re.DOTALL)
    }
    generated = {
        name: {field.name: str(field.number) for field in message.fields}
        for name, message in encoder_pb2.DESCRIPTOR.message_types_by_name.items()
    }
    assert declared == generated
