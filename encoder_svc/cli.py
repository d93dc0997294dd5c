"""The ``encoder-svc`` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from encoder_svc import __version__
from encoder_svc.bench.arguments import DESCRIPTION as BENCH_DESCRIPTION
from encoder_svc.bench.arguments import add_bench_arguments
from encoder_svc.config import environment_name, flag_name, load_config, options, set_unless_set
from encoder_svc.connection import add_connection_arguments, connection, local_connection
from encoder_svc.errors import EncoderSvcError, StartupError
from encoder_svc.garbage import look_for_cycles_rarely

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from encoder_svc.config import Config
    from encoder_svc.platforms import Platform, Selection

# Threads that spin while they wait for each other do so on cores that others need: beside two busy processes on two
# cores a forward of 23 ms takes up to 2 s with OpenMP's default, and 29 ms with this. Alone it is no slower.
_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE"}
_EXIT_FAILED = 1
_EXIT_REFUSED = 2
_EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 done, 1 failed (also where nobody reads what is printed), 2 refused before anything was done, 130 interrupted.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_FAILED


def _run(arguments: Sequence[str] | None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        return code
    except BrokenPipeError:
        raise
    except Exception as error:
        if getattr(parsed, "debug", False):
            traceback.print_exc()
        text, code = _explain(error)
        print(f"encoder-svc {parsed.command}: {text}", file=sys.stderr)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, EncoderSvcError):
        return str(error), _EXIT_REFUSED if isinstance(error, StartupError) else _EXIT_FAILED
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("encoder_svc"):
        return (
            f"needs the package {error.name}, which a server's install brings: from a clone, pip install '.[server]'.",
            _EXIT_REFUSED,
        )
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"failed on something unforeseen, {said} (with --debug it shows where).", _EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    # Before the command or after it.
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error"
    )
    parser = argparse.ArgumentParser(
        prog="encoder-svc", description="Qwen-VL vision encoders as a gRPC service.", parents=[debug]
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = partial(commands.add_parser, parents=[debug])
    _add_serve(add("serve", help="start a server", description=_SERVE_DESCRIPTION))
    _add_encode(add("encode", help="encode photographs with a server, into a safetensors file"))
    _add_info(add("info", help="show what a server serves"))
    _add_health(add("health", help="ask a server whether it serves", description=_HEALTH_DESCRIPTION))
    _add_bench(add("bench", help="load a server and measure it"), debug)
    _add_backends(add("backends", help="show which attention backend is chosen, here or on a described machine"))
    _add_make_checkpoint(add("make-checkpoint", help="write a checkpoint with random weights"))
    return parser


_SERVE_DESCRIPTION = (
    "Starts a server. Each option can also be set in the config file (its name with underscores) or in the "
    "environment (ENCODER_ and its name in capitals); a flag beats the environment, which beats the file."
)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of options")
    for option in options():
        default = "" if option.default is None else f" (default: {_shown(option.default, option.metadata['metavar'])})"
        parser.add_argument(
            flag_name(option.name),
            dest=option.name,
            metavar=option.metadata["metavar"],
            help=f"{option.metadata['help']}{default} [{environment_name(option.name)}]".replace("%", "%%"),
        )
    parser.set_defaults(run=_serve)


def _shown(default: Any, metavar: str) -> str:
    """A default as one would type it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if metavar == "BYTES":
        return f"{default // 2**30}GiB" if default % 2**30 == 0 else f"{default // 2**20}MiB"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _serve(parsed: argparse.Namespace) -> int:
    look_for_cycles_rarely()
    flags = {option.name: getattr(parsed, option.name) for option in options()}
    loaded = load_config(flags=flags, environment=os.environ, file=parsed.config)
    set_unless_set(_OPENMP)  # before torch is imported
    from encoder_svc.platforms.describe import refuse_early
    from encoder_svc.server.open_files import refuse_few_open_files

    refuse_few_open_files(loaded.config)
    refuse_early(loaded.config)
    from encoder_svc.server.app import run_server

    return run_server(loaded)


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="JPEG, PNG or WebP files")
    add_connection_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="safetensors file: image.N.embeddings and image.N.grid_thw for the Nth photograph, from 0",
    )
    parser.set_defaults(run=_encode)


def _encode(parsed: argparse.Namespace) -> int:
    from encoder_svc.client.commands import encode_to_file

    return encode_to_file(parsed.photos, connection(parsed), parsed.out, timeout_s=parsed.timeout_s)


def _add_info(parser: argparse.ArgumentParser) -> None:
    add_connection_arguments(parser)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=_info)


