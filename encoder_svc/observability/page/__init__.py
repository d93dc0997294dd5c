"""The status page, for those without Grafana: one self-contained document, drawn in the browser from ``/metrics``."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_SCRIPTS: Final = ("exposition.js", "draw.js", "views.js", "main.js")


class Page(NamedTuple):
    """A document and the Content-Security-Policy under which a browser is to show it."""

    html: bytes
    policy: str


def status_page() -> Page:
    """Puts the document together. Only its own style and script run in it, and it asks nobody but its server."""
    folder = files(__name__)
    style = _read(folder / "style.css")
    script = '"use strict";\n' + "\n".join(_read(folder / name) for name in _SCRIPTS)
    html = _read(folder / "index.html").replace("/* style.css */", style).replace("/* scripts */", script)
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html.encode(), policy)


def _read(file: Traversable) -> str:
    return file.read_text(encoding="utf-8")


def _source(text: str) -> str:
    """The policy's name for this very text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
