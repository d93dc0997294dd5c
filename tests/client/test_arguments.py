"""Arguments of the wrong type: a sentence, before anything is sent. (To where nobody listens, sending would end in an
UnavailableError.)"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from encoder_svc.client import AsyncEncoderClient, EncoderClient, PixelValues
from encoder_svc.client.arguments import call_timeout, checked_keys

if TYPE_CHECKING:
    from collections.abc import Callable

NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda client: client.fetch(None), "keys must be a list of keys, not NoneType"),
        (lambda client: client.fetch(key for key in ["a"]), "keys must be a list of keys, not generator"),
        (lambda client: client.fetch([5]), "a key must be a text, not int"),
        (lambda client: client.release(None), "keys must be a list of keys, not NoneType"),
        (lambda client: client.release([b"a"]), "a key must be a text, not bytes"),
        (lambda client: client.retain([b"x"], lease_s=None), "lease_s must be a number of seconds, 0 for the server's"),
        (lambda client: client.retain([b"x"], lease_s="5"), "lease_s must be a number of seconds, .* not str"),
        (lambda client: client.info(timeout_s="5"), "timeout_s must be a number of seconds, or None, not str"),
        (
            lambda client: client.encode([b"x"], timeout_s="5"),
            "timeout_s must be a number of seconds, or None, not str",
        ),
        (lambda client: client.encode(None), "images must be a list of images, not NoneType"),
        (
            lambda client: client.encode(PixelValues(np.zeros((1, 1)), (1, 1, 1))),
            "images must be a list of images, not PixelValues; put a single one in a list",
        ),
    ],
)
@pytest.mark.parametrize("kind", [EncoderClient, AsyncEncoderClient])
async def test_a_call_with_an_argument_of_another_type_is_refused(
    kind: type[EncoderClient | AsyncEncoderClient], call: Callable[[Any], Any], why: str
) -> None:
    client = kind(NOBODY)
    with pytest.raises(TypeError, match=why):
        await call(client)
    closed = client.close()
    if inspect.isawaitable(closed):
        await closed


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"target": None}, "target must be a text such as host:port, not NoneType"),
        ({"timeout_s": "5"}, "timeout_s must be a number of seconds, or None, not str"),
        ({"connections": "2"}, "connections must be a whole number, not str"),
        ({"connections": 1.5}, "connections must be a whole number, not float"),
    ],
)
@pytest.mark.parametrize("kind", [EncoderClient, AsyncEncoderClient])
async def test_a_client_of_arguments_of_another_type_is_refused(
    kind: type[EncoderClient | AsyncEncoderClient], arguments: dict[str, Any], why: str
) -> None:
    with pytest.raises(TypeError, match=why):
        kind(**{"target": NOBODY} | arguments)


@pytest.mark.parametrize("seconds", [2, np.float32(2), np.int64(2)])
def test_any_kind_of_number_is_a_timeout(seconds: float) -> None:
    assert call_timeout(seconds, None) == 2


def test_a_key_that_utf8_cannot_carry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a key 'a\\ud800' holds a lone surrogate"):
        checked_keys(["a\ud800"])