def _info(parsed: argparse.Namespace) -> int:
    from encoder_svc.client.commands import describe_server

    print(describe_server(connection(parsed), as_json=parsed.json, timeout_s=parsed.timeout_s))
    return 0


_HEALTH_DESCRIPTION = (
    "Asks a server by the gRPC health protocol. Exit code 0: it serves; 1: it does not, or does not answer; 2: refused."
)


def _add_health(parser: argparse.ArgumentParser) -> None:
    where = "server (default: this machine's, by its own ENCODER_… variables)"
    add_connection_arguments(parser, target=None, target_help=where, timeout_s=5.0)
    parser.add_argument(
        "--service", default="encoder.v1.Encoder", metavar="NAME", help="empty: the server (default: %(default)s)"
    )
    parser.set_defaults(run=_health)


def _health(parsed: argparse.Namespace) -> int:
    from encoder_svc.health import health_status

    if parsed.target is None:
        server = local_connection(load_config(flags={}, environment=os.environ).config, parsed)
    else:
        server = connection(parsed)
    status = health_status(server, parsed.service, timeout_s=parsed.timeout_s)
    if status == "SERVING":
        print(f"{server.target}: SERVING")
        return 0
    print(f"{server.target}: {status}. It is starting, draining or broken; its log tells which.", file=sys.stderr)
    return _EXIT_FAILED


def _add_bench(parser: argparse.ArgumentParser, debug: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    serve = kinds.add_parser(
        "serve", help="over gRPC, a server that runs", description=BENCH_DESCRIPTION, parents=[debug]
    )
    add_connection_arguments(serve)
    add_bench_arguments(serve)
    serve.set_defaults(run=_bench_serve)


def _bench_serve(parsed: argparse.Namespace) -> int:
    from encoder_svc.bench.serve import measure, write_outputs
    from encoder_svc.bench.table import table

    report, run = measure(parsed)
    print(table(report), flush=True)
    write_outputs(parsed, report, run)
    return report.exit_code


def _add_backends(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("a machine other than this one")
    machine.add_argument("--platform", metavar="NAME", help="cuda, rocm or cpu (default: this machine)")
    machine.add_argument("--capability", metavar="X.Y", help="an NVIDIA device's compute capability, such as 9.0")
    machine.add_argument("--gfx", metavar="NAME", help="an AMD device's architecture, such as gfx942")
    machine.add_argument("--installed", metavar="A,B", help="packages there, such as flash_attn_4,xformers")
    machine.add_argument("--env", action="append", default=[], metavar="K=V", help="a variable there; may be repeated")
    parser.add_argument("--dtype", metavar="DTYPE", help="default: what --dtype auto means there")
    parser.add_argument("--head-size", type=int, default=80, metavar="N", help="default: %(default)s")
    for option in options():
        if option.name.startswith("mm_encoder_"):
            parser.add_argument(flag_name(option.name), dest=option.name, metavar=option.metadata["metavar"])
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=_backends)


def _backends(parsed: argparse.Namespace) -> int:
    from encoder_svc.platforms.describe import Machine, decide

    flags = {name: value for name, value in vars(parsed).items() if name == "dtype" or name.startswith("mm_encoder_")}
    config = load_config(flags=flags, environment={} if parsed.platform else os.environ).config
    machine = Machine(
        platform=parsed.platform,
        capability=parsed.capability,
        gfx=parsed.gfx,
        installed=parsed.installed,
        environment=tuple(parsed.env),
    )
    print(decide(machine, config, _on_this_cpu, head_size=parsed.head_size, as_json=parsed.json))
    return 0


def _on_this_cpu(platform: Platform, config: Config, *, head_size: int, dtype: str) -> tuple[Selection, str]:
    from encoder_svc.models.on_this_cpu import choose_on_this_cpu

    return choose_on_this_cpu(platform, config, head_size=head_size, dtype=dtype)


def _add_make_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write it; must not exist or be empty")
    parser.add_argument("--family", required=True, choices=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
    parser.add_argument(
        "--size",
        default="tiny",
        choices=["tiny", "real"],
        help="tiny: vision and LM, a few MB; real: the 7B and 8B checkpoints' vision dimensions (default: %(default)s)",
    )
    parser.add_argument("--vision-only", action="store_true", help="leave out the LM and the tokenizer")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    parser.set_defaults(run=_make_checkpoint)


def _make_checkpoint(parsed: argparse.Namespace) -> int:
    from encoder_svc.models.synthetic import make_checkpoint

    make_checkpoint(
        parsed.folder,
        family=parsed.family,
        size=parsed.size,
        vision_only=parsed.vision_only,
        dtype=parsed.dtype,
        seed=parsed.seed,
    )
    print(parsed.folder)
    return 0
