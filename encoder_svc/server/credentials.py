"""The server's side of TLS: its certificate, whom it lets in, and new certificates while it runs."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, cast

import grpc

from encoder_svc.errors import ConfigError
from encoder_svc.tls import read_authorities, read_identity, refuse_expired

if TYPE_CHECKING:
    from encoder_svc.config import Config

logger = logging.getLogger(__name__)


def server_credentials(config: Config) -> grpc.ServerCredentials | None:
    """What the server shows and asks of its callers; None for a server in the clear.

    Raises:
        ConfigError: a file is missing or wrong, or one of certificate and key is not named.
    """
    if config.tls_cert is None or config.tls_key is None:
        if config.tls_cert or config.tls_key or config.tls_client_ca:
            raise ConfigError("TLS needs both --tls-cert and --tls-key (--tls-client-ca goes with them).")
        return None
    certificates = _Certificates(config.tls_cert, config.tls_key, config.tls_client_ca)
    shown = certificates.read()
    try:
        refuse_expired(config.tls_cert, config.tls_key)
    except ConfigError as error:  # no reason to end: another may take its place while this runs
        logger.warning("callers will refuse this server until it has another certificate: %s", error)
    renewed = cast("Any", certificates.renewed)  # the stubs leave out that it may return None
    return grpc.dynamic_ssl_server_credentials(
        shown, renewed, require_client_authentication=config.tls_client_ca is not None
    )


class _Certificates:
    """The files, read again where they have changed. gRPC asks at every new connection; those that run keep theirs."""

    def __init__(self, cert: str, key: str, client_ca: str | None) -> None:
        self._cert = cert
        self._key = key
        self._client_ca = client_ca
        self._seen = self._state()

    def read(self) -> grpc.ServerCertificateConfiguration:
        identity = read_identity(self._cert, self._key)
        callers = None if self._client_ca is None else read_authorities(self._client_ca, "--tls-client-ca")
        return grpc.ssl_server_certificate_configuration([(identity.key, identity.chain)], root_certificates=callers)

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The files' content if it changed, can be used and has not expired, else None: what was shown is shown on."""
        state = self._state()
        if state == self._seen:
            return None
        self._seen = state  # taken before reading: a file that changes meanwhile is seen next time
        try:
            renewed = self.read()
            refuse_expired(self._cert, self._key)
        except ConfigError as error:
            logger.warning("the certificate stays as it was: %s", error)
            return None
        logger.info("took the new certificate of %s", self._cert)
        return renewed

    def _state(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_identify(path) for path in (self._cert, self._key, self._client_ca) if path is not None)


def _identify(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
