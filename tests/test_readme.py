"""The README's example runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.serving import ENVIRONMENT, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]


def test_the_client_example_runs_as_written(tiny_checkpoint: Callable[[str], Path]) -> None:
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    with ServerProcess("--model", tiny_checkpoint("qwen2_5_vl"), "--port", "50051"):
        done = subprocess.run(
            [sys.executable, "-c", example],
            check=False,
            cwd=ROOT / "tests/photos",
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("(176, 64) (1, 22, 32) ")
    assert done.stdout.splitlines()[-1] == "1 IMAGE_FORMAT"


def test_every_file_that_the_documents_link_to_is_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
