"""What ``encoder-svc encode`` and ``encoder-svc info`` do."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from encoder_svc.client.sync import EncoderClient
from encoder_svc.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from encoder_svc.connection import Connection


def encode_to_file(photos: Sequence[Path], server: Connection, out: Path, *, timeout_s: float) -> int:
    """Encodes photographs into one safetensors file. Photographs that fail are named on stderr and left out.

    Returns:
        0 if every photograph was encoded, else 1.

    Raises:
        ConfigError: a photograph cannot be read, or the file cannot be written; as far as it shows, before anything is
            sent.
        RequestError: the call as a whole failed.
    """
    _refuse_where_no_file_can_be(out)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    num_failed = 0
    try:
        with _client(server, timeout_s) as client:
            results = tqdm(client.stream(photos), total=len(photos), unit="image", disable=None)
            for result in results:
                if isinstance(result, RequestError):
                    num_failed += 1
                    name = photos[result.image_index or 0]
                    tqdm.write(f"{name}: {result.message} [{result.reason}]", file=sys.stderr)
                    continue
                tensors[f"image.{result.index}.embeddings"] = result.embeddings
                tensors[f"image.{result.index}.grid_thw"] = np.array(result.grid_thw, dtype=np.int64)
    except OSError as error:
        raise ConfigError(f"{error.filename or 'a photograph'}: {error.strerror or error}.") from None
    if not tensors:
        tqdm.write(f"No photograph was encoded; {out} was not written.", file=sys.stderr)
        return 1
    try:
        with out.open("wb") as file:  # through links and into devices, with the umask's permissions
            file.write(save(tensors))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}).") from None
    return 1 if num_failed else 0


def _refuse_where_no_file_can_be(out: Path) -> None:
    try:
        if out.is_dir():
            raise ConfigError(f"--out {out}: is a folder; name a file.")
        if not out.parent.is_dir():
            raise ConfigError(f"--out {out}: not a file in a folder that exists.")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}).") from None


def describe_server(server: Connection, *, as_json: bool, timeout_s: float) -> str:
    """What a server says of itself: ``name  value`` lines, or one JSON object."""
    with _client(server, timeout_s) as client:
        values = asdict(client.info())
    if as_json:
        return json.dumps(values, indent=2)
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    width = max(map(len, flat))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in flat.items())


def _client(server: Connection, timeout_s: float) -> EncoderClient:
    return EncoderClient(server.target, credentials=server.credentials, options=server.options, timeout_s=timeout_s)
