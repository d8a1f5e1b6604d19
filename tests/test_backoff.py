"""Waits double up to the cap."""

import pytest

from dicomai.deliver.backoff import wait_seconds

MIDDLE = 0.5  # of the jitter: neither shorter nor longer


def test_waits_double_up_to_the_longest() -> None:
    waits = [wait_seconds(attempts, 5, 900, MIDDLE) for attempts in range(1, 11)]
    assert waits == pytest.approx([5, 10, 20, 40, 80, 160, 320, 640, 900, 900])


@pytest.mark.parametrize("attempts", [1, 5, 300])
def test_jitter_spreads_a_wait_by_a_tenth(attempts: int) -> None:
    shortest, middle, longest = (wait_seconds(attempts, 5, 900, j) for j in (0.0, MIDDLE, 1.0))
    assert (shortest, longest) == pytest.approx((0.9 * middle, 1.1 * middle))


def test_a_peer_that_is_away_for_months_is_still_asked() -> None:
    assert wait_seconds(1_000_000, 5, 900, MIDDLE) == pytest.approx(900)


def test_a_first_wait_above_the_longest_is_the_longest() -> None:
    assert wait_seconds(1, 60, 30, MIDDLE) == pytest.approx(30)


def test_three_hundred_attempts_with_the_shipped_settings_last_about_three_days() -> None:
    total = sum(wait_seconds(attempts, 5, 900, MIDDLE) for attempts in range(1, 300))
    assert 3.0 < total / 86400 < 3.1
