"""The delivering process against destinations that misbehave, on both databases."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make
import pytest
from peers import free_port, wait_until
from pydicom.dataset import Dataset
from pydicom.uid import KeyObjectSelectionDocumentStorage, SecondaryCaptureImageStorage
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.sop_class import StorageCommitmentPushModel
from scp import STORAGE, Peer
from sqlalchemy import func, select
from studies import Bench
from studies import bench as new_bench

from dicomai.audit import Auditor
from dicomai.sending import REPORT_SECONDS, Sending
from dicomai.settings import Deliver, Destination, Settings
from dicomai.store import outbox, queries
from dicomai.store.database import Database
from dicomai.store.tables import destination, event

DELIVER = Deliver(
    timeout_seconds=10, first_retry_seconds=5, longest_retry_seconds=900, max_attempts=4
)


class Site:
    """Results of analyzed studies that wait, with their files, and how they are sent."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self.folder = folder

    def analyze(self, studies: int = 1) -> None:
        """An overlay and a report of each study wait for every destination."""
        for number in range(studies):
            self.bench.arrive(study=f"1.2.{number}")
            self.bench.analyze()
        for row in self.rows():
            ds = make.chest_radiograph()
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = row["sop_instance_uid"]
            ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = row["sop_class_uid"]
            file = self.folder / row["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            ds.save_as(file, enforce_file_format=True)

    def rows(self) -> list[dict[str, object]]:
        """The results of all studies."""
        studies = queries.studies(self.bench.database)
        return [
            row
            for item in studies
            for row in queries.results(self.bench.database, item["study_instance_uid"])
        ]

    def sending(
        self, port: int, name: str = "pacs", called: str = "PACS", **more: object
    ) -> Sending:
        """To a destination on this port."""
        peer = Destination(name=name, ae_title=called, host="127.0.0.1", port=port, **more)
        settings = Settings(data_dir=self.folder, deliver=DELIVER, destinations=(peer,))
        auditor = Auditor(self.bench.database)
        return Sending(settings, self.bench.database, peer, auditor, threading.Event())

    def listed(self) -> list[dict[str, object]]:
        """What `delivery list` shows."""
        return queries.deliveries(self.bench.database)

    def states(self) -> list[str]:
        """The state of each delivery."""
        return sorted(str(row["state"]) for row in self.listed())

    def failures(self, name: str = "pacs") -> int:
        """How often in a row a destination could not be used."""
        return outbox.failures(self.bench.database, name)


@pytest.fixture
def site(database: Database, tmp_path: Path) -> Iterator[Site]:
    """Two databases, one after the other; the test sets the time."""
    found = Site(new_bench(database), tmp_path)
    yield found
    assert found.bench.unexplained() == []


def until_nothing_is_due(sending: Sending) -> int:
    """Step until there is nothing to do; returns how many steps did something."""
    count = 0
    while sending.step():
        count += 1
        assert count < 100
    return count


def test_a_warning_is_kept_with_what_was_delivered(site: Site) -> None:
    site.analyze()
    with Peer(lambda event: 0xB000).listening() as peer:
        until_nothing_is_due(site.sending(peer.port))
    assert site.states() == ["delivered", "delivered"]
    assert all("0xB000" in str(row["last_error"]) for row in site.listed())


def test_an_association_stays_open_while_there_is_something_to_send(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.analyze(3)
    used: list[Association] = []

    def note(event: Event) -> int:
        used.append(event.assoc)
        return 0x0000

    with Peer(note).listening() as peer:
        sending = site.sending(peer.port)
        sending._limits = DELIVER.model_copy(update={"batch_size": 1})
        assert until_nothing_is_due(sending) == 6
        kept = used[-1]
        assert set(used[1:]) == {kept}  # the first was offered no report
        assert kept.is_established
        monkeypatch.setattr("dicomai.sending.IDLE_SECONDS", 0.0)
        assert not sending.step()
        wait_until(lambda: not kept.is_established, 5, "it is released")
        assert kept.is_released
    assert set(site.states()) == {"delivered"}


def test_what_the_peer_has_ended_is_opened_again_and_costs_nothing(site: Site) -> None:
    site.analyze(2)
    used: list[Association] = []

    def note(event: Event) -> int:
        used.append(event.assoc)
        return 0x0000

    with Peer(note).listening() as peer:
        sending = site.sending(peer.port)
        sending._limits = DELIVER.model_copy(update={"batch_size": 2})
        assert sending.step()
        used[0].abort()
        assert sending._open is not None
        ours = sending._open
        wait_until(lambda: not ours.is_established, 5, "we know of it")
        assert sending.step()
        assert len(set(used)) == 2
    assert site.states() == ["delivered"] * 4
    assert site.failures() == 0


@pytest.mark.parametrize("status", [0xA900, 0xC000, 0x0122, 0x0124])
def test_what_a_destination_refuses_fails_at_once_and_alone(site: Site, status: int) -> None:
    site.analyze()
    refused = str(site.rows()[0]["sop_instance_uid"])
    peer = Peer(lambda event: status if event.request.AffectedSOPInstanceUID == refused else 0)
    with peer.listening():
        until_nothing_is_due(site.sending(peer.port))
    rows = {row["sop_instance_uid"]: row for row in site.listed()}
    assert rows[refused]["state"] == "failed"
    assert f"0x{status:04X}" in str(rows[refused]["last_error"])
    assert site.states() == ["delivered", "failed"]
    assert site.failures() == 0


def test_a_destination_out_of_resources_is_left_alone_for_a_while_and_then_gets_all(
    site: Site,
) -> None:
    site.analyze(3)
    full = [True]
    with Peer(lambda event: 0xA700 if full[0] else 0).listening() as peer:
        sending = site.sending(peer.port)
        assert until_nothing_is_due(sending) == 1
        assert len(peer.order) == 1  # the others were not even tried
        waiting = site.listed()
        assert all("0xA700" in str(row["last_error"]) for row in waiting)
        assert all(row["next_attempt_at"] > site.bench.clock.now for row in waiting)
        full[0] = False
        site.bench.clock.wait(6)
        until_nothing_is_due(sending)
    assert site.states() == ["delivered"] * 6
    assert site.failures() == 0


def test_an_association_that_is_rejected_counts_against_no_object(site: Site) -> None:
    site.analyze(2)
    with Peer().listening() as peer:
        sending = site.sending(peer.port, called="SOMEBODY")
        for _ in range(12):  # three times max_attempts
            assert until_nothing_is_due(sending) == 1
            site.bench.clock.wait(1000)
        rows = site.listed()
        assert {row["state"] for row in rows} == {"pending"}
        assert {row["attempts"] for row in rows} == {0}
        assert all("rejected the association: Called AE" in str(r["last_error"]) for r in rows)
        until_nothing_is_due(site.sending(peer.port))
    assert site.states() == ["delivered"] * 4


def test_waiting_times_double_up_to_their_cap(site: Site) -> None:
    site.analyze()
    sending = site.sending(free_port())
    waits = []
    for _ in range(11):
        assert sending.step()
        with site.bench.database.read() as connection:
            row = connection.execute(select(destination)).one()
        waits.append((row.due_at - site.bench.clock.now).total_seconds())
        site.bench.clock.now = row.due_at
    expected = [min(5 * 2**n, 900) for n in range(11)]
    assert all(0.9 * e <= w <= 1.1 * e for w, e in zip(waits, expected, strict=True))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_destination_that_is_down_for_a_day_costs_nothing_but_time(site: Site) -> None:
    site.bench.outputs = {"pacs": ("sc", "sr"), "other": ("sc", "sr")}
    site.analyze(10)
    with Peer().listening() as other:
        here = site.sending(other.port, "other")
        away = site.sending(free_port())
        until_nothing_is_due(here)
        assert len(other.received) == 20  # nobody waits for the one that is away
        before = events(site)
        steps, end = 0, site.bench.clock.now.timestamp() + 86_400
        while site.bench.clock.now.timestamp() < end:
            steps += until_nothing_is_due(away)
            site.bench.clock.wait(60)
        assert steps < 120  # once in a quarter of an hour
        assert events(site) - before <= 2 * steps + 40
        rows = [row for row in site.listed() if row["destination"] == "pacs"]
        assert {(row["state"], row["attempts"]) for row in rows} == {("pending", 0)}
    with Peer().listening() as back:
        site.bench.clock.wait(1000)
        until_nothing_is_due(site.sending(back.port))
        assert len(back.received) == 20
        assert len(back.order) == 20
    assert set(site.states()) == {"delivered"}


def events(site: Site) -> int:
    """Rows of the audit trail."""
    with site.bench.database.read() as connection:
        return connection.execute(select(func.count()).select_from(event)).scalar_one()


def test_an_object_over_which_a_destination_aborts_holds_up_no_other_and_is_given_up(
    site: Site,
) -> None:
    site.analyze(3)
    poison = str(site.rows()[0]["sop_instance_uid"])

    def answer(event: Event) -> int:
        if event.request.AffectedSOPInstanceUID == poison:
            event.assoc.abort()
        return 0

    with Peer(answer).listening() as peer:
        sending = site.sending(peer.port)
        for _ in range(60):
            until_nothing_is_due(sending)
            site.bench.clock.wait(5)
        assert peer.order.count(poison) == DELIVER.max_attempts
        assert len(peer.received) == len(set(peer.order)) == 6
    rows = {row["sop_instance_uid"]: row for row in site.listed()}
    assert rows.pop(poison)["state"] == "failed"
    assert {row["state"] for row in rows.values()} == {"delivered"}


def test_a_kind_that_a_destination_does_not_take_fails_and_the_others_are_delivered(
    site: Site,
) -> None:
    site.analyze()
    with Peer(classes=[SecondaryCaptureImageStorage]).listening() as peer:
        until_nothing_is_due(site.sending(peer.port))
    rows = {row["kind"]: row for row in site.listed()}
    assert rows["sc"]["state"] == "delivered"
    assert rows["sr"]["state"] == "failed"
    assert "accepts no such object" in str(rows["sr"]["last_error"])


def test_a_destination_that_takes_no_kind_at_all_fails_them_with_that_reason(site: Site) -> None:
    site.analyze()
    with Peer(classes=[KeyObjectSelectionDocumentStorage]).listening() as peer:
        until_nothing_is_due(site.sending(peer.port))
    assert site.states() == ["failed", "failed"]
    assert all("no presentation context" in str(row["last_error"]) for row in site.listed())


def test_objects_arrive_in_the_order_of_their_making(site: Site) -> None:
    site.analyze(4)
    with Peer().listening() as peer:
        until_nothing_is_due(site.sending(peer.port))
    by_id = {row["sop_instance_uid"]: row["created_at"] for row in site.listed()}
    made = [by_id[uid] for uid in peer.order]
    assert made == sorted(made)


def test_several_associations_send_each_object_once(site: Site) -> None:
    site.analyze(10)
    with Peer().listening() as peer:
        sending = site.sending(peer.port, associations=4)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: until_nothing_is_due(sending), range(4)))
    assert len(peer.order) == len(set(peer.order)) == 20
    assert set(site.states()) == {"delivered"}


