"""Files that are not as they should be, and models that are nowhere."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from encoder_svc.errors import CheckpointError
from encoder_svc.models.checkpoint import Checkpoint
from tests.models.checkpoints import INDEX
from tests.models.towers import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("filename", ["config.json", "preprocessor_config.json", INDEX])
@pytest.mark.parametrize("text", ["{", "[1]", "\xff", ""])
def test_bad_json_is_named(copy: Callable[..., Path], filename: str, text: str) -> None:
    folder = copy()
    (folder / filename).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"qwen2_5_vl: {filename} is not (a JSON object|readable JSON)"):
        load(folder)


@pytest.mark.parametrize("filename", ["config.json", "preprocessor_config.json", INDEX, "model.safetensors"])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(copy: Callable[..., Path], filename: str) -> None:
    folder = copy()
    (folder / filename).unlink(missing_ok=True)
    (folder / filename).mkdir()  # as unreadable to root as to anyone
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    assert str(refused.value) == f"{folder / filename}: cannot be read (Is a directory)."


@pytest.mark.parametrize("inside", ["", "made"], ids=["a folder", "a folder's folder"])
def test_a_folder_that_may_not_be_entered_is_named_with_the_reason(tmp_path: Path, inside: str) -> None:
    (tmp_path / "closed/made").mkdir(parents=True)
    tmp_path.chmod(0o755)
    code = f"""
import os
from pathlib import Path
from encoder_svc.models.checkpoint import Checkpoint, CheckpointError
os.chdir({str(tmp_path)!r})
Path("closed").chmod(0)
if os.geteuid() == 0:
    os.setuid(65534)  # root may enter everything
try:
    Checkpoint(os.path.join("closed", {inside!r}))
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    (tmp_path / "closed").chmod(0o700)
    named = "closed/made" if inside else "closed/config.json"
    assert (done.stdout, done.stderr) == (f"{named}: cannot be read (Permission denied).\n", "")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "a/b/c", "two words", ""])
def test_a_model_that_is_no_folder_and_no_hub_id_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a folder that exists nor a hub id|no config"):
        Checkpoint(model)
