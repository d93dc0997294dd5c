"""The server's configuration: one frozen value, built once from file < environment < flag.

Every option is one field of :class:`Config`. Its name gives the flag (``--max-images``), the environment variable
(``ENCODER_MAX_IMAGES``) and the key in the config file (``max_images``). No other module reads the environment.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from dataclasses import Field

ENVIRONMENT_PREFIX: Final = "ENCODER_"

Source = Literal["default", "file", "environment", "flag"]

_SUFFIXES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text; put it in quotes")
    return value


def _number(value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError("not a whole number") from None


def _seconds(value: Any) -> float:
    try:
        seconds = float(str(value).removesuffix("s"))
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise ValueError("not a duration in seconds")
    return seconds


def _some_seconds(value: Any) -> float:
    seconds = _seconds(value)
    if seconds == 0:
        raise ValueError("no time at all")
    return seconds


def _fraction(value: Any) -> float:
    try:
        share = float(str(value))
    except ValueError:
        share = 0
    if not 0 < share <= 1:
        raise ValueError("not a share, more than 0 and at most 1")
    return share


def _bytes(value: Any) -> int:
    matched = re.fullmatch(r"(\d{1,20})\s*([A-Z]*?)B?", str(value).strip().upper())
    unit = _SUFFIXES.get(matched[2], _SUFFIXES.get(matched[2] + "B")) if matched else None
    if matched is None or unit is None:
        raise ValueError("not a size in bytes, such as 1048576 or 1MiB")
    return int(matched[1]) * unit


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        choice = str(value).strip().lower()
        if choice not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return choice

    return parse


def _switch(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("neither on nor off")
    return text in ("1", "true", "yes", "on")


def _at_least(low: int, parse: Callable[[Any], int] = _number, *, at_most: float = math.inf) -> Callable[[Any], int]:
    def checked(value: Any) -> int:
        number = parse(value)
        if number < low:
            raise ValueError(f"less than {low}")
        if number > at_most:
            raise ValueError(f"more than {at_most}")
        return number

    return checked


def _port(value: Any) -> int:
    number = _number(value)
    if not 0 <= number <= 65_535:
        raise ValueError("not a port, 0 to 65535")
    return number


def _option(
    default: Any, parse: Callable[[Any], Any], metavar: str, help_text: str, *, may_be_empty: bool = False
) -> Any:
    metadata = {"parse": parse, "metavar": metavar, "help": help_text, "may_be_empty": may_be_empty}
    return field(default=default, metadata=metadata)


# Beyond it Pillow refuses by itself (twice Image.MAX_IMAGE_PIXELS).
_PILLOW_MAX_PIXELS: Final = 178_956_970
# What gRPC's message limit and the wire's counts can hold; a message is a little larger than what it carries.
_INT32_MAX: Final = 2**31 - 1
_MESSAGE_MAX_BYTES: Final = _INT32_MAX - 2**20
# Several of it fit into a process's address space.
_MEMORY_MAX_BYTES: Final = 2**44

_COUNT = _at_least(1, at_most=_INT32_MAX)
_AREA = _at_least(1, at_most=_PILLOW_MAX_PIXELS)
_SIZE = _at_least(1, _bytes, at_most=_MEMORY_MAX_BYTES)
_SIZE_OR_NONE = _at_least(0, _bytes, at_most=_MEMORY_MAX_BYTES)
_MESSAGE_SIZE = _at_least(1, _bytes, at_most=_MESSAGE_MAX_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything an operator can set. Sizes in bytes, durations in seconds, as the names say."""

    model: str | None = _option(
        None,
        _text,
        "DIR|HUB_ID",
        "checkpoint: a folder or a hub id; without it a tiny random one is made, for trying out",
    )
    revision: str | None = _option(None, _text, "REV", "branch, tag or commit of a hub id; not of a folder")
    host: str = _option("127.0.0.1", _text, "HOST", "address to listen on; 0.0.0.0 for every one")
    port: int = _option(50_051, _port, "PORT", "port to listen on; 0 picks a free one and prints it")
    metrics_port: int | None = _option(
        None,
        _port,
        "PORT",
        "port for Prometheus metrics and the status page, on the same host; without it there are none",
    )
    max_connection_age_s: float = _option(
        0.0, _seconds, "SECONDS", "how long callers keep a connection before they are asked to open another; 0 for ever"
    )
    tls_cert: str | None = _option(
        None, _text, "FILE", "this server's certificate with its chain, PEM; with tls_key, callers must use TLS"
    )
    tls_key: str | None = _option(None, _text, "FILE", "the private key of tls_cert, PEM, without a password")
    tls_client_ca: str | None = _option(
        None, _text, "FILE", "PEM certificates; callers must show one that these signed (mutual TLS)"
    )
    device: str = _option("auto", _text, "DEVICE", "auto, cpu, cuda or cuda:N; auto is cuda where there is one")
    cpu_devices: int = _option(
        1,
        _at_least(1, at_most=64),
        "N",
        "on a CPU: processes that its cores are divided among, each with the model and batches of its own; for narrow "
        "models, which gain little by a second core: one for each core",
    )
    dtype: str = _option(
        "auto",
        _one_of("auto", "float32", "float16", "bfloat16"),
        "DTYPE",
        "auto, float32, float16 or bfloat16; auto is bfloat16 on GPUs (float16 on NVIDIA's before capability 8.0) and "
        "CPUs with AMX or AVX512-BF16, else float32",
    )
    mm_encoder_attn_backend: str | None = _option(
        None, _text, "NAME", "attention backend, obeyed to the letter or refused; without it the platform chooses"
    )
    mm_encoder_flash_attn_implementation: str | None = _option(
        None,
        _one_of("fa4", "fa3", "fa2", "torch"),
        "NAME",
        "what carries FLASH_ATTN out, obeyed or refused: fa4, fa3, fa2 or torch; without it the best that is there; "
        "without effect, and with a warning, where another backend runs",
    )
    rocm_use_aiter: bool = _option(
        False, _switch, "on|off", "on AMD devices: lets the platform choose kernels of aiter, each by its own switch"
    )
    rocm_use_aiter_mha: bool = _option(
        False, _switch, "on|off", "on AMD devices: with rocm_use_aiter, aiter's attention is the platform's choice"
    )
    resize: str = _option(
        "torch",
        _one_of("torch", "pillow"),
        "FLAVOUR",
        "whose bicubic: torch is transformers' default image processor, pillow its Pillow-based one",
    )
    image_processing: str = _option(
        "host",
        _one_of("host", "device"),
        "PLACE",
        "where images are resized and cut into patches: host, or device where CPU cores are scarce; needs resize torch",
    )
    min_pixels: int | None = _option(
        None, _AREA, "N", "smallest area an image is resized to, in place of the checkpoint's"
    )
    max_pixels: int | None = _option(
        None, _AREA, "N", "largest area an image is resized to, in place of the checkpoint's"
    )
    frontend_processes: int | None = _option(
        None,
        _at_least(0, at_most=64),
        "N",
        "processes that answer calls, decode images and stream embeddings, beside the one of the device; 0: it does so "
        "itself; without it one for every two cores on a GPU, at most 8, and none on a CPU",
    )
    decode_threads: int | None = _option(
        None,
        _at_least(1, at_most=1_024),
        "N",
        "threads that decode and resize images; without it one for each core that the process may use",
    )
    max_batch_patches: int | None = _option(
        None, _COUNT, "N", "patches in one batch, a larger image runs alone; without it 16,384 on a GPU, 4,096 on a CPU"
    )
    memory_fraction: float = _option(
        0.9, _fraction, "SHARE", "of a GPU's free memory that batches may take; what fits bounds max_batch_patches"
    )
    cuda_graph_max_patches: int = _option(
        16_384,
        _at_least(0, at_most=2**20),
        "N",
        "batches up to this many patches run as CUDA graphs, captured at start in at most 15 s and 4 GiB; 0 for none",
    )
    quantization: str = _option(
        "none",
        _one_of("none", "fp8"),
        "KIND",
        "of matrix products: none, or fp8 (e4m3; faster, less exact), on NVIDIA GPUs of capability 8.9 and more",
    )
    kernel_cache_dir: str | None = _option(
        None,
        _text,
        "DIR",
        "on a GPU: where compiled kernels are kept between starts, a folder that nobody else may write; empty for "
        "nowhere; without it encoder-svc in $XDG_CACHE_HOME or ~/.cache",
        may_be_empty=True,
    )
    max_batch_images: int = _option(64, _COUNT, "N", "images in one batch")
    max_queued_patches: int = _option(
        1_048_576,
        _COUNT,
        "N",
        "patches that may be pending until sent; beyond them requests are refused",
    )
    max_inflight_images: int = _option(
        1_024, _COUNT, "N", "images that may be pending; beyond them requests are refused"
    )
    max_inflight_bytes: int = _option(
        2**30, _SIZE, "BYTES", "bytes of requests that may be pending; beyond them requests are refused"
    )
    max_decoded_bytes: int = _option(
        2**31,
        _SIZE,
        "BYTES",
        "memory that images may take while they are decoded, and, with image_processing device, as pixels that wait "
        "for it; beyond it images wait to be decoded",
    )
    request_window_patches: int = _option(
        65_536, _COUNT, "N", "patches of one request that are decoded, encoded or waiting to be read at a time"
    )
    send_timeout_s: float = _option(
        30.0, _some_seconds, "SECONDS", "how long the caller may leave one message unread before its call is ended"
    )
    watchdog_s: float = _option(
        300.0, _seconds, "SECONDS", "how long one batch may take before the device counts as broken; 0 for ever"
    )
    cache_bytes: int = _option(4 * 2**30, _SIZE_OR_NONE, "BYTES", "embeddings kept for images that come again; 0 none")
    max_leased_bytes: int = _option(
        2**30, _SIZE_OR_NONE, "BYTES", "embeddings retained for other processes to fetch; 0 none"
    )
    lease_s: float = _option(
        60.0, _seconds, "SECONDS", "how long embeddings are retained where the request does not say"
    )
    max_lease_s: float = _option(600.0, _seconds, "SECONDS", "how long embeddings are retained at the most")
    max_images: int = _option(64, _COUNT, "N", "images in one request")
    max_request_bytes: int = _option(128 * 2**20, _MESSAGE_SIZE, "BYTES", "size of one request")
    max_request_patches: int = _option(262_144, _COUNT, "N", "patches that one request's images may make")
    max_image_bytes: int = _option(32 * 2**20, _MESSAGE_SIZE, "BYTES", "size of one encoded image")
    max_image_side: int = _option(32_768, _COUNT, "PIXELS", "longer side of an image, before resizing")
    max_image_pixels: int = _option(80_000_000, _AREA, "PIXELS", "area of an image, before resizing")
    drain_s: float = _option(30.0, _seconds, "SECONDS", "on SIGTERM, how long running requests may take to finish")
    tracing: bool = _option(False, _switch, "on|off", "sends spans by OpenTelemetry; the OTEL_ variables say where to")
    log_level: str = _option(
        "info", _one_of("debug", "info", "warning", "error"), "LEVEL", "debug, info, warning or error"
    )
    log_format: str = _option(
        "console", _one_of("console", "json"), "FORMAT", "console, for people, or json, one object a line"
    )


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config, and where each of its values came from."""

    config: Config
    sources: Mapping[str, Source]

    def describe(self) -> str:
        """One line for each option: name, value, source."""
        width = max(len(name) for name in self.sources)
        lines = [f"{name:<{width}}  {getattr(self.config, name)!s:<24} {self.sources[name]}" for name in self.sources]
        return "\n".join(lines)


def platform_switches(config: Config) -> dict[str, str]:
    """The switches that a platform's rules read, as environment variables: ours, and flash-attn's own."""
    ours = {
        environment_name(name): "1" if getattr(config, name) else "0"
        for name in ("rocm_use_aiter", "rocm_use_aiter_mha")
    }
    theirs = {name: os.environ[name] for name in ("FLASH_ATTENTION_TRITON_AMD_ENABLE",) if name in os.environ}
    return ours | theirs


def tracing_variables() -> dict[str, str]:
    """OpenTelemetry's variables, as they are set. It reads most of them by itself."""
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}


