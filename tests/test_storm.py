"""A short kill storm, each time with the same seed."""

from pathlib import Path

import pytest
import storm
from peers import need
from sqlalchemy import delete, select, update

from dicomai.store.database import open_database
from dicomai.store.tables import delivery, finding, instance

pytestmark = pytest.mark.timeout(240)
PLAN = storm.Plan(kills=12, studies=12, images=60, mean_seconds=1.0)


def test_what_was_acknowledged_survives_a_dozen_kills_and_is_told_once(tmp_path: Path) -> None:
    need("Orthanc")
    url, data = f"sqlite:///{tmp_path}/dicomai.db", tmp_path / "data"
    tally = storm.storm(tmp_path, url, PLAN, print)
    print("\n" + "\n".join(storm.summary(tally, PLAN, "sqlite")))
    assert tally.faults == []
    assert len(tally.acknowledged) == PLAN.images
    assert tally.kills.total() == PLAN.kills
    assert set(tally.kills) == set(storm.ROLES)
    assert tally.resent > 0

    # And it would have seen the worst.
    database, item = open_database(url), next(iter(tally.acknowledged.values()))
    with database.write() as connection:
        of = instance.c.sop_instance_uid == item.sop_instance_uid
        path = data / connection.execute(select(instance.c.path).where(of)).scalar_one()
        connection.execute(
            delete(finding).where(finding.c.sop_instance_uid == item.sop_instance_uid)
        )
        connection.execute(update(delivery).values(state="superseded"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert storm.everything_is_kept(database, data, tally) == [
        f"lost: {item.sop_instance_uid} has other bytes"
    ]
    assert storm.everything_is_analyzed(database, tally) == [
        f"0 findings of {item.sop_instance_uid}"
    ]
    assert storm.what_stands_was_sent(database)
    path.unlink()
    assert len(storm.nothing_is_left_over(database, data)) == 1
    database.engine.dispose()