def test_what_was_sent_is_audited_by_study(site: Site) -> None:
    site.analyze(2)
    with Peer().listening() as peer:
        until_nothing_is_due(site.sending(peer.port))
    rows = queries.audit_events(site.bench.database, queries.AuditFilter(), 10)
    assert {(row["study_instance_uid"], row["count"], row["who"], row["type"]) for row in rows} == {
        ("1.2.0", 2, "PACS", "sent"),
        ("1.2.1", 2, "PACS", "sent"),
    }


def test_a_result_file_that_is_gone_fails_its_delivery_alone(site: Site) -> None:
    site.analyze()
    (site.folder / str(site.rows()[0]["path"])).unlink()
    with Peer().listening() as peer:
        until_nothing_is_due(site.sending(peer.port))
    assert site.states() == ["delivered", "failed"]


# Storage commitment (PS3.4 Annex J)


def commit_peer(**more: object) -> Peer:
    """A PACS that takes requests for commitment."""
    return Peer(classes=[*STORAGE, StorageCommitmentPushModel], **more)


def report(site: Site, asked: Dataset, failed: dict[str, int]) -> bool:
    """What the listener does with the report of a PACS on a request."""
    uids = [str(item.ReferencedSOPInstanceUID) for item in asked.ReferencedSOPSequence]
    return outbox.commitment_reported(
        site.bench.database,
        str(asked.TransactionUID),
        [uid for uid in uids if uid not in failed],
        {uid: f"0x{reason:04X}" for uid, reason in failed.items()},
        DELIVER.max_attempts,
        60.0,
    )


