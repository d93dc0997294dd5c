"""What goes over a link (link.py), and how it is written there: where the bytes are, and what they are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from encoder_svc.images.types import GridThw
from encoder_svc.observability.stages import Stages
from encoder_svc.server.core import Decoded, Embeddings, Encoded
from encoder_svc.server.shared_images import describe_image, image_of

if TYPE_CHECKING:
    from collections.abc import Callable


def describe_decoded(decoded: Decoded, offset: Callable[[memoryview], int]) -> dict[str, Any]:
    """An image in an arena. ``offset`` says where there a block is."""
    return {"image": describe_image(decoded.image, offset), "times_s": [decoded.began_s, decoded.done_s]}


def decoded_of(fields: dict[str, Any], view: Callable[[int, int], memoryview]) -> Decoded:
    """What :func:`describe_decoded` described. ``view`` gives bytes of the arena.

    Raises:
        ValueError: they are not there.
    """
    return Decoded(image_of(fields["image"], view), *fields["times_s"])


def describe_embeddings(embeddings: Embeddings, offset: Callable[[memoryview], int]) -> dict[str, Any]:
    """Embeddings in an arena. ``offset`` says where there a block is."""
    return {
        "grid": embeddings.grid,
        "at": offset(embeddings.data),
        "num_bytes": embeddings.nbytes,
    }


def embeddings_of(fields: dict[str, Any], view: Callable[[int, int], memoryview]) -> Embeddings:
    """What :func:`describe_embeddings` described. ``view`` gives bytes of the arena.

    Raises:
        ValueError: they are not there.
    """
    return Embeddings(GridThw(*fields["grid"]), view(fields["at"], fields["num_bytes"]))


def describe_encoded(encoded: Encoded, offset: Callable[[memoryview], int]) -> dict[str, Any]:
    """Embeddings in an arena, and how they were come by."""
    return {
        "embeddings": describe_embeddings(encoded.embeddings, offset),
        "outcome": encoded.outcome,
        "stages": {stage: seconds for stage, seconds in asdict(encoded.stages).items() if seconds},
        "ready_s": encoded.ready_s,
    }


def encoded_of(fields: dict[str, Any], view: Callable[[int, int], memoryview]) -> Encoded:
    """What :func:`describe_encoded` described."""
    embeddings = embeddings_of(fields["embeddings"], view)
    return Encoded(embeddings, fields["outcome"], Stages(**fields["stages"]), fields["ready_s"])
