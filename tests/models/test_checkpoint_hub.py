"""Checkpoints from a hub: a real HTTP server on loopback that answers as the hub does, asked by a real client."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from encoder_svc.models.synthetic import make_checkpoint
from tests.models.towers import load
from tests.serving import ENVIRONMENT, command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDED, SINGLE, ABSENT = "acme/sharded", "acme/single", "acme/absent"

LOAD_EACH = """
import hashlib, json, sys
import torch
from encoder_svc.errors import CheckpointError
from encoder_svc.models.checkpoint import Checkpoint
from encoder_svc.models.tower import load_tower, make_attention
from encoder_svc.platforms import platform_for_device

torch.set_num_threads(1)
platform = platform_for_device("cpu")
for model, revision in json.load(sys.stdin):
    try:
        checkpoint = Checkpoint(model, revision=revision)
        attention = make_attention(checkpoint, platform=platform, dtype="float32", override=None)
        settings = checkpoint.processor_settings(resize="torch")
        tower = load_tower(checkpoint, settings, lambda: attention, platform=platform, device="cpu", dtype="float32")
    except CheckpointError as error:
        print(json.dumps({"error": str(error)}))
    else:
        first = tower.encoder.patch_embed.proj.weight.double().sum().item()
        print(json.dumps({"revision": tower.revision, "model": tower.model, "sum": first}))
"""


@dataclass
class Hub:
    """Serves folders as repositories, and remembers what was asked of it."""

    repositories: dict[str, Path]
    downloads: list[tuple[str, str]] = field(default_factory=list)
    asked_at: dict[str, set[str]] = field(default_factory=dict)
    address: str = ""

    def serve(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                # /OWNER/NAME/resolve/REVISION/FILE
                owner, name, _, revision, filename = self.path.lstrip("/").split("/", 4)
                repository = f"{owner}/{name}"
                hub.asked_at.setdefault(revision, set()).add(filename)
                folder = hub.repositories.get(repository)
                if folder is None:
                    self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
                elif revision not in ("main", COMMIT):
                    self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                elif not (folder / filename).is_file():
                    self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                else:
                    body = (folder / filename).read_bytes()
                    etag = hashlib.sha256(body).hexdigest()
                    self._send(200, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, with_body=with_body)
                    if with_body:
                        hub.downloads.append((repository, filename))

            def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{server.server_port}"
        return server


def load_each(models: list[tuple[str, str | None]], home: Path, **variables: str) -> list[dict[str, str]]:
    """Loads each model in a process of its own, and gives what came of each."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    environment = inherited | {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD_EACH],
        env=environment | variables,
        input=json.dumps(models),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass
class Session:
    """What a process got that loaded everything from the hub, and what another got that had only its cache."""

    hub: Hub
    online: dict[str, dict[str, str]]
    offline: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    root = tmp_path_factory.mktemp("hub")
    make_checkpoint(root / "sharded", family="qwen2_5_vl", shard_bytes=200_000)
    make_checkpoint(root / "single", family="qwen3_vl", vision_only=True)
    hub = Hub({SHARDED: root / "sharded", SINGLE: root / "single"})
    server = hub.serve()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        asked = {"sharded": (SHARDED, None), "single": (SINGLE, None), "absent": (ABSENT, None)}
        asked |= {"no revision": (SHARDED, "v9"), "by commit": (SHARDED, COMMIT)}
        online = load_each(list(asked.values()), root / "home", HF_ENDPOINT=hub.address)
        offline = load_each(list(asked.values()), root / "home", HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1")
        yield Session(hub, dict(zip(asked, online, strict=True)), dict(zip(asked, offline, strict=True)))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_revision_is_the_hubs_commit(session: Session) -> None:
    assert session.online["sharded"]["revision"] == COMMIT
    assert session.online["by commit"]["revision"] == COMMIT


def test_the_model_is_named_by_its_hub_id(session: Session) -> None:
    assert session.online["sharded"]["model"] == SHARDED


def test_the_weights_are_those_of_the_folder(session: Session) -> None:
    weight = load(session.hub.repositories[SHARDED]).encoder.get_parameter("patch_embed.proj.weight")
    assert session.online["sharded"]["sum"] == pytest.approx(weight.double().sum().item(), rel=1e-12)


def test_only_shards_that_hold_vision_tensors_are_downloaded(session: Session) -> None:
    index = json.loads((session.hub.repositories[SHARDED] / "model.safetensors.index.json").read_text())
    with_vision = {shard for name, shard in index["weight_map"].items() if name.startswith("visual.")}
    assert with_vision < set(index["weight_map"].values())
    downloaded = [name for repository, name in session.hub.downloads if repository == SHARDED]
    assert {name for name in downloaded if name.endswith(".safetensors")} == with_vision


def test_nothing_but_configs_and_weights_is_downloaded_and_nothing_twice(session: Session) -> None:
    downloaded = [name for repository, name in session.hub.downloads if repository == SHARDED]
    assert len(downloaded) == len(set(downloaded))
    others = {name for name in downloaded if not name.endswith(".safetensors")}
    assert others == {"config.json", "preprocessor_config.json", "model.safetensors.index.json"}


def test_every_file_after_the_config_comes_from_its_commit(session: Session) -> None:
    assert session.hub.asked_at["main"] == {"config.json"}
    assert "preprocessor_config.json" in session.hub.asked_at[COMMIT]


def test_a_repository_that_does_not_exist_is_named(session: Session) -> None:
    error = session.online["absent"]["error"]
    assert error.startswith(f"--model {ABSENT}: not a folder that exists, and not to be had from the hub (no such")


def test_a_revision_that_does_not_exist_is_named(session: Session) -> None:
    assert f"--model {SHARDED}: " in session.online["no revision"]["error"]
    assert "at revision v9" in session.online["no revision"]["error"]


@pytest.mark.parametrize("model", ["sharded", "single", "by commit"])
def test_a_cached_checkpoint_loads_without_the_hub(session: Session, model: str) -> None:
    assert session.offline[model] == session.online[model]


def test_a_hub_out_of_reach_is_asked_once_and_its_clients_lines_are_ours(tmp_path: Path) -> None:
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.lower().endswith("_proxy")}
    began_s = time.monotonic()
    done = subprocess.run(
        command("serve", "--device", "cpu", "--port", "0", "--log-format", "json", "--model", ABSENT),
        check=False, capture_output=True, text=True, timeout=60,
        env=environment | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    assert done.returncode == 2
    assert time.monotonic() - began_s < 20  # 24 s are what a download's waits alone add up to
    *lines, last = done.stderr.splitlines()
    assert "not to be had from the hub" in last
    said = [json.loads(line) for line in lines]
    assert not any("Retrying" in line["message"] for line in said)


def test_the_hub_clients_lines_are_said_once(tmp_path: Path) -> None:
    code = (
        "import logging, sys; from encoder_svc.models.checkpoint_hub import Hub\n"
        "from encoder_svc.errors import CheckpointError\n"
        "logging.basicConfig(format='ours: %(message)s')\n"
        f"try: Hub({ABSENT!r}, None)\nexcept CheckpointError: pass\n"
        "logging.getLogger('huggingface_hub.utils').warning('theirs')"
    )
    environment = ENVIRONMENT | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.splitlines() == ["ours: theirs"]


def test_what_is_not_cached_cannot_be_had_without_the_hub(session: Session) -> None:
    assert "not to be had from the hub" in session.offline["absent"]["error"]