def test_delivered_is_what_the_pacs_has_committed_itself_to(site: Site) -> None:
    site.analyze()
    with commit_peer().listening() as peer:
        sending = site.sending(peer.port, commit=True)
        until_nothing_is_due(sending)
        assert site.states() == ["committing", "committing"]
        assert not queries.is_idle(site.bench.database)
        (asked,) = peer.asked
        assert {i.ReferencedSOPInstanceUID for i in asked.ReferencedSOPSequence} == set(
            peer.received
        )
        assert report(site, asked, {})
        assert site.states() == ["delivered", "delivered"]
        assert report(site, asked, {})  # said twice
        assert until_nothing_is_due(sending) == 0
    assert queries.is_idle(site.bench.database)


def test_what_the_pacs_does_not_commit_itself_to_is_sent_again(site: Site) -> None:
    site.analyze()
    with commit_peer().listening() as peer:
        sending = site.sending(peer.port, commit=True)
        until_nothing_is_due(sending)
        lost = peer.order[0]
        report(site, peer.asked[0], {lost: 0x0112})
        assert site.states() == ["delivered", "pending"]
        (row,) = [row for row in site.listed() if row["state"] == "pending"]
        assert "not committed: 0x0112" in str(row["last_error"])
        site.bench.clock.wait(61)
        until_nothing_is_due(sending)
        assert peer.order.count(lost) == 2
        report(site, peer.asked[1], {})
    assert site.states() == ["delivered", "delivered"]


