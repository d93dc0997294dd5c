"""Lines of the log: what a request leaves, and what a caller cannot do with them."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from encoder_svc.client import EncoderClient, RequestError
from encoder_svc.observability.logs import ConsoleFormatter, JsonFormatter, configure_logs
from tests.serving import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HOSTILE = 'x\n2026-01-01 00:00:00,000 ERROR forged: \x1b[31m"line"\u2028\x00'


@pytest.fixture
def root_logger() -> Iterator[None]:
    """Puts the process's logging back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(capture=False)


def line(formatter: logging.Formatter, message: str = "event", **fields: object) -> str:
    record = logging.LogRecord("encoder_svc.x", logging.INFO, __file__, 1, message, (), None)
    record.fields = fields
    return formatter.format(record)


def test_a_json_line_is_one_object_with_its_fields() -> None:
    entry = json.loads(line(JsonFormatter(), code="OK", images=2, stages_ms={"decode": 1.5}))
    assert datetime.fromisoformat(entry.pop("time")).tzinfo is not None
    assert entry == {
        "level": "info",
        "logger": "encoder_svc.x",
        "message": "event",
        "code": "OK",
        "images": 2,
        "stages_ms": {"decode": 1.5},
    }


def test_a_console_line_ends_in_its_fields_without_the_empty_ones() -> None:
    assert line(ConsoleFormatter(), code="OK", reason="", images=0, stages_ms={"decode": 1.5, "send": 2}).endswith(
        "INFO encoder_svc.x: event code=OK images=0 stages_ms={decode=1.5 send=2}"
    )


@pytest.mark.parametrize("formatter", [ConsoleFormatter(), JsonFormatter()])
def test_a_callers_text_stays_inside_its_line(formatter: logging.Formatter) -> None:
    written = line(formatter, request_id=HOSTILE)
    assert len(written.splitlines()) == 1
    assert written.isascii()
    assert written.isprintable()
    assert json.dumps(HOSTILE) in written


@pytest.mark.parametrize("formatter", [ConsoleFormatter(), JsonFormatter()])
def test_a_long_text_is_cut(formatter: logging.Formatter) -> None:
    written = line(formatter, request_id="é" * 10_000)
    assert len(written) < 1_200


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize("log_format", ["console", "json"])
def test_an_exception_is_written_with_its_traceback(log_format: str) -> None:
    stream = io.StringIO()
    configure_logs("info", log_format, stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("encoder_svc.x").exception("failed")
    written = stream.getvalue()
    if log_format == "json":
        [only] = written.splitlines()
        written = json.loads(only)["exception"]
    assert "ValueError: broken" in written
    assert f"in {sys._getframe().f_code.co_name}" in written


@pytest.mark.usefixtures("root_logger")
def test_what_python_warns_of_is_a_line_too() -> None:
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logs("info", "json", stream)
        warnings.warn("an image of odd size", stacklevel=1)
    [only] = stream.getvalue().splitlines()
    assert json.loads(only)["level"] == "warning"
    assert "an image of odd size" in json.loads(only)["message"]


@pytest.mark.usefixtures("root_logger")
def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    configure_logs("warning", "json", stream)
    logging.getLogger("encoder_svc.x").info("quiet")
    assert stream.getvalue() == ""


def test_each_request_leaves_one_line_of_json(tiny_checkpoint: Callable[[str], Path], photos: list[Path]) -> None:
    with ServerProcess(
        "--model", tiny_checkpoint("qwen2_vl"), "--device", "cpu", "--log-format", "json", "--port", "0", wait=False
    ) as serving:
        port = serving.wait_for_log(r'"message": "serving [^"]*:(\d+)"')[1]
        with EncoderClient(f"127.0.0.1:{port}") as client:
            images = client.encode(photos[:2], request_id=HOSTILE)
            client.encode([photos[0], b"not an image"], request_id="half", return_errors=True)
            with pytest.raises(RequestError, match="REQUEST_EMPTY"):
                client.encode([], request_id="none")
        assert serving.stop() == 0
        entries = [json.loads(text) for text in serving.log.splitlines()]
    calls = {entry["request_id"]: entry for entry in entries if entry.get("method") == "EncodeImages"}
    assert len([entry for entry in entries if "method" in entry]) == 3
    good, half, none = calls[HOSTILE], calls["half"], calls["none"]
    assert (good["code"], good["reason"], good["images"], good["failed"]) == ("OK", "", 2, 0)
    assert good["rows"] == sum(len(image.embeddings) for image in images)
    assert good["bytes"] == sum(image.embeddings.nbytes for image in images)
    assert {"decode", "forward", "send"} <= good["stages_ms"].keys()
    assert 0 < sum(good["stages_ms"].values()) <= good["duration_ms"] * 1.05
    assert (half["code"], half["images"], half["failed"]) == ("OK", 2, 1)
    assert (none["code"], none["reason"], none["rows"]) == ("INVALID_ARGUMENT", "REQUEST_EMPTY", 0)