def kernel_cache_folder(config: Config) -> Path | None:
    """Where ``kernel_cache_dir`` says, or its default says, that compiled kernels are kept; None for nowhere.

    Not absolute where the default lies in a home and this user has none.
    """
    if config.kernel_cache_dir is not None:
        return Path(config.kernel_cache_dir).absolute() if config.kernel_cache_dir.strip() else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    # What is not absolute is to be ignored: XDG Base Directory Specification 0.8.
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "encoder-svc"


def set_unless_set(variables: Mapping[str, str]) -> dict[str, str]:
    """Sets variables of other packages, which they read when they are imported, for this process.

    Returns:
        Those that the operator has set, which stay as they are.
    """
    kept = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update({name: value for name, value in variables.items() if name not in kept})
    return kept


def options() -> tuple[Field[Any], ...]:
    """Every option, in the order they are shown in. ``metadata`` holds parse, metavar and help."""
    return fields(Config)


def flag_name(option: str) -> str:
    return "--" + option.replace("_", "-")


def environment_name(option: str) -> str:
    return ENVIRONMENT_PREFIX + option.upper()


def load_config(*, flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None) -> LoadedConfig:
    """Builds the config: a flag beats an environment variable, which beats the file, which beats the default.

    Args:
        flags: option names to values; None where a flag was not given.
        environment: usually ``os.environ``; what begins with ``ENCODER_`` must be an option.
        file: YAML, option names to values; see :mod:`encoder_svc.config_file`.

    Raises:
        ConfigError: an unknown key, or a value that does not fit; names where it was read. Or two values contradict
            each other.
    """
    known = {option.name: option for option in options()}
    values: dict[str, Any] = {}
    sources: dict[str, Source] = dict.fromkeys(known, "default")

    def take(name: str, value: Any, source: Source, where: str) -> None:
        if value is None:
            return
        if isinstance(value, str) and not value.strip() and not known[name].metadata["may_be_empty"]:
            raise ConfigError(f"{where}: {value!r} is empty.")
        try:
            values[name] = known[name].metadata["parse"](value)
        except ValueError as error:
            raise ConfigError(f"{where}: {value!r} is {error}.") from None
        sources[name] = source

    for name, value in _in_file(file).items():
        if name not in known:
            raise ConfigError(f"{file}: unknown key '{name}'. Known: {', '.join(known)}.")
        if value is None:
            raise ConfigError(f"{file}: key '{name}' has no value; remove it or give one.")
        take(name, value, "file", f"{file}, key '{name}'")
    by_variable = {environment_name(name): name for name in known}
    for variable, text in sorted(environment.items()):
        if variable.startswith(ENVIRONMENT_PREFIX) and not _is_kubernetes_service_link(variable, text):
            if variable not in by_variable:
                raise ConfigError(f"environment: {variable} is not an option. `encoder-svc serve --help` lists them.")
            take(by_variable[variable], text, "environment", f"environment, {variable}")
    for name, value in flags.items():
        take(name, value, "flag", flag_name(name))
    config = Config(**values)
    if not 0 < config.lease_s <= config.max_lease_s:
        raise ConfigError(
            f"lease_s is {config.lease_s:g} and max_lease_s {config.max_lease_s:g}: "
            "a lease must be longer than 0 and at most max_lease_s."
        )
    if config.image_processing == "device" and config.resize != "torch":
        raise ConfigError(
            f"image_processing is device and resize {config.resize}: only resize torch has a resize on the device."
        )
    return LoadedConfig(config, sources)


def _is_kubernetes_service_link(variable: str, text: str) -> bool:
    """Kubernetes puts ENCODER_SVC_PORT=tcp://… and its like into every pod beside a Service named encoder-svc."""
    return text.startswith(("tcp://", "udp://")) or bool(
        re.search(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)_(PROTO|PORT|ADDR))$", variable)
    )


def _in_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    from encoder_svc.config_file import read_config_file  # PyYAML is a server's alone

    return read_config_file(file)
