"""What ``encoder-svc bench serve`` does."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from encoder_svc.allocator import use_one_heap
from encoder_svc.bench.load import LoadOptions, Run, run_load
from encoder_svc.bench.mix import DEFAULT_MIX, Mix, read_mix
from encoder_svc.bench.plot import check_plot, save_plot
from encoder_svc.bench.report import Report, make_report
from encoder_svc.client.aio import AsyncEncoderClient
from encoder_svc.connection import connection
from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from encoder_svc.client.types import ModelInfo
    from encoder_svc.connection import Connection


def measure(parsed: argparse.Namespace) -> tuple[Report, Run]:
    """Loads a server as the flags of ``arguments.py`` say. What can be refused is, before anything is sent.

    Raises:
        ConfigError: the mix, a photo or an output cannot be used.
        RequestError: the server does not say what it serves.
    """
    use_one_heap()
    options = _options(parsed)
    _check_outputs(parsed)
    entries = DEFAULT_MIX if parsed.mix is None else read_mix(parsed.mix)
    mix = Mix(entries, images_per_request=parsed.images_per_request, unique=parsed.unique, seed=parsed.seed)
    info, run = asyncio.run(_load(connection(parsed), mix, options, parsed.connections))
    return make_report(run, address=parsed.target, info=info, options=options, mix=mix, unique=parsed.unique), run


def write_outputs(parsed: argparse.Namespace, report: Report, run: Run) -> None:
    """Writes the files of ``--json`` and ``--plot``, if any.

    Raises:
        ConfigError: one cannot be written.
    """
    try:
        if parsed.json is not None:
            parsed.json.write_text(json.dumps(asdict(report), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        if parsed.plot is not None:
            save_plot(report, run.recorder, parsed.plot)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}.") from None


def _options(parsed: argparse.Namespace) -> LoadOptions:
    if not 0 < parsed.timeout_s < math.inf:
        raise ConfigError(f"--timeout-s must be a number of seconds above 0, not {parsed.timeout_s}.")
    return LoadOptions(
        concurrency=parsed.concurrency,
        rate=parsed.rate,
        max_outstanding=parsed.max_outstanding,
        duration_s=parsed.duration,
        warmup_s=parsed.warmup_s,
        timeout_s=parsed.timeout_s,
        seed=parsed.seed,
    )


def _check_outputs(parsed: argparse.Namespace) -> None:
    if parsed.plot is not None:
        check_plot()
    for path in (parsed.json, parsed.plot):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{path}: not a file in a folder that exists.")


async def _load(server: Connection, mix: Mix, options: LoadOptions, connections: int) -> tuple[ModelInfo, Run]:
    async with AsyncEncoderClient(
        server.target, credentials=server.credentials, options=server.options, connections=connections
    ) as client:
        info = await client.info(timeout_s=options.timeout_s)
        length_s = options.warmup_s + options.duration_s
        sys.stderr.write(f"Loading {server.target} for {length_s:g} s; Ctrl-C ends it early and reports.\n")
        return info, await run_load(client, mix, options)
