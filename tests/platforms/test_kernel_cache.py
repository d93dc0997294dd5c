"""Which folder kernels are kept in, what is no fit folder, and what the packages are told."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from encoder_svc.config import Config, kernel_cache_folder, load_config
from encoder_svc.platforms.kernel_cache import use_kernel_cache, why_not
from tests.platforms.machines import cpu, cuda, rocm
from tests.serving import ENVIRONMENT, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encoder_svc.platforms import Platform

FOLDERS = ("TRITON_CACHE_DIR", "QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
SWITCHES = ("QUACK_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED")
H100 = cuda((9, 0))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables is set, and none stays so."""
    for name in (*FOLDERS, *SWITCHES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
        monkeypatch.delitem(ENVIRONMENT, name, raising=False)


@pytest.fixture
def temporary() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def variables() -> dict[str, str]:
    return {name: os.environ[name] for name in (*FOLDERS, *SWITCHES) if name in os.environ}


# Where


def test_by_default_it_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kernel_cache_folder(Config()) == Path("/home/of/somebody/.cache/encoder-svc")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/somebody")
    assert kernel_cache_folder(Config()) == Path("/var/cache/somebody/encoder-svc")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kernel_cache_folder(Config()) == Path("/home/of/somebody/.cache/encoder-svc")


def test_a_name_is_taken_as_it_is_and_an_empty_one_means_nowhere() -> None:
    assert kernel_cache_folder(Config(kernel_cache_dir="/kernels")) == Path("/kernels")
    assert kernel_cache_folder(Config(kernel_cache_dir="kernels")) == Path.cwd() / "kernels"
    for empty in ("", " "):
        config = load_config(flags={"kernel_cache_dir": empty}, environment={"ENCODER_KERNEL_CACHE_DIR": "/x"}).config
        assert kernel_cache_folder(config) is None


# Which folder is fit


def test_a_folder_that_is_not_there_is_made_for_this_user_alone(tmp_path: Path) -> None:
    assert why_not(tmp_path / "a" / "kernels") is None
    assert (tmp_path / "a" / "kernels").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_one_that_only_this_user_may_write_is_taken(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    assert why_not(tmp_path) is None


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777, 0o2770])
def test_one_that_others_may_write_is_not(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    assert why_not(tmp_path) == f"{tmp_path} can be written by others (mode {mode:04o}; 0700 would do)"


def test_one_of_another_user_is_not(tmp_path: Path) -> None:
    folder = Path("/usr")  # root's, and so another's for all but root
    if os.geteuid() == 0:
        folder = tmp_path
        os.chown(folder, 12_345, -1)
    assert "belongs to user" in (why_not(folder) or "")


def test_one_that_cannot_be_made_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert why_not(tmp_path / "file" / "kernels") == f"{tmp_path / 'file' / 'kernels'} cannot be made (Not a directory)"


def test_one_in_a_home_that_there_is_none_of_is_not() -> None:
    assert why_not(Path("~/.cache/encoder-svc")) == "~/.cache/encoder-svc is in a home, which this user has none of"
    assert not Path("~").exists()


# What the packages are told


@pytest.mark.parametrize(("machine", "inside"), [(H100, "cuda-9.0"), (rocm("gfx942"), "rocm-gfx942")])
def test_each_package_has_a_folder_for_this_architecture(
    machine: Platform, inside: str, tmp_path: Path, temporary: ExitStack
) -> None:
    use_kernel_cache(Config(kernel_cache_dir=str(tmp_path / "kernels")), machine.facts, temporary)
    base = tmp_path / "kernels" / inside
    assert variables() == {
        "TRITON_CACHE_DIR": str(base / "triton"),
        "QUACK_CACHE_DIR": str(base / "quack"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(base / "flash_attn_4"),
        **dict.fromkeys(SWITCHES, "1"),
    }


def test_what_the_operator_has_set_stays_and_is_named(
    tmp_path: Path, temporary: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("QUACK_CACHE_ENABLED", "0")
    with caplog.at_level(logging.INFO):
        use_kernel_cache(Config(kernel_cache_dir=str(tmp_path)), H100.facts, temporary)
    assert (os.environ["TRITON_CACHE_DIR"], os.environ["QUACK_CACHE_ENABLED"]) == ("/mine", "0")
    assert os.environ["QUACK_CACHE_DIR"] == str(tmp_path / "cuda-9.0" / "quack")
    assert caplog.messages == [f"kernel cache: {tmp_path}; set already: TRITON_CACHE_DIR, QUACK_CACHE_ENABLED"]


@pytest.mark.parametrize("kept_out", [True, False], ids=["refused", "off"])
def test_without_one_nothing_is_kept_and_the_log_says_so(
    kept_out: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    with caplog.at_level(logging.INFO), ExitStack() as temporary:
        use_kernel_cache(Config(kernel_cache_dir=str(tmp_path) if kept_out else ""), H100.facts, temporary)
        told = variables()
        private = Path(told.pop("TRITON_CACHE_DIR"))
        assert private.stat().st_mode & 0o777 == 0o700
    assert told == dict.fromkeys(SWITCHES, "0")
    assert not private.exists()
    assert list(tmp_path.iterdir()) == []
    [record] = caplog.records
    assert record.levelname == ("WARNING" if kept_out else "INFO")
    assert "every start compiles" in record.message
    assert ("written by others" in record.message) == kept_out


def test_where_nothing_can_be_written_the_start_goes_on(
    tmp_path: Path, temporary: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    use_kernel_cache(Config(kernel_cache_dir=str(tmp_path / "file" / "kernels")), H100.facts, temporary)
    assert variables() == dict.fromkeys(SWITCHES, "0")
    assert "cannot be made (Not a directory)" in caplog.messages[0]
    assert "no temporary folder either (Not a directory)" in caplog.messages[1]


def test_on_a_cpu_nothing_is_made_and_nothing_said(
    tmp_path: Path, temporary: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        use_kernel_cache(Config(kernel_cache_dir=str(tmp_path / "kernels")), cpu().facts, temporary)
    assert variables() == {}
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == []


def test_a_server_on_a_cpu_makes_no_folder(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu")
    with ServerProcess(*options, "--kernel-cache-dir", tmp_path / "kernels") as serving:
        assert "kernel cache" not in serving.log
        assert not (tmp_path / "kernels").exists()


@pytest.mark.cuda
def test_a_server_on_a_gpu_keeps_its_kernels_there(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    options = ("--model", tiny_checkpoint("qwen2_vl"), "--device", "cuda", "--kernel-cache-dir", folder)
    with ServerProcess(*options) as serving:
        assert f"kernel cache: {folder}" in serving.log
        assert [path for path in folder.glob("cuda-*/*/*") if any(path.iterdir())]
