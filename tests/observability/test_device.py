"""What is said of the device, on a clock of the test's own."""

from __future__ import annotations

import time

import pytest

from encoder_svc.observability.device import DeviceWatch
from encoder_svc.observability.metrics import Metrics


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def watch(clock: Clock, metrics: Metrics) -> DeviceWatch:
    return DeviceWatch(metrics, clock)


def test_the_age_is_that_of_the_oldest_batch(watch: DeviceWatch, clock: Clock) -> None:
    assert watch.batch_age_s == 0
    first = watch.begin()
    clock.now_s += 3
    second = watch.begin()
    clock.now_s += 1
    assert watch.batch_age_s == 4
    watch.end(first, "encoded", num_images=1, num_patches=4)
    assert watch.batch_age_s == 1
    watch.end(second, "hung", num_images=1, num_patches=4)
    assert watch.batch_age_s == 0


@pytest.mark.parametrize("duty", [0.0, 0.25, 1.0])
def test_the_busy_ratio_of_a_steady_load_is_its_duty_cycle(watch: DeviceWatch, clock: Clock, duty: float) -> None:
    for _ in range(200):
        batch = watch.begin()
        clock.now_s += 0.5
        watch.end(batch, "encoded", num_images=1, num_patches=4, busy_s=0.5 * duty)
    assert watch.busy_ratio == pytest.approx(duty, rel=0.03)


def test_several_devices_are_as_busy_as_in_the_mean(metrics: Metrics, clock: Clock) -> None:
    watch = DeviceWatch(metrics, clock, num_devices=2)
    for _ in range(200):
        batch = watch.begin()
        clock.now_s += 0.5
        watch.end(batch, "encoded", num_images=1, num_patches=4, busy_s=0.5)
    assert watch.busy_ratio == pytest.approx(0.5, rel=0.03)
    assert metrics.registry.get_sample_value("encoder_device_busy_seconds_total") == 50


def test_the_busy_ratio_fades_once_the_device_is_idle(watch: DeviceWatch, clock: Clock) -> None:
    watch.end(watch.begin(), "encoded", num_images=1, num_patches=4, busy_s=15)
    clock.now_s += 60
    assert 0 < watch.busy_ratio < 0.03


def test_only_a_batch_that_was_encoded_is_progress(watch: DeviceWatch) -> None:
    watch.last_progress_s = 0.0
    watch.end(watch.begin(), "failed", num_images=1, num_patches=4)
    assert watch.last_progress_s == 0
    watch.end(watch.begin(), "encoded", num_images=1, num_patches=4)
    assert watch.last_progress_s == pytest.approx(time.time(), abs=5)


def test_batches_are_counted_by_outcome_and_size(watch: DeviceWatch, metrics: Metrics) -> None:
    watch.end(watch.begin(), "encoded", num_images=3, num_patches=48, busy_s=0.5, padding_ratio=0.25)
    watch.end(watch.begin(), "out_of_memory", num_images=2, num_patches=20)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert value("encoder_batches_total", outcome="encoded") == 1
    assert value("encoder_batches_total", outcome="out_of_memory") == 1
    assert value("encoder_batches_total", outcome="hung") == 0
    assert value("encoder_batch_patches_sum") == 68
    assert value("encoder_batch_images_sum") == 5
    assert value("encoder_batch_padding_ratio_count") == 1
    assert value("encoder_batch_padding_ratio_sum") == 0.25
    assert value("encoder_device_busy_seconds_total") == 0.5
