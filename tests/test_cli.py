"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open
from safetensors.numpy import load

from encoder_svc.cli import main
from encoder_svc.client import EncoderClient
from tests.serving import ENVIRONMENT, command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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


@pytest.mark.parametrize(
    ("out", "why"), [("no/such/o", "not a file in a folder that exists"), (".", "is a folder; name a file")]
)
def test_encode_to_where_no_file_can_be_is_refused_before_anything_is_sent(
    photos: list[Path], tmp_path: Path, out: str, why: str
) -> None:
    done = run("encode", photos[0], "--target", "127.0.0.1:1", "--out", tmp_path / out)
    assert (done.returncode, done.stderr) == (2, f"encoder-svc encode: --out {tmp_path / out}: {why}.\n")


def test_encode_writes_through_a_link_with_the_permissions_of_the_umask(server, photos, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    arguments = command("encode", photos[0], "--target", server("qwen2_vl").target, "--out", tmp_path / "link")
    subprocess.run(arguments, check=True, capture_output=True, env=ENVIRONMENT, umask=0o027)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    with safe_open(tmp_path / "file", framework="np") as file:
        assert "image.0.embeddings" in file.keys()  # noqa: SIM118


def test_encode_writes_into_a_pipe(server, photos, tmp_path: Path) -> None:
    arguments = command("encode", photos[0], "--target", server("qwen2_vl").target, "--out", "/dev/stdout")
    done = subprocess.run(arguments, check=True, capture_output=True, env=ENVIRONMENT)
    assert set(load(done.stdout)) == {"image.0.embeddings", "image.0.grid_thw"}


def test_encode_onto_a_full_disk_says_so_in_one_line(server, photos, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        command("encode", photos[0], "--target", server("qwen2_vl").target, "--out", out),
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 2
    assert done.stderr == f"encoder-svc encode: --out {out}: cannot be written (File too large).\n"


def test_encode_of_nothing_but_failures_writes_no_file_and_says_so(server, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no photograph")
    out = tmp_path / "out"
    done = run("encode", tmp_path / "broken.jpg", "--target", server("qwen2_vl").target, "--out", out)
    assert done.returncode == 1
    assert f"No photograph was encoded; {out} was not written." in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("subcommand", [["encode", "photo.jpg", "--out", "o"], ["info"], ["bench", "serve"]])
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (["--target", ""], "argument --target: is empty; give HOST:PORT"),
        (["--timeout-s", "-1"], "argument --timeout-s: must be a number of seconds, 0 or more, not '-1'"),
        (["--timeout-s", "nan"], "argument --timeout-s: must be a number of seconds, 0 or more, not 'nan'"),
        (["--timeout-s", "soon"], "argument --timeout-s: must be a number of seconds, 0 or more, not 'soon'"),
    ],
)
def test_a_target_or_timeout_that_is_none_is_refused(subcommand: list[str], wrong: list[str], why: str) -> None:
    done = run(*subcommand, *wrong)
    assert done.returncode == 2
    assert why in done.stderr


@pytest.fixture
def _interrupts_reach_children() -> Iterator[None]:
    """Also where a shell started the tests in the background, which then ignore it, and with them what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_reach_children")
def test_an_interrupted_command_exits_with_130_and_says_nothing(photos: list[Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        target = f"127.0.0.1:{deaf.getsockname()[1]}"
        arguments = command("encode", photos[0], "--target", target, "--out", tmp_path / "o")
        with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
            connection, _ = deaf.accept()
            process.send_signal(signal.SIGINT)
            stderr = process.communicate(timeout=30)[1]
            connection.close()
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_a_reader_that_went_away_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("backends", "--platform", "cpu"),
        check=False,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    without_torch = "import sys; sys.modules['torch'] = None; from encoder_svc.cli import main; sys.exit(main())"
    arguments = [sys.executable, "-c", without_torch, "make-checkpoint", "--family", "qwen2_vl", str(tmp_path / "made")]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "needs the package torch, which a server's install brings: from a clone, pip install" in done.stderr


@pytest.mark.parametrize("arguments", [["info"], ["bench", "serve"]], ids=["info", "bench"])
def test_an_error_shows_its_stack_trace_only_with_debug(arguments: list[str]) -> None:
    arguments = [*arguments, "--target", "127.0.0.1:9"]
    plain = run(*arguments)
    for debugging in (run(*arguments, "--debug"), run("--debug", *arguments)):
        assert debugging.returncode == plain.returncode == 1
        assert "Traceback" in debugging.stderr
        assert debugging.stderr.endswith(plain.stderr)
    assert "Traceback" not in plain.stderr


def test_what_nobody_foresaw_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("encoder_svc.client.commands.describe_server", fail)
    assert main(["info"]) == 1
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("encoder-svc info: failed on something unforeseen, RuntimeError: two lines")


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


def test_serve_help_shows_defaults_as_one_would_type_them() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    for shown in ("0 none (default: 4GiB)", "size of one request (default: 128MiB)", "where to (default: off)"):
        assert shown in text


def test_serve_help_names_flag_and_variable_of_every_option() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    for name in ("--mm-encoder-attn-backend", "ENCODER_MM_ENCODER_ATTN_BACKEND", "--resize", "--drain-s"):
        assert name in text


def test_a_server_s_threads_wait_without_spinning() -> None:
    """Where torch is not imported before the variable is set, its OpenMP reads it."""
    code = (
        "import os, sys; from encoder_svc import cli; from encoder_svc.platforms import describe\n"
        "def look(_): print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY']); sys.exit()\n"
        "describe.refuse_early = look; cli.main(['serve', '--device', 'cpu'])"
    )
    for given, seen in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        assert done.stdout.split()[-1] == seen
