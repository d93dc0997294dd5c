"""What a front end needs once there is a model to serve. It imports torch, which refusing calls does not take."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from encoder_svc._generated.encoder.v1 import encoder_pb2
from encoder_svc.images.processor import ProcessorSettings
from encoder_svc.server.frontends.door import DoorSignReader
from encoder_svc.server.frontends.remote import Placed, RemoteCore
from encoder_svc.server.info import ModelFacts, budgets_of
from encoder_svc.server.pipeline import make_pipeline
from encoder_svc.server.shared_memory import EMBEDDING_OPTIONS, IMAGE_OPTIONS, asked_for_by
from encoder_svc.transport.arena import Arena, ArenaView

if TYPE_CHECKING:
    from encoder_svc.config import Config
    from encoder_svc.server.frontends.link import Handler, Link
    from encoder_svc.server.pipeline import Pipeline


def open_pipeline(
    config: Config,
    link: Link,
    handlers: dict[str, Handler],
    files: tuple[int, int, int],
    *,
    info: str,
    settings: dict[str, Any],
    input_processor: str,
    image_bytes: int,
) -> Pipeline:
    """A pipeline whose core is in the device's process.

    Args:
        handlers: those of ``link``; gets those of its images.
        files: shared ones, of embeddings, images and the door.
        info: ``GetModelInfoResponse``, as hexadecimal digits.
        image_bytes: room for images that wait for the device.

    Raises:
        ConfigError: the memory or the threads that the config asks for cannot be had.
    """
    embeddings, images, door = files
    with asked_for_by(IMAGE_OPTIONS, image_bytes):
        placed = Placed(Arena(images, image_bytes))
    with asked_for_by(EMBEDDING_OPTIONS, os.fstat(embeddings).st_size):
        kept = ArenaView(embeddings)
    handlers.update(placed.handlers())
    tuples = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    facts = ModelFacts(
        encoder_pb2.GetModelInfoResponse.FromString(bytes.fromhex(info)),
        ProcessorSettings(**settings | tuples),
        input_processor,
    )
    num_processes = config.frontend_processes or 0
    reader = DoorSignReader(door, budgets_of(config), num_processes)
    core = RemoteCore(link, placed, kept, reader)
    return make_pipeline(config, facts, core, num_processes=num_processes, place=placed.place)
