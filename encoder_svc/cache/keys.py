"""Content keys: SHA-256 over everything that shapes an image's embeddings.

Fields are length-prefixed, so that no two different lists of fields run together into the same bytes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

KEY_DIGITS: Final = 64
"""Of every key."""
_DOMAIN = b"encoder-svc/content-key/1"


class ContentKeys:
    """Makes keys for one model as it is configured.

    Args:
        config_hash: of the tower; covers weights, dtype, attention backend and versions.
        processor_hash: of the processor settings.
    """

    def __init__(self, config_hash: str, processor_hash: str) -> None:
        self._prefix = hashlib.sha256()
        _update(self._prefix, (_DOMAIN, config_hash.encode(), processor_hash.encode()))

    def key(self, image_fields: Iterable[bytes]) -> str:
        """:data:`KEY_DIGITS` hex digits. ``image_fields`` say what the image is: its kind, its shape, its bytes."""
        digest = self._prefix.copy()
        _update(digest, image_fields)
        return digest.hexdigest()


def _update(digest: hashlib._Hash, fields: Iterable[bytes]) -> None:
    for value in fields:
        digest.update(len(value).to_bytes(8, "big"))
        digest.update(value)
