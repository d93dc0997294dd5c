"""Percentiles: exact up to the bound, a fair sample beyond it."""

from __future__ import annotations

import numpy as np
import pytest

from encoder_svc.bench.samples import Samples


def test_a_distribution_is_numpys_with_linear_interpolation() -> None:
    samples = Samples()
    for value in (4.0, 1.0, 3.0, 2.0, 10.0):
        samples.add(value)
    spread = samples.distribution()
    assert spread is not None
    assert (spread.count, spread.mean, spread.max) == (5, 4.0, 10.0)
    assert (spread.p50, spread.p90, spread.p95, spread.p99) == pytest.approx((3.0, 7.6, 8.8, 9.76))


def test_one_value_is_every_percentile() -> None:
    samples = Samples()
    samples.add(0.25)
    spread = samples.distribution()
    assert spread is not None
    assert {spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max} == {0.25}


def test_nothing_has_no_distribution() -> None:
    assert Samples().distribution() is None


def test_beyond_the_bound_a_uniform_sample_is_kept_and_mean_and_max_stay_exact() -> None:
    samples = Samples(max_samples=1000)
    for value in range(100_000):
        samples.add(value)
    spread = samples.distribution()
    assert spread is not None
    assert len(samples.values()) == 1000
    assert (spread.count, spread.mean, spread.max) == (100_000, 49_999.5, 99_999)
    # The median of 1,000 of a uniform spread has a standard deviation of 1.6 % of its width.
    assert spread.p50 == pytest.approx(50_000, abs=8_000)
    assert np.unique(samples.values()).size == 1000
