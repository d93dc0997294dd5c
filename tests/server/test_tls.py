"""TLS of a real server: who is trusted, who is let in, what is refused at start, and new certificates meanwhile."""

from __future__ import annotations

import ssl
import subprocess
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc
import pytest
import trustme

from encoder_svc.client import EncoderClient, UnavailableError
from encoder_svc.config import Config
from encoder_svc.errors import ConfigError
from encoder_svc.server.credentials import server_credentials
from tests.serving import ENVIRONMENT, ServerProcess, command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Authority:
    """A throw-away authority, and the files of whom it vouches for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.crt"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *names: str, until: datetime | None = None) -> tuple[Path, Path]:
        """Writes ``name``.crt and ``name``.key, for a server of this machine or for the names given."""
        issued = self._authority.issue_cert(*(names or ("127.0.0.1", "localhost")), not_after=until)
        cert, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        replace(cert, b"".join(part.bytes() for part in issued.cert_chain_pems))
        replace(key, issued.private_key_pem.bytes())
        return cert, key


def replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.rename(path)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def serve(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., ServerProcess]:
    return lambda *flags: ServerProcess("--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu", *flags)


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), check=False, capture_output=True, text=True, timeout=60, env=ENVIRONMENT | environment
    )


def test_commands_reach_a_server_whose_authority_they_trust(
    serve: Callable[..., ServerProcess], authority: Authority, photos: list[Path], tmp_path: Path
) -> None:
    cert, key = authority.issue("server")
    with serve("--tls-cert", cert, "--tls-key", key) as server:
        reach = ("--target", server.target, "--tls-ca", authority.ca)
        assert run("health", *reach).returncode == 0
        assert run("info", *reach).returncode == 0
        out = tmp_path / "out.safetensors"
        assert run("encode", photos[0], *reach, "--out", out).returncode == 0
        assert out.exists()
        load = run("bench", "serve", *reach, "--duration", "0.5", "--warmup-s", "0", "--concurrency", "1")
        assert load.returncode == 0, load.stderr


def test_who_does_not_trust_or_speaks_in_the_clear_gets_nothing(
    serve: Callable[..., ServerProcess], authority: Authority, tmp_path: Path
) -> None:
    cert, key = authority.issue("server")
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    with serve("--tls-cert", cert, "--tls-key", key) as server:
        distrusting = run("health", "--target", server.target, "--tls-ca", stranger.ca)
        assert distrusting.returncode == 1
        assert "CERTIFICATE_VERIFY_FAILED" in distrusting.stderr
        with EncoderClient(server.target) as client, pytest.raises(UnavailableError):
            client.info()


def test_a_certificate_for_another_name_needs_that_name(
    serve: Callable[..., ServerProcess], authority: Authority
) -> None:
    cert, key = authority.issue("server", "encoder-svc.encoders.svc")
    with serve("--tls-cert", cert, "--tls-key", key) as server:
        reach = ("--target", server.target, "--tls-ca", authority.ca)
        assert run("health", *reach).returncode == 1
        assert run("health", *reach, "--tls-server-name", "encoder-svc.encoders.svc").returncode == 0


def test_with_a_client_authority_callers_must_show_a_certificate_of_it(
    serve: Callable[..., ServerProcess], authority: Authority, tmp_path: Path
) -> None:
    cert, key = authority.issue("server")
    caller = authority.issue("caller", "lm.example")
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").issue("caller", "lm.example")
    with serve("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", authority.ca) as server:
        reach = ("info", "--target", server.target, "--tls-ca", authority.ca)
        assert run(*reach).returncode == 1
        assert run(*reach, "--tls-cert", stranger[0], "--tls-key", stranger[1]).returncode == 1
        assert run(*reach, "--tls-cert", caller[0], "--tls-key", caller[1]).returncode == 0


@pytest.mark.parametrize("mutual", [False, True])
def test_the_health_check_beside_a_server_needs_its_variables_alone(
    serve: Callable[..., ServerProcess], authority: Authority, mutual: bool
) -> None:
    cert, key = authority.issue("server")
    files = {"ENCODER_TLS_CERT": str(cert), "ENCODER_TLS_KEY": str(key)}
    files |= {"ENCODER_TLS_CLIENT_CA": str(authority.ca)} if mutual else {}
    flags = [part for name, file in files.items() for part in ("--" + name[8:].lower().replace("_", "-"), file)]
    with serve(*flags) as server:
        done = run("health", ENCODER_PORT=server.target.split(":")[1], **files)
    assert (done.returncode, done.stdout) == (0, f"{server.target}: SERVING\n"), done.stderr


def shown(target: str) -> str:
    """The certificate that a server shows to a new connection, PEM."""
    host, port = target.split(":")
    return ssl.get_server_certificate((host, int(port))).strip()


def first(cert: Path) -> str:
    return cert.read_text().strip()


def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_live_on(
    serve: Callable[..., ServerProcess], authority: Authority, photos: list[Path]
) -> None:
    cert, key = authority.issue("server")
    with serve("--tls-cert", cert, "--tls-key", key) as server:
        old = first(cert)
        assert shown(server.target) == old
        with EncoderClient(
            server.target, credentials=grpc.ssl_channel_credentials(authority.ca.read_bytes())
        ) as client:
            client.info()
            authority.issue("server")
            assert first(cert) != old
            assert shown(server.target) == first(cert)
            assert client.encode(photos[:1])[0].embeddings.any()
        server.wait_for_log("took the new certificate")


def test_a_new_certificate_that_cannot_be_used_leaves_the_old_one_in_place(
    serve: Callable[..., ServerProcess], authority: Authority
) -> None:
    cert, key = authority.issue("server")
    with serve("--tls-cert", cert, "--tls-key", key) as server:
        old = first(cert)
        other, other_key = authority.issue("other")
        replace(cert, other.read_bytes())  # its key has not come yet
        assert shown(server.target) == old
        server.wait_for_log("the certificate stays as it was: .* is not the key of the certificate")
        replace(key, other_key.read_bytes())
        assert shown(server.target) == first(other)


def test_a_new_certificate_that_has_expired_leaves_the_old_one_in_place(
    serve: Callable[..., ServerProcess], authority: Authority
) -> None:
    cert, key = authority.issue("server")
    with serve("--tls-cert", cert, "--tls-key", key) as server:
        old = first(cert)
        authority.issue("server", until=datetime(2020, 1, 1, tzinfo=UTC))
        assert shown(server.target) == old
        server.wait_for_log(r"the certificate stays as it was: --tls-cert \S+: has expired")
        authority.issue("server")
        assert shown(server.target) == first(cert) != old


def test_a_server_whose_certificate_has_expired_says_so(
    serve: Callable[..., ServerProcess], authority: Authority
) -> None:
    cert, key = authority.issue("server", until=datetime(2020, 1, 1, tzinfo=UTC))
    with serve("--tls-cert", cert, "--tls-key", key) as server:
        server.wait_for_log(r"WARNING .* callers will refuse this server until it has another .*: has expired")
        authority.issue("server")
        assert shown(server.target) == first(cert)


def refused(**options: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        server_credentials(Config(**{option: str(file) for option, file in options.items()}))
    return str(caught.value)


def test_files_that_are_missing_or_do_not_fit_are_refused(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    _, other_key = authority.issue("other")
    none = tmp_path / "none"
    text = tmp_path / "text"
    text.write_text("no certificate")
    sealed = tmp_path / "sealed.key"
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", sealed], check=True)
    assert "needs both --tls-cert and --tls-key" in refused(tls_cert=cert)
    assert "needs both --tls-cert and --tls-key" in refused(tls_client_ca=authority.ca)
    assert f"--tls-cert {none}: cannot be read (No such file" in refused(tls_cert=none, tls_key=key)
    assert f"{other_key}: is not the key of the certificate" in refused(tls_cert=cert, tls_key=other_key)
    assert f"--tls-cert {text}" in refused(tls_cert=text, tls_key=key)
    assert "is encrypted; give it without a password" in refused(tls_cert=cert, tls_key=sealed)
    holds_none = refused(tls_cert=cert, tls_key=key, tls_client_ca=text)
    assert f"--tls-client-ca {text}: holds no certificate" in holds_none


def test_such_files_stop_the_start(
    tiny_checkpoint: Callable[[str], Path], authority: Authority, tmp_path: Path
) -> None:
    cert, key = authority.issue("server")
    files = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", tmp_path / "none")
    started_s = time.monotonic()
    done = run("serve", "--port", "0", "--model", tiny_checkpoint("qwen2_vl"), *files)
    assert time.monotonic() - started_s < 10
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"--tls-client-ca {tmp_path / 'none'}: cannot be read" in done.stderr.splitlines()[-1]
