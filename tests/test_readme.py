"""The README's example runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.serving import ENVIRONMENT, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

# The examples name a port, of which there is one.
pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[1]


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run_beside_a_server(example: str, checkpoint: Path) -> subprocess.CompletedProcess[str]:
    with ServerProcess("--model", checkpoint, "--port", "50051"):
        return subprocess.run(
            [sys.executable, "-c", example],
            check=False,
            cwd=ROOT / "tests/photos",
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )


def test_the_client_example_runs_as_written(tiny_checkpoint: Callable[[str], Path]) -> None:
    done = run_beside_a_server(EXAMPLES[0], tiny_checkpoint("qwen2_5_vl"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("(176, 64) (1, 22, 32) ")
    assert done.stdout.splitlines()[-1] == "1 IMAGE_FORMAT"


def test_the_transformers_example_runs_with_a_tiny_checkpoint(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = tiny_checkpoint("qwen2_5_vl")
    name = '"Qwen/Qwen2.5-VL-7B-Instruct"'
    assert name in EXAMPLES[1]
    done = run_beside_a_server(EXAMPLES[1].replace(name, repr(str(checkpoint))), checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_file_that_the_documents_link_to_is_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
