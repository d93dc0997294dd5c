"""What is counted, on made-up requests: the window is from second 10 to second 20."""

from __future__ import annotations

import pytest

from encoder_svc.bench.recorder import ErrorKind, Exchange, Recorder
from encoder_svc.errors import Reason, RequestError, request_error


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(began_s=8.0, window_starts_s=10.0, window_ends_s=20.0, timeout_s=3.0)


def exchange(
    due_s: float, ended_s: float, *, num_images: int = 1, errors: list[RequestError] | None = None
) -> Exchange:
    num_failed = len(errors or [])
    return Exchange(
        due_s=due_s,
        sent_s=due_s + 0.25,
        num_images=num_images,
        first_s=(due_s + ended_s) / 2,
        ended_s=ended_s,
        num_encoded=num_images - num_failed,
        errors=errors or [],
    )


def broken(index: int = 0) -> RequestError:
    return request_error(Reason.IMAGE_CORRUPT, "broken", image_index=index)


def full() -> RequestError:
    return request_error(Reason.QUEUE_FULL, "full", retry_after_s=0.5)


def test_rates_are_of_what_arrives_in_the_window(recorder: Recorder, encoded) -> None:
    for now_s in (9.9, 10.0, 19.9, 20.0):
        recorder.image(encoded((1, 4, 6)), now_s)
    assert (recorder.num_images, recorder.num_patches, recorder.num_rows) == (2, 48, 12)
    assert recorder.num_bytes == 12 * 8 * 4
    assert recorder.stages_s["forward_s"].distribution().mean == 0.01


def test_latencies_are_of_requests_due_in_the_window_whenever_they_end(recorder: Recorder) -> None:
    for due_s, ended_s in ((9.0, 12.0), (11.0, 12.0), (19.0, 25.0), (20.0, 21.0)):
        recorder.ended(exchange(due_s, ended_s))
    assert recorder.num_succeeded == 2
    assert sorted(recorder.latency_s.values()) == [1.0, 6.0]
    assert sorted(recorder.first_embedding_s.values()) == [0.5, 3.0]
    assert sorted(recorder.send_lag_s.values()) == [0.25, 0.25]


def test_goodput_is_whole_requests_within_the_timeout_that_end_in_the_window(recorder: Recorder) -> None:
    recorder.ended(exchange(9.0, 11.0, num_images=2))  # counts: it ended in the window
    recorder.ended(exchange(11.0, 15.0, num_images=4))  # too late for its caller
    recorder.ended(exchange(12.0, 13.0, num_images=8, errors=[broken()]))  # not whole
    recorder.ended(exchange(19.0, 20.5, num_images=16))  # after the window
    assert recorder.num_good_images == 2
    assert recorder.num_requests_ended == 2


def test_counts_of_requests_and_images_add_up(recorder: Recorder) -> None:
    recorder.ended(exchange(11.0, 12.0, num_images=3))
    recorder.ended(exchange(11.0, 12.0, num_images=3, errors=[broken(1)]))
    recorder.ended(Exchange(due_s=11.0, sent_s=11.0, num_images=3, ended_s=11.1, errors=[full()]))
    recorder.unfinished(Exchange(due_s=11.0, sent_s=11.0, num_images=3))
    recorder.not_sent(11.0)
    for outside_s in (9.0, 21.0):
        recorder.unfinished(Exchange(due_s=outside_s, sent_s=outside_s, num_images=3))
        recorder.not_sent(outside_s)
    counts = (recorder.num_succeeded, recorder.num_partly_failed, recorder.num_failed)
    assert (*counts, recorder.num_unfinished, recorder.num_not_sent) == (1, 1, 1, 1, 1)
    assert (recorder.num_images_encoded, recorder.num_images_failed) == (5, 4)
    assert recorder.latency_s.count == 1
    assert recorder.failure_latency_s.count == 2


def test_errors_are_counted_by_scope_code_and_reason_with_their_retry_delays(recorder: Recorder) -> None:
    recorder.ended(exchange(11.0, 12.0, num_images=3, errors=[broken(0), broken(2)]))
    recorder.ended(Exchange(due_s=11.0, sent_s=11.0, num_images=1, ended_s=11.1, errors=[full()]))
    recorder.ended(Exchange(due_s=30.0, sent_s=30.0, num_images=1, ended_s=31.0, errors=[full()]))
    assert recorder.errors == {
        ErrorKind("image", "INVALID_ARGUMENT", "IMAGE_CORRUPT"): 2,
        ErrorKind("request", "RESOURCE_EXHAUSTED", "QUEUE_FULL"): 1,
    }
    assert recorder.retry_after_s.values().tolist() == [0.5]


def test_kinds_of_errors_are_bounded(recorder: Recorder) -> None:
    for number in range(1000):
        error = request_error(f"REASON_{number}", "made up")
        recorder.ended(Exchange(due_s=11.0, sent_s=11.0, num_images=1, ended_s=11.1, errors=[error]))
    assert len(recorder.errors) == 257
    assert sum(recorder.errors.values()) == 1000


def test_the_timeline_has_the_warm_up_and_is_bounded(recorder: Recorder, encoded) -> None:
    for now_s in (8.0, 8.2, 19.99, 20.1, 99.0):
        recorder.image(encoded(), now_s)
    assert (len(recorder.images_by_bin), recorder.bin_s) == (48, 0.25)
    assert (recorder.images_by_bin[0], recorder.images_by_bin[-1], sum(recorder.images_by_bin)) == (2, 1, 3)
    day = Recorder(began_s=0.0, window_starts_s=0.0, window_ends_s=86_400.0, timeout_s=1.0)
    assert len(day.images_by_bin) == 240


def test_an_interruption_ends_the_window(recorder: Recorder) -> None:
    recorder.interrupt(14.0)
    assert recorder.window_s == 4.0
    assert len(recorder.images_by_bin) == 24
    recorder.interrupt(9.0)
    assert recorder.window_s == 0.0
