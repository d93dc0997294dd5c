"""A real Prometheus for tests: Debian's."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any, Self

import yaml

from tests.tools import require

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType


class Prometheus:
    """Scrapes a server each second, under the job's name and with the rules of a configuration that we ship. Ready
    inside a ``with``, gone after."""

    def __init__(self, shipped: Path, *, scrapes: str, port: int, folder: Path) -> None:
        config = yaml.safe_load(shipped.read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(shipped.parent / name) for name in config["rule_files"]]
        [job] = config["scrape_configs"]
        job["static_configs"] = [{"targets": [scrapes]}]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._folder = folder
        self._address = f"127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [
                require("prometheus"),
                f"--config.file={self._folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address={self._address}",
                "--log.level=error",
            ]
        )
        deadline_s = time.monotonic() + 30
        while not self._is_ready():
            assert self._process.poll() is None, "Prometheus has ended"
            assert time.monotonic() < deadline_s, "Prometheus is not ready"
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the API; fails with Prometheus' own words."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def values(self, expr: str) -> list[float]:
        """What a query gives now: the value of each series."""
        return [float(series["value"][1]) for series in self.ask("query", query=expr)["result"]]

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=5):
                return True
        except OSError:
            return False
