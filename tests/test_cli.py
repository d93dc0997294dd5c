"""The command line, as a user types it."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open

from encoder_svc.client import EncoderClient
from tests.serving import ENVIRONMENT, command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.serving import ServerProcess


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), check=False, capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encode_writes_what_the_client_gets(server, photos: list[Path], tmp_path: Path, dtype: str) -> None:
    target = server("qwen3_vl", "--dtype", dtype).target
    done = run("encode", *photos, "--target", target, "--out", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    with EncoderClient(target) as client, safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        images = client.encode(photos)
        keys = {f"image.{n}.{name}" for n in range(len(photos)) for name in ("embeddings", "grid_thw")}
        assert set(file.keys()) == keys
        for number, image in enumerate(images):
            stored = file.get_tensor(f"image.{number}.embeddings")
            assert stored.dtype == image.torch().dtype
            assert stored.shape == image.torch().shape
            assert (stored - image.torch()).abs().max() <= 0.05 * image.torch().abs().max()
            assert file.get_tensor(f"image.{number}.grid_thw").tolist() == list(image.grid_thw)


def test_encode_names_the_photograph_that_failed_and_keeps_the_others(server, photos, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(photos[0].read_bytes()[:1000])
    out = tmp_path / "out.safetensors"
    target = server("qwen2_vl").target
    done = run("encode", photos[0], tmp_path / "broken.jpg", photos[1], "--target", target, "--out", out)
    assert done.returncode == 1
    assert "broken.jpg: " in done.stderr
    assert "[IMAGE_CORRUPT]" in done.stderr
    with safe_open(out, framework="np") as file:
        assert {key.split(".")[1] for key in file.keys()} == {"0", "2"}  # noqa: SIM118


def test_encode_of_a_file_that_is_not_there_says_so(server, tmp_path: Path) -> None:
    done = run("encode", tmp_path / "no.jpg", "--target", server("qwen2_vl").target, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "no.jpg: No such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_encode_without_a_server_says_so(photos: list[Path], tmp_path: Path) -> None:
    done = run("encode", photos[0], "--target", "127.0.0.1:1", "--out", tmp_path / "o.safetensors")
    assert done.returncode == 1
    assert "No encoder service answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_info_prints_lines_or_json(server: Callable[..., ServerProcess]) -> None:
    target = server("qwen2_5_vl").target
    assert "attention.backend" in run("info", "--target", target).stdout
    values = json.loads(run("info", "--target", target, "--json").stdout)
    assert values["family"] == "qwen2_5_vl"
    assert values["attention"]["backend"] == "TORCH_SDPA"


def test_make_checkpoint_writes_one_that_serve_takes(tmp_path: Path) -> None:
    done = run("make-checkpoint", "--family", "qwen2_vl", "--seed", "3", tmp_path / "made")
    assert done.returncode == 0
    assert {file.name for file in (tmp_path / "made").iterdir()} >= {"config.json", "model.safetensors"}


def test_make_checkpoint_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    done = run("make-checkpoint", "--family", "qwen2_vl", tmp_path)
    assert done.returncode == 2
    assert "not an empty folder" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["encode", "--help"], ["make-checkpoint", "-h"]]
)
def test_help_is_there(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert "usage: encoder-svc" in done.stdout


def test_serve_help_names_flag_and_variable_of_every_option() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    for name in ("--mm-encoder-attn-backend", "ENCODER_MM_ENCODER_ATTN_BACKEND", "--resize", "--drain-s"):
        assert name in text
