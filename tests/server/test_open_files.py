"""A server that may open too few files is refused, however few they are."""

from __future__ import annotations

import resource
import subprocess
from functools import partial

import pytest

from encoder_svc.config import Config
from encoder_svc.errors import ConfigError
from encoder_svc.server.open_files import refuse_few_open_files
from tests.serving import ENVIRONMENT, command


@pytest.mark.parametrize("allowed", [12, 20, 40])
def test_the_limit_is_named(allowed: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    done = subprocess.run(
        command("serve", "--device", "cpu", "--port", "0"),
        check=False, capture_output=True, text=True, timeout=60, env=ENVIRONMENT,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (allowed, hard)),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"encoder-svc serve: this process may open {allowed} files at a time")
    assert "ulimit -n" in done.stderr


def test_processes_of_its_own_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    refuse_few_open_files(Config())
    for config in (Config(cpu_devices=2), Config(frontend_processes=1)):
        with pytest.raises(ConfigError, match="64 files"):
            refuse_few_open_files(config)
