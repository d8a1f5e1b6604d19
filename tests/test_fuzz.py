"""A few of the damaged byte streams of fuzz.py, each time the same."""

from pathlib import Path

import fuzz
import pytest

pytestmark = pytest.mark.timeout(300)


def test_a_listener_answers_or_aborts_what_is_damaged_and_goes_on(tmp_path: Path) -> None:
    outcome = fuzz.run(tmp_path, 2000, print)
    assert sum(outcome.ends.values()) == 2000
    assert outcome.ends["hung"] == 0
    assert outcome.good == 10
    assert outcome.ends["aborted"] > 500
    assert outcome.events["received"] > 300  # not all damage is fatal
    assert outcome.exceptions == outcome.unstructured == outcome.slow == []
    assert outcome.without_row == outcome.without_file == 0
    assert outcome.growth() < 1.1
    assert outcome.flat()
