"""The server's log: one line an event, for people (console) or for a collector (JSON).

A record's ``fields`` (``extra={"fields": {…}}``) become ``name=value`` pairs or JSON members. Texts are escaped, so
that nothing that a caller sends can end a line or begin another.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST_TEXT: Final = 128
_JSON: Final = json.JSONEncoder(default=str)
_PLAIN: Final = re.compile(r"[\w.:/@+-]+", flags=re.ASCII)


def configure_logs(level: str, log_format: str, stream: TextIO) -> None:
    """Sends every logger of the process to ``stream``, and what Python warns of. ``log_format`` is ``console`` or
    ``json``."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


class ConsoleFormatter(logging.Formatter):
    """``2026-01-02 03:04:05,678 INFO name: message name=value …``; empty values are left out."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without an exception's traceback."""
        pairs = [f"{name}={_console_value(value)}" for name, value in _fields(record).items() if value not in ("", {})]
        return " ".join([super().formatMessage(record), *pairs])


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: time (UTC), level, logger, message, the fields, and an exception if there is
    one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: _cut(value) for name, value in _fields(record).items()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _JSON.encode(entry)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _console_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + " ".join(f"{name}={_console_value(part)}" for name, part in value.items()) + "}"
    if not isinstance(value, str):
        return str(value)
    return value if _PLAIN.fullmatch(value) and len(value) <= _LONGEST_TEXT else json.dumps(_cut(value))


def _cut(value: Any) -> Any:
    return f"{value[:_LONGEST_TEXT]}…" if isinstance(value, str) and len(value) > _LONGEST_TEXT else value