def test_what_is_never_committed_is_given_up_after_the_last_attempt(site: Site) -> None:
    site.analyze()
    with commit_peer().listening() as peer:
        sending = site.sending(peer.port, commit=True)
        for _ in range(DELIVER.max_attempts):
            until_nothing_is_due(sending)
            report(site, peer.asked[-1], dict.fromkeys(peer.received, 0x0110))
            site.bench.clock.wait(61)
        assert until_nothing_is_due(sending) == 0
    assert site.states() == ["failed", "failed"]


def test_a_pacs_that_never_reports_is_asked_again(site: Site) -> None:
    site.analyze()
    with commit_peer().listening() as peer:
        sending = site.sending(peer.port, commit=True)
        until_nothing_is_due(sending)
        site.bench.clock.wait(REPORT_SECONDS + 1)
        until_nothing_is_due(sending)
        first, second = peer.asked
        assert first.TransactionUID != second.TransactionUID
        assert len(peer.order) == 2  # nothing was sent again
        assert not report(site, first, {})
        assert report(site, second, {})
    assert site.states() == ["delivered", "delivered"]


def test_a_pacs_without_storage_commitment_is_named_as_the_reason(site: Site) -> None:
    site.analyze()
    with Peer().listening() as peer:
        until_nothing_is_due(site.sending(peer.port, commit=True))
    assert site.states() == ["committing", "committing"]
    assert all("no presentation context" in str(row["last_error"]) for row in site.listed())
