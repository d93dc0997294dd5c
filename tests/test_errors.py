"""One tree, one table: every reason has a code, every code a class, and the numbers are gRPC's own."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from encoder_svc.errors import (
    CODE_NUMBERS,
    CODES,
    AttentionBackendError,
    AttentionKernelError,
    BrokenDeviceError,
    CancelledError,
    CheckpointError,
    ConfigError,
    DeadlineError,
    EncoderSvcError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    Reason,
    RequestError,
    StartupError,
    UnavailableError,
    request_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CLASS_OF_CODE = {
    "INVALID_ARGUMENT": InvalidInputError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "CANCELLED": CancelledError,
    "UNAVAILABLE": UnavailableError,
    "NOT_FOUND": NotFoundError,
    "INTERNAL": InternalError,
    "DATA_LOSS": InternalError,
}


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_code_that_grpc_knows_by_the_same_number(reason: Reason) -> None:
    code = CODES[reason]
    assert grpc.StatusCode[code].value[0] == CODE_NUMBERS[code]


def test_the_numbers_are_grpcs_own_for_every_code_but_ok() -> None:
    assert {code.name: code.value[0] for code in grpc.StatusCode if code is not grpc.StatusCode.OK} == CODE_NUMBERS


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_is_spelt_as_it_is_named(reason: Reason) -> None:
    assert reason == reason.name == reason.upper()


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.IMAGE_CORRUPT, "INVALID_ARGUMENT"),
        (Reason.REQUEST_TOO_MANY_IMAGES, "INVALID_ARGUMENT"),
        (Reason.REQUEST_TOO_LARGE, "RESOURCE_EXHAUSTED"),
        (Reason.QUEUE_FULL, "RESOURCE_EXHAUSTED"),
        (Reason.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        (Reason.CANCELLED, "CANCELLED"),
        (Reason.STARTING, "UNAVAILABLE"),
        (Reason.DRAINING, "UNAVAILABLE"),
        (Reason.UNREACHABLE, "UNAVAILABLE"),
        (Reason.ENCODER_FAILED, "INTERNAL"),
        (Reason.CHECKSUM_MISMATCH, "DATA_LOSS"),
    ],
)
def test_clients_can_rely_on_a_reasons_code(reason: Reason, code: str) -> None:
    assert CODES[reason] == code


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason.startswith(("IMAGE_", "RAW_", "GRID_"))])
def test_an_images_own_fault_is_an_invalid_input(reason: Reason) -> None:
    assert isinstance(request_error(reason, "…"), InvalidInputError)


@pytest.mark.parametrize("reason", Reason)
def test_an_error_is_of_the_class_of_its_code(reason: Reason) -> None:
    error = request_error(reason, "Send less.")
    assert type(error) is CLASS_OF_CODE[CODES[reason]]
    assert (error.reason, error.code, error.message) == (reason, CODES[reason], "Send less.")


def test_a_code_that_is_given_beats_the_reasons_own() -> None:
    error = request_error(Reason.QUEUE_FULL, "…", code="UNAVAILABLE")
    assert (type(error), error.code) == (UnavailableError, "UNAVAILABLE")


@pytest.mark.parametrize("code", ["ABORTED", "UNKNOWN", "FROM_THE_FUTURE"])
def test_a_code_without_a_class_is_an_internal_error_that_keeps_the_code(code: str) -> None:
    error = request_error("NEWER_REASON", "…", code=code)
    assert (type(error), error.code, error.reason) == (InternalError, code, "NEWER_REASON")


def test_a_reason_that_is_not_known_is_internal() -> None:
    assert request_error("NEWER_REASON", "…").code == "INTERNAL"


def test_the_text_has_the_image_the_message_and_the_reason() -> None:
    assert str(request_error(Reason.RAW_SIZE, "Too short.", image_index=0)) == "image 0: Too short. [RAW_SIZE]"
    assert str(request_error(Reason.DRAINING, "Go elsewhere.")) == "Go elsewhere. [DRAINING]"


def test_where_and_when_are_kept() -> None:
    error = request_error(Reason.QUEUE_FULL, "…", image_index=3, retry_after_s=1.5)
    assert (error.image_index, error.retry_after_s) == (3, 1.5)


EXAMPLES = [
    *[cls("what is wrong") for cls in (EncoderSvcError, StartupError, ConfigError, CheckpointError)],
    AttentionBackendError("what is wrong"),
    BrokenDeviceError("what is wrong"),
    AttentionKernelError("FLASH_ATTN", "fa4", "no kernel image"),
    *[request_error("NEWER_REASON", "…", code=code, image_index=3, retry_after_s=1.5) for code in CLASS_OF_CODE],
    request_error(Reason.DRAINING, "…"),
]


def family(cls: type[EncoderSvcError]) -> set[type[EncoderSvcError]]:
    return {cls}.union(*map(family, cls.__subclasses__()))


def test_every_class_has_an_example() -> None:
    assert {type(error) for error in EXAMPLES} | {RequestError} == family(EncoderSvcError)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["copy", "deep", "pickle"],
)
@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_copy_says_all_that_the_error_says(error: EncoderSvcError, copied: Callable) -> None:
    other = copied(error)
    assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))


def refuse() -> None:
    raise request_error(Reason.QUEUE_FULL, "Send less.", image_index=3, retry_after_s=1.5)


def test_an_error_reaches_the_process_that_waits_for_a_pool() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(OverloadedError, match=r"image 3: Send less\. \[QUEUE_FULL\]") as caught:
            pool.submit(refuse).result(timeout=50)
        assert caught.value.retry_after_s == 1.5
        assert pool.submit(abs, -1).result(timeout=50) == 1


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        (StartupError, EncoderSvcError),
        (RequestError, EncoderSvcError),
        (ConfigError, StartupError),
        (CheckpointError, StartupError),
        (AttentionBackendError, StartupError),
        (BrokenDeviceError, StartupError),
        *[(cls, RequestError) for cls in dict.fromkeys(CLASS_OF_CODE.values())],
    ],
)
def test_the_tree_is_as_its_docstring_draws_it(child: type, parent: type) -> None:
    assert child.__base__ is parent


def test_every_reason_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs/wire.md").read_text()
    assert [reason for reason in Reason if f"`{reason}`" not in text] == []
