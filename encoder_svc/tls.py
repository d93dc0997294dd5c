"""Certificates from files, for a server and for those who call one. A wrong file is refused in a sentence."""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from encoder_svc.errors import ConfigError

# https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/
_X509_V_ERR_CERT_HAS_EXPIRED: Final = 10


@dataclass(frozen=True, slots=True)
class Identity:
    """Who one side is: PEM bytes of its private key, and of its certificate with those up to the authority's."""

    key: bytes
    chain: bytes


def read_identity(cert: str, key: str) -> Identity:
    """Reads a certificate (with its chain) and its private key, PEM both, and checks that they belong together.

    Raises:
        ConfigError: one cannot be read, is not PEM, or is not of the other.
    """
    identity = Identity(key=_read(key, "--tls-key"), chain=_read(cert, "--tls-cert"))
    try:
        ssl.create_default_context().load_cert_chain(cert, key, password=_refuse_to_ask)
    except _EncryptedKeyError:
        raise ConfigError(f"--tls-key {key}: is encrypted; give it without a password.") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"--tls-key {key}: is not the key of the certificate --tls-cert {cert}.") from None
        raise ConfigError(f"--tls-cert {cert}, --tls-key {key}: not a certificate and a key in PEM.") from None
    return identity


def refuse_expired(cert: str, key: str) -> None:
    """Refuses a certificate that :func:`read_identity` took, and whose time is over.

    Raises:
        ConfigError: it is.
    """
    try:
        # Python tells a certificate's dates in a handshake alone, so there is one, in memory.
        _shake_hands_with_itself(cert, key)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _X509_V_ERR_CERT_HAS_EXPIRED:
            raise ConfigError(f"--tls-cert {cert}: has expired.") from None
    except OSError:  # SSL's errors are of that kind
        return  # what else may be wrong with it, or how it changed since, is not asked here


def _shake_hands_with_itself(cert: str, key: str) -> None:
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ours.load_cert_chain(cert, key, password=_refuse_to_ask)
    theirs.load_verify_locations(cert)
    theirs.check_hostname = False
    theirs.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # who issued it is not asked
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = theirs.wrap_bio(to_client, to_server)
    server = ours.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()


def read_authorities(path: str, flag: str) -> bytes:
    """Reads the certificates of authorities, PEM. ``flag`` is named where they are refused.

    Raises:
        ConfigError: the file cannot be read, or holds no certificate.
    """
    content = _read(path, flag)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise ConfigError(f"{flag} {path}: holds no certificate in PEM.") from None
    return content


class _EncryptedKeyError(Exception):
    """OpenSSL would ask for a password."""


def _refuse_to_ask() -> str:
    raise _EncryptedKeyError


def _read(path: str, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read ({error.strerror}).") from None
