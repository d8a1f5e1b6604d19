"""A short kill storm, each time with the same seed."""

from pathlib import Path

import pytest
import storm
from peers import need

pytestmark = pytest.mark.timeout(240)
PLAN = storm.Plan(kills=12, studies=12, images=60, mean_seconds=2.0)


def test_what_was_acknowledged_survives_a_dozen_kills_and_is_told_once(tmp_path: Path) -> None:
    need("Orthanc")
    tally = storm.storm(tmp_path, f"sqlite:///{tmp_path}/dicomai.db", PLAN, print)
    print("\n" + "\n".join(storm.summary(tally, PLAN, "sqlite")))
    assert tally.faults == []
    assert len(tally.acknowledged) == 60
    assert tally.kills.total() == 12
    assert set(tally.kills) == set(storm.ROLES)
    assert tally.resent > 0
