"""Where each value comes from, and what is refused with which sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from encoder_svc.config import Config, LoadedConfig, environment_name, flag_name, load_config, options
from encoder_svc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def load(
    *, flags: dict[str, Any] | None = None, environment: dict[str, str] | None = None, file: Path | None = None
) -> LoadedConfig:
    return load_config(flags=flags or {}, environment=environment or {}, file=file)


# Precedence


def test_without_anything_every_value_is_the_default() -> None:
    loaded = load()
    assert loaded.config == Config()
    assert set(loaded.sources.values()) == {"default"}


@pytest.mark.parametrize(
    ("in_file", "in_environment", "in_flags", "value", "source"),
    [
        (None, None, None, 64, "default"),
        ("1", None, None, 1, "file"),
        (None, "2", None, 2, "environment"),
        (None, None, "3", 3, "flag"),
        ("1", "2", None, 2, "environment"),
        ("1", None, "3", 3, "flag"),
        (None, "2", "3", 3, "flag"),
        ("1", "2", "3", 3, "flag"),
    ],
)
def test_a_flag_beats_the_environment_which_beats_the_file(
    in_file: str | None,
    in_environment: str | None,
    in_flags: str | None,
    value: int,
    source: str,
    write_file: Callable[[str], Path],
) -> None:
    loaded = load(
        file=write_file(f"max_images: {in_file}") if in_file else None,
        environment={"ENCODER_MAX_IMAGES": in_environment} if in_environment else {},
        flags={"max_images": in_flags, "port": None},
    )
    assert (loaded.config.max_images, loaded.sources["max_images"]) == (value, source)
    assert (loaded.config.port, loaded.sources["port"]) == (50_051, "default")


def test_a_wrong_value_is_refused_even_where_a_better_source_overrides_it() -> None:
    with pytest.raises(ConfigError, match="ENCODER_PORT"):
        load(environment={"ENCODER_PORT": "many"}, flags={"port": "50051"})


def test_the_description_has_a_line_for_each_option_with_its_value_and_source() -> None:
    loaded = load(environment={"ENCODER_PORT": "6000"}, flags={"device": "cpu"})
    lines = {line.split()[0]: line.split()[1:] for line in loaded.describe().splitlines()}
    assert list(lines) == [option.name for option in options()]
    assert lines["port"] == ["6000", "environment"]
    assert lines["device"] == ["cpu", "flag"]
    assert lines["model"] == ["None", "default"]


# Names


def test_the_options_are_these() -> None:
    """Adding, renaming or removing one is a decision: it changes flags, variables and files of those who run it."""
    assert [option.name for option in options()] == [
        "model",
        "revision",
        "host",
        "port",
        "metrics_port",
        "max_connection_age_s",
        "tls_cert",
        "tls_key",
        "tls_client_ca",
        "device",
        "cpu_devices",
        "dtype",
        "mm_encoder_attn_backend",
        "mm_encoder_flash_attn_implementation",
        "rocm_use_aiter",
        "rocm_use_aiter_mha",
        "resize",
        "image_processing",
        "min_pixels",
        "max_pixels",
        "frontend_processes",
        "decode_threads",
        "max_batch_patches",
        "memory_fraction",
        "cuda_graph_max_patches",
        "quantization",
        "kernel_cache_dir",
        "max_batch_images",
        "max_queued_patches",
        "max_inflight_images",
        "max_inflight_bytes",
        "max_decoded_bytes",
        "request_window_patches",
        "send_timeout_s",
        "watchdog_s",
        "cache_bytes",
        "max_leased_bytes",
        "lease_s",
        "max_lease_s",
        "max_images",
        "max_request_bytes",
        "max_request_patches",
        "max_image_bytes",
        "max_image_side",
        "max_image_pixels",
        "drain_s",
        "tracing",
        "log_level",
        "log_format",
    ]


def test_an_option_gives_its_flag_and_its_variable() -> None:
    assert flag_name("mm_encoder_attn_backend") == "--mm-encoder-attn-backend"
    assert environment_name("mm_encoder_attn_backend") == "ENCODER_MM_ENCODER_ATTN_BACKEND"


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_option_says_what_it_is(option: dataclasses.Field[Any]) -> None:
    assert option.metadata["help"]
    assert option.metadata["metavar"]


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_default_is_a_value_that_the_option_takes(option: dataclasses.Field[Any]) -> None:
    if option.default is not None:
        assert option.metadata["parse"](option.default) == option.default
        assert option.metadata["parse"](str(option.default)) == option.default


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]


# What is refused


def test_an_unknown_key_in_the_file_is_refused_by_name(write_file: Callable[[str], Path]) -> None:
    path = write_file("max_image: 3")
    with pytest.raises(ConfigError, match=r"config\.yaml: unknown key 'max_image'\. Known: model, .*max_images"):
        load(file=path)


@pytest.mark.parametrize("variable", ["ENCODER_MAX_IMAGE", "ENCODER_", "ENCODER_max_images", "ENCODER_SVC_PORT"])
def test_an_unknown_variable_is_refused_by_name(variable: str) -> None:
    with pytest.raises(ConfigError, match=rf"environment: {variable} is not an option"):
        load(environment={variable: "3"})


@pytest.mark.parametrize("variable", ["PATH", "MAX_IMAGES", "encoder_max_images", "MY_ENCODER_PORT"])
def test_variables_of_others_are_none_of_ours(variable: str) -> None:
    assert load(environment={variable: "3"}) == load()


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("port", "many", "not a whole number"),
        ("port", 1.5, "not a whole number"),
        ("port", True, "not a whole number"),
        ("port", "-1", "not a port, 0 to 65535"),
        ("port", "65536", "not a port, 0 to 65535"),
        ("max_images", "0", "less than 1"),
        ("max_images", "-5", "less than 1"),
        ("max_images", [1], "not a whole number"),
        ("decode_threads", "0", "less than 1"),
        ("decode_threads", "1025", "more than 1024"),
        ("min_pixels", "0", "less than 1"),
        ("dtype", "float64", "not one of auto, float32, float16, bfloat16"),
        ("resize", "bicubic", "not one of torch, pillow"),
        ("log_level", "loud", "not one of debug, info, warning, error"),
        ("send_timeout_s", "0", "no time at all"),
        ("drain_s", "-1", "not a duration in seconds"),
        ("drain_s", "nan", "not a duration in seconds"),
        ("drain_s", "inf", "not a duration in seconds"),
        ("drain_s", "soon", "not a duration in seconds"),
        ("max_image_bytes", "0", "less than 1"),
        ("max_image_bytes", "12 parsecs", "not a size in bytes"),
        ("max_image_bytes", "1.5MiB", "not a size in bytes"),
        ("max_image_bytes", "MiB", "not a size in bytes"),
        ("max_image_bytes", "-1MiB", "not a size in bytes"),
        ("max_image_bytes", "1TiB", "not a size in bytes"),
        ("max_image_bytes", "1BB", "not a size in bytes"),
        ("max_image_bytes", "9" * 5000, "not a size in bytes"),
        ("cache_bytes", "99999999999999999999GiB", f"more than {2**44}"),
        ("max_leased_bytes", str(2**44 + 1), f"more than {2**44}"),
        ("max_decoded_bytes", "999999GiB", f"more than {2**44}"),
        ("max_inflight_bytes", "999999GiB", f"more than {2**44}"),
        ("host", "", "empty"),
        ("host", " ", "empty"),
        ("port", "", "empty"),
        ("dtype", "", "empty"),
        ("host", 5, "not a text; put it in quotes"),
        ("revision", 1.5, "not a text; put it in quotes"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_the_value_and_why(option: str, value: Any, why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(flags={option: value})
    assert str(refused.value).startswith(f"{flag_name(option)}: {value!r} is {why}")


@pytest.mark.parametrize("flags", [{"lease_s": "700"}, {"lease_s": "0"}, {"max_lease_s": "30"}, {"max_lease_s": "0"}])
def test_a_default_lease_that_no_request_could_have_is_refused(flags: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^lease_s is \d+ and max_lease_s \d+: "):
        load(flags=flags)
    assert load(flags={"lease_s": "600"}).config.lease_s == 600


def test_a_resize_that_no_device_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^image_processing is device and resize pillow: only resize torch "):
        load(flags={"image_processing": "device", "resize": "pillow"})
    assert load(flags={"image_processing": "Device"}).config.image_processing == "device"


def test_a_wrong_value_names_the_place_that_it_was_read_from(write_file: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"^environment, ENCODER_PORT: 'x' is "):
        load(environment={"ENCODER_PORT": "x"})
    with pytest.raises(ConfigError, match=r"config\.yaml, key 'port': 'x' is "):
        load(file=write_file("port: x"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("port: [", "is not YAML"),
        ("- port", "must map option names to values"),
        ("port", "must map option names to values"),
        ("[port]: 2", "is not YAML"),
        ("port: !!int 5", r"is not YAML \(line 1: could not determine a constructor"),
        ("port: 1\nhost: a\nport: 2", r"is not YAML \(line 3: key 'port' is there twice\)"),
        ("1: 2", "unknown key '1'"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("[" * 5000, "is nested too deeply"),
    ],
)
def test_a_file_that_is_no_map_of_options_is_refused(text: str, why: str, write_file: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=why):
        load(file=write_file(text))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(file=path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(file=tmp_path / "missing.yaml")


@pytest.mark.parametrize("empty", ["", " null", " ~"])
@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_a_key_without_a_value_is_refused(
    option: dataclasses.Field[Any], empty: str, write_file: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match=rf"key '{option.name}' has no value; remove it or give one\.$"):
        load(file=write_file(f"{option.name}:{empty}\n"))


@pytest.mark.parametrize(
    ("option", "most"),
    [
        ("max_request_bytes", 2**31 - 1 - 2**20),
        ("max_image_bytes", 2**31 - 1 - 2**20),
        ("max_images", 2**31 - 1),
        ("max_image_side", 2**31 - 1),
        ("max_request_patches", 2**31 - 1),
        ("max_batch_patches", 2**31 - 1),
        ("min_pixels", 178_956_970),
        ("max_pixels", 178_956_970),
        ("max_image_pixels", 178_956_970),
    ],
)
def test_what_the_wire_grpc_or_pillow_cannot_hold_is_refused(option: str, most: int) -> None:
    assert getattr(load(flags={option: str(most)}).config, option) == most
    with pytest.raises(ConfigError, match=f"more than {most}"):
        load(flags={option: str(most + 1)})


# What is taken


@pytest.mark.parametrize(
    ("option", "given", "stored"),
    [
        ("log_level", "INFO", "info"),
        ("dtype", "BFloat16", "bfloat16"),
        ("resize", "Pillow", "pillow"),
        ("mm_encoder_flash_attn_implementation", "FA3", "fa3"),
    ],
)
def test_a_choice_is_taken_in_any_case_and_kept_in_lower_case(option: str, given: str, stored: str) -> None:
    assert getattr(load(flags={option: given}).config, option) == stored


@pytest.mark.parametrize("name", ["2024-13-45", "1" * 5000, "2001-01-01 00:00:00 +99:99", "1.5", "yes", '"null"'])
def test_a_name_in_the_file_is_a_text_whatever_it_looks_like(name: str, write_file: Callable[[str], Path]) -> None:
    assert load(file=write_file(f"model: {name}")).config.model == name.strip('"')


@pytest.mark.parametrize("text", ["port: 8:30", "port: 0x1F", "port: 0o10", "drain_s: 1:30", "max_images: 4.0"])
def test_the_file_takes_the_numbers_that_a_flag_takes_and_no_others(
    text: str, write_file: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match="is not a "):
        load(file=write_file(text))
    assert load(file=write_file("port: 0010")).config.port == load(flags={"port": "0010"}).config.port == 10


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_leaves_the_defaults(text: str, write_file: Callable[[str], Path]) -> None:
    assert load(file=write_file(text)) == load()


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1048576", MIB),
        ("1B", 1),
        ("1K", 2**10),
        ("1KB", 2**10),
        ("1Ki", 2**10),
        ("1KiB", 2**10),
        ("3M", 3 * MIB),
        ("3 MiB", 3 * MIB),
        (" 3mib ", 3 * MIB),
        ("2Gi", 2 * 2**30),
        ("2GiB", 2 * 2**30),
    ],
)
def test_a_size_may_have_a_binary_suffix(text: str, num_bytes: int) -> None:
    assert load(environment={"ENCODER_CACHE_BYTES": text}).config.cache_bytes == num_bytes


@pytest.mark.parametrize(("value", "seconds"), [("0", 0.0), ("2.5", 2.5), ("30s", 30.0), (7, 7.0)])
def test_a_duration_is_in_seconds(value: Any, seconds: float) -> None:
    assert load(flags={"drain_s": value}).config.drain_s == seconds


@pytest.mark.parametrize("value", ["50052", 50_052])
def test_a_number_may_come_as_a_text_or_as_yamls_own(value: Any) -> None:
    assert load(flags={"port": value}).config.port == 50_052


def test_port_zero_is_taken() -> None:
    assert load(flags={"port": "0"}).config.port == 0


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("ENCODER_SVC_SERVICE_HOST", "10.0.0.7"),
        ("ENCODER_SVC_SERVICE_PORT", "50051"),
        ("ENCODER_SVC_SERVICE_PORT_GRPC", "50051"),
        ("ENCODER_SVC_PORT", "tcp://10.0.0.7:50051"),
        ("ENCODER_SVC_PORT_50051_TCP", "tcp://10.0.0.7:50051"),
        ("ENCODER_SVC_PORT_50051_TCP_PROTO", "tcp"),
        ("ENCODER_SVC_PORT_50051_TCP_PORT", "50051"),
        ("ENCODER_SVC_PORT_50051_TCP_ADDR", "10.0.0.7"),
        ("ENCODER_SVC_PORT_53_UDP", "udp://10.0.0.7:53"),
        ("ENCODER_PORT", "tcp://10.0.0.7:50051"),
        ("ENCODER_SERVICE_HOST", "10.0.0.7"),
    ],
)
def test_what_kubernetes_writes_for_a_service_is_ignored(variable: str, text: str) -> None:
    assert load(environment={variable: text}) == load()


def test_the_commented_example_holds_the_defaults() -> None:
    example = Path(__file__).parents[1] / "configs/server.yaml"
    assert load_config(flags={}, environment={}, file=example).config == Config()
