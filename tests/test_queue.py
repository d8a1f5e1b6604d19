"""The queue, on both databases: who gets what, when, and what a commit changes."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError
from studies import (
    DATA,
    LEASE,
    MAX_ATTEMPTS,
    QUIET,
    RELEASE_QUIET,
    STUDY,
    Bench,
    analysis_of,
    as_it_is,
    instance,
)
from studies import bench as make_bench

from dicomai.errors import LeaseLost
from dicomai.store import arrivals, outbox, queries, queue
from dicomai.store.arrivals import Outcome
from dicomai.store.database import Database
from dicomai.store.queue import CRASHES_IN_COMPANY
from dicomai.study import WITHDRAWAL


@pytest.fixture
def bench(database: Database) -> Iterator[Bench]:
    """A bench; after each test every transition has its event row."""
    made = make_bench(database)
    yield made
    assert made.unexplained() == []


# Arrival


def test_an_arrival_makes_a_study_due_after_the_quiet_period(bench: Bench) -> None:
    assert bench.arrive() == (Outcome.NEW, None)
    assert bench.seconds_until_due() == QUIET
    bench.clock.wait(QUIET - 1)
    assert bench.claim() is None
    bench.clock.wait(1)
    assert bench.claim() is not None


def test_every_further_arrival_begins_the_quiet_period_again(bench: Bench) -> None:
    bench.arrive(1)
    bench.clock.wait(QUIET - 1)
    bench.arrive(2)
    assert bench.seconds_until_due() == QUIET
    assert bench.study().revision == 1
    assert len(bench.claim_due().study.instances) == 2


def test_a_duplicate_with_equal_digest_changes_nothing(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    before = bench.everything()
    bench.clock.wait(5)
    assert bench.arrive() == (Outcome.DUPLICATE, None)
    assert bench.everything() == before


def test_the_same_uid_with_other_bytes_raises_the_revision_and_replaces_the_file(
    bench: Bench,
) -> None:
    bench.arrive(content="first")
    bench.analyze()
    assert bench.arrive(content="second") == (Outcome.REPLACED, instance(content="first").path)
    claimed = bench.claim_due()
    assert claimed.study.revision == 2
    assert claimed.study.instances == (instance(content="second"),)


def test_what_is_only_kept_never_makes_a_study_due(bench: Bench) -> None:
    assert bench.arrive(1, analyzable=False) == (Outcome.KEPT, None)
    assert (bench.study().state, bench.study().due_at) == ("skipped", None)
    bench.arrive(2)
    bench.analyze()
    bench.arrive(3, analyzable=False)
    assert (bench.study().state, bench.study().due_at) == ("analyzed", None)


def test_what_is_only_kept_does_not_prolong_the_quiet_period(bench: Bench) -> None:
    bench.arrive(1)
    bench.clock.wait(4)
    bench.arrive(2, analyzable=False)
    assert bench.seconds_until_due() == QUIET - 4


def test_own_results_that_come_back_are_kept_and_change_nothing(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    before = bench.study()
    for row in queries.results(bench.database, STUDY):
        uid = row["sop_instance_uid"]
        assert bench.arrive(uid=uid) == (Outcome.KEPT, None)
        assert bench.arrive(uid=uid, content="rewritten by the PACS")[0] is Outcome.REPLACED
    assert bench.study() == before
    assert set(bench.delivery_states().values()) == {"pending"}


def test_an_expected_count_makes_a_study_due_at_once(bench: Bench) -> None:
    bench.arrive(1, expected=2)
    assert bench.seconds_until_due() == QUIET
    bench.arrive(2, expected=2)
    assert bench.seconds_until_due() == 0


def test_a_release_pulls_in_only_what_is_still_receiving(bench: Bench) -> None:
    for study in ("1.1", "1.2", "1.3", "1.4"):
        bench.arrive(study=study)
        if study == "1.1":
            bench.analyze()
        if study == "1.2":
            bench.claim_due()
        if study == "1.3":
            bench.clock.wait(QUIET - 1)
    arrivals.association_released(
        bench.database, ["1.1", "1.2", "1.3", "1.4", "1.5"], RELEASE_QUIET
    )
    due = {study: bench.seconds_until_due(study) for study in ("1.1", "1.2", "1.3", "1.4")}
    assert due == {"1.1": None, "1.2": LEASE - QUIET + 1, "1.3": 1, "1.4": RELEASE_QUIET}


def test_of_eight_senders_of_one_object_one_is_first(bench: Bench) -> None:
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda _: bench.arrive()[0], range(8)))
    assert sorted(outcomes, key=lambda o: o.value) == [Outcome.DUPLICATE] * 7 + [Outcome.NEW]


# Claim, renew, release


def test_a_claim_takes_what_has_been_due_longest_and_nobody_else_gets_it(bench: Bench) -> None:
    for study in ("1.2", "1.3", "1.1"):
        bench.arrive(study=study)
        bench.clock.wait(1)
    bench.clock.wait(QUIET)
    claims = [bench.claim() for _ in range(4)]
    assert [c and c.study.study_instance_uid for c in claims] == ["1.2", "1.3", "1.1", None]


def test_stat_studies_are_claimed_before_what_has_been_due_longer(bench: Bench) -> None:
    for study, stat in (("1.1", False), ("1.2", True), ("1.3", False), ("1.4", True)):
        bench.arrive(study=study, stat=stat)
        bench.clock.wait(1)
    bench.clock.wait(QUIET)
    claims = [bench.claim() for _ in range(4)]
    found = [(c.study.study_instance_uid, c.stat) for c in claims if c]
    assert found == [("1.2", True), ("1.4", True), ("1.1", False), ("1.3", False)]


def test_a_stat_study_that_is_not_due_holds_up_no_other(bench: Bench) -> None:
    bench.arrive(study="1.1")
    bench.clock.wait(QUIET)
    bench.arrive(study="1.2", stat=True)
    claimed = bench.claim()
    assert claimed is not None
    assert claimed.study.study_instance_uid == "1.1"


def test_once_stat_a_study_stays_stat(bench: Bench) -> None:
    bench.arrive(1)
    assert not bench.study().stat
    bench.arrive(2, stat=True)
    bench.arrive(3)
    assert bench.study().stat
    bench.analyze()
    bench.arrive(4)
    assert bench.claim_due().stat


def test_an_image_that_is_sent_again_as_stat_makes_its_study_stat(bench: Bench) -> None:
    bench.arrive()
    before = bench.study()
    assert bench.arrive(stat=True) == (Outcome.DUPLICATE, None)
    assert bench.study()._asdict() == {**before._asdict(), "stat": True}


def test_what_holds_no_image_makes_no_study_stat(bench: Bench) -> None:
    bench.arrive(1, analyzable=False, stat=True)
    assert not bench.study().stat


def test_a_stat_study_that_is_due_is_asked_for_before_one_that_crashed(bench: Bench) -> None:
    bench.arrive(study="1.1")
    for _ in range(CRASHES_IN_COMPANY):
        bench.claim_due()
    bench.arrive(study="1.2", stat=True)
    bench.clock.wait(LEASE)
    assert queries.due_study_attempts(bench.database) == 0
    claimed = bench.claim()
    assert claimed is not None
    assert claimed.study.study_instance_uid == "1.2"
    assert queries.due_study_attempts(bench.database) == CRASHES_IN_COMPANY


def test_deliveries_of_stat_studies_go_first_but_not_again_and_again(bench: Bench) -> None:
    for study, stat in (("1.1", False), ("1.2", True)):
        bench.arrive(study=study, stat=stat)
        bench.clock.wait(1)
    for _ in range(2):
        bench.analyze()
    (first,) = bench.claim_deliveries(limit=1)
    assert first.study_instance_uid == "1.2"
    outbox.finish_delivery(bench.database, first, "pending", "the peer is busy", 0.0)
    order = [item.study_instance_uid for item in bench.claim_deliveries()]
    assert order == ["1.2", "1.1", "1.1", "1.2"]


def test_eight_threads_claim_forty_studies_once_each(bench: Bench) -> None:
    studies = [f"1.2.{number}" for number in range(1, 41)]
    for study in studies:
        bench.arrive(study=study)
    bench.clock.wait(QUIET)

    def claim_all(_: int) -> list[str]:
        claims = iter(bench.claim, None)
        return [claimed.study.study_instance_uid for claimed in claims]

    with ThreadPoolExecutor(8) as pool:
        claimed = [uid for uids in pool.map(claim_all, range(8)) for uid in uids]
    assert sorted(claimed) == sorted(studies)


def test_an_expired_lease_is_claimed_again_and_the_first_holder_has_lost_it(bench: Bench) -> None:
    bench.arrive()
    first, second = bench.claim_due(), bench.claim_due()
    assert second.study == first.study
    assert not queue.renew_study(bench.database, first, LEASE)
    before = bench.everything()
    with pytest.raises(LeaseLost):
        bench.complete(first)
    with pytest.raises(LeaseLost):
        bench.fail(first, "too late")
    queue.release_study(bench.database, first)
    assert bench.everything() == before
    bench.complete(second)
    assert bench.study().state == "analyzed"


def test_a_renewed_lease_is_not_claimed_again(bench: Bench) -> None:
    bench.arrive()
    claimed = bench.claim_due()
    bench.clock.wait(LEASE - 1)
    assert queue.renew_study(bench.database, claimed, LEASE)
    bench.clock.wait(LEASE - 1)
    assert bench.claim() is None
    bench.complete(claimed)


def test_an_image_that_arrives_during_analysis_raises_the_revision(bench: Bench) -> None:
    bench.arrive(1)
    old = bench.claim_due()
    bench.arrive(2)
    assert bench.study().revision == 2
    assert bench.seconds_until_due() == QUIET
    assert not queue.renew_study(bench.database, old, LEASE)
    with pytest.raises(LeaseLost):
        bench.complete(old)
    bench.analyze()
    assert (bench.study().state, bench.study().analyzed_revision) == ("analyzed", 2)
    assert len(queries.findings(bench.database, queries.FindingFilter())) == 2


def test_a_release_is_not_counted_as_an_attempt(bench: Bench) -> None:
    bench.arrive()
    for _ in range(CRASHES_IN_COMPANY + MAX_ATTEMPTS + 1):
        claimed = bench.claim_due()
        assert claimed.attempts == 1
        queue.release_study(bench.database, claimed, 5, "the disk is full")
    assert bench.seconds_until_due() == 5
    assert bench.study().reason == "the disk is full"


def test_after_two_crashes_a_study_is_only_claimed_alone(bench: Bench) -> None:
    bench.arrive()
    for crash in range(CRASHES_IN_COMPANY):
        assert bench.claim_due().attempts == crash + 1
    bench.clock.wait(LEASE)
    assert bench.claim() is None
    assert queries.due_study_attempts(bench.database) == CRASHES_IN_COMPANY
    claimed = bench.claim(alone=True)
    assert claimed is not None
    assert claimed.attempts == CRASHES_IN_COMPANY + 1


def test_a_claim_alone_leaves_studies_that_never_crashed(bench: Bench) -> None:
    bench.arrive()
    bench.clock.wait(QUIET)
    assert bench.claim(alone=True) is None


def crash(bench: Bench) -> None:
    """As often as a study may crash its worker."""
    bench.arrive()
    for _ in range(CRASHES_IN_COMPANY):
        bench.claim_due()
    for _ in range(MAX_ATTEMPTS):
        bench.clock.wait(LEASE)
        claimed = bench.claim(alone=True)
        assert claimed is not None
        assert claimed.hopeless is None
    bench.clock.wait(LEASE)


def test_past_the_limit_of_crashes_a_study_is_hopeless_and_says_why(bench: Bench) -> None:
    crash(bench)
    claimed = bench.claim(alone=True)
    assert claimed is not None
    assert claimed.hopeless == "the worker died 5 times while analyzing this study"
    bench.fail(claimed, claimed.hopeless)
    row = bench.study()
    assert (row.state, row.due_at, row.lease) == ("failed", None, None)
    assert row.reason == claimed.hopeless


def test_a_study_that_crashes_even_its_failure_is_failed_in_silence(bench: Bench) -> None:
    crash(bench)
    assert bench.claim(alone=True) is not None
    bench.clock.wait(LEASE)
    assert bench.claim(alone=True) is None
    row = bench.study()
    assert (row.state, row.due_at, row.lease) == ("failed", None, None)
    assert row.reason == "the worker died 6 times while analyzing this study"


def test_a_new_image_gives_a_crashed_study_its_attempts_back(bench: Bench) -> None:
    bench.arrive(1)
    for _ in range(CRASHES_IN_COMPANY):
        bench.claim_due()
    bench.arrive(2)
    assert bench.claim_due().attempts == 1


def test_a_failed_study_can_be_retried(bench: Bench) -> None:
    bench.arrive()
    bench.fail(bench.claim_due(), "the analysis failed")
    assert (bench.study().state, bench.study().reason) == ("failed", "the analysis failed")
    assert queue.retry_study(bench.database, STUDY)
    claimed = bench.claim()
    assert claimed is not None
    assert (claimed.study.revision, claimed.attempts) == (2, 1)
    bench.complete(claimed)
    assert (bench.study().state, bench.study().reason) == ("analyzed", None)


def test_what_is_under_way_unknown_or_without_an_image_is_not_retried(bench: Bench) -> None:
    bench.arrive(study="1.1")
    bench.arrive(study="1.2", analyzable=False)
    assert [queue.retry_study(bench.database, uid) for uid in ("1.1", "1.2", "1.3")] == [False] * 3
    bench.claim_due()
    assert not queue.retry_study(bench.database, "1.1")


# Complete


def test_complete_commits_findings_results_exclusions_and_deliveries(bench: Bench) -> None:
    bench.arrive(1)
    bench.arrive(2)
    bench.analyze(excluded=[2])
    assert bench.study().state == "analyzed"
    (found,) = queries.findings(bench.database, queries.FindingFilter())
    assert (found["sop_instance_uid"], found["label"], found["positive"]) == (
        f"{STUDY}.1",
        "pneumonia",
        True,
    )
    taken, excluded = queries.instances(bench.database, STUDY)
    assert (taken["exclusion_code"], excluded["exclusion_code"]) == (None, "view")
    assert bench.delivery_states() == {("sc 1", "pacs"): "pending", ("sr 1", "pacs"): "pending"}


def test_a_destination_gets_only_the_kinds_that_it_wants(bench: Bench) -> None:
    bench.outputs = {"pacs": ("sc",), "ris": ("sr",), "mute": ()}
    bench.arrive()
    bench.analyze()
    assert set(bench.delivery_states()) == {("sc 1", "pacs"), ("sr 1", "ris")}


def test_a_study_without_a_suitable_image_is_skipped_with_its_reason(bench: Bench) -> None:
    bench.arrive(1)
    bench.analyze(excluded=[1])
    assert (bench.study().state, bench.study().due_at) == ("skipped", None)
    assert bench.study().reason
    assert bench.deliveries() == {}


def test_predictions_are_stored_once_and_read_back_as_they_were(bench: Bench) -> None:
    bench.arrive()
    first = bench.analyze(probability=0.25)
    then = bench.clock.now
    queue.retry_study(bench.database, STUDY)
    bench.analyze(probability=0.75)
    found = queries.scores(bench.database, first.study.instances, "tiny", "1", "test")
    ((key, score),) = found.items()
    assert key == (instance().digest, 1)
    assert score.probabilities.tolist() == [0.25]
    assert (score.maps.shape, score.analyzed_at) == ((1, 1, 1), then)


@pytest.mark.parametrize("broken", ["finding", "delivery"])
def test_complete_is_all_or_nothing(bench: Bench, broken: str) -> None:
    bench.arrive()
    claimed = bench.claim_due()
    done = analysis_of(claimed.study, bench.clock.now)
    outputs: dict[str | None, list[str]] = {"pacs": ["sc", "sr"]}
    if broken == "finding":
        done = dataclasses.replace(done, findings=done.findings * 2)
    else:
        outputs[None] = ["sr"]  # the last row that is written
    before = bench.everything()
    with pytest.raises(IntegrityError):
        queue.complete(bench.database, claimed, done, DATA, outputs, as_it_is)  # type: ignore[arg-type]
    assert bench.everything() == before
    bench.complete(claimed)


# Deliveries


def test_a_new_revision_supersedes_what_has_not_been_sent(bench: Bench) -> None:
    bench.arrive(1)
    bench.analyze()
    bench.arrive(2)
    assert bench.delivery_states() == {
        ("sc 1", "pacs"): "superseded",
        ("sr 1", "pacs"): "superseded",
    }
    bench.clock.wait(LEASE)
    assert bench.claim_deliveries() == []
    assert not queries.has_due(bench.database, "pacs")


def test_what_is_unchanged_in_the_next_revision_is_sent_if_it_was_not_yet(bench: Bench) -> None:
    bench.outputs = {"pacs": ("sc", "sr"), "slow": ("sc", "sr")}
    bench.arrive(1)
    bench.analyze()
    bench.deliver("pacs")
    bench.arrive(2)
    bench.analyze()
    assert bench.delivery_states() == {
        ("sc 1", "pacs"): "delivered",
        ("sr 1", "pacs"): "delivered",
        ("sc 2", "pacs"): "pending",
        ("sr 2", "pacs"): "pending",
        ("sc 1", "slow"): "pending",
        ("sr 1", "slow"): "superseded",
        ("sc 2", "slow"): "pending",
        ("sr 2", "slow"): "pending",
    }
    assert {item.path.name for item in bench.claim_deliveries("pacs")} == {"sc 2", "sr 2"}


def uid_of(bench: Bench, name: str, destination: str = "pacs") -> str:
    """SOP Instance UID of a result, by its name in analysis_of()."""
    return str(bench.deliveries()[name, destination].sop_instance_uid)


def withdraw_first_overlay(bench: Bench, **facts: Any) -> None:
    """Revision 2 finds that the overlay of revision 1 does not hold."""
    uid = uid_of(bench, "sc 1")
    bench.arrive(1, content="other")
    bench.arrive(2)
    bench.analyze(withdrawn=(uid,), excluded={1}, **facts)


WITH_WITHDRAWALS = ("sc", "sr", WITHDRAWAL)


def test_a_withdrawal_goes_to_its_destination_alone(bench: Bench) -> None:
    bench.outputs = {"pacs": WITH_WITHDRAWALS, "reports": ("sr", WITHDRAWAL), "plain": ("sc",)}
    bench.arrive(1)
    bench.analyze()
    for name in bench.outputs:
        bench.deliver(name)
    withdraw_first_overlay(bench)
    told = {destination for name, destination in bench.deliveries() if name == "ko 2"}
    assert told == {"pacs"}


def test_what_was_replaced_by_something_that_never_went_out_has_not_been_replaced(
    bench: Bench,
) -> None:
    bench.arrive(1)
    bench.analyze()
    bench.deliver()
    first = uid_of(bench, "sr 1")
    bench.arrive(2)
    bench.analyze(successor_of=(first,))
    bench.arrive(3)  # before the second report has gone out
    known = {item.sop_instance_uid: item for item in queries.sent(bench.database, STUDY)}
    assert known[first].replaced_by is None
    assert uid_of(bench, "sr 2") not in known
    bench.analyze(successor_of=(first,))
    bench.deliver()
    known = {item.sop_instance_uid: item for item in queries.sent(bench.database, STUDY)}
    assert known[first].replaced_by == uid_of(bench, "sr 3")


def test_what_was_tried_once_may_be_held_whatever_happens_after_that(bench: Bench) -> None:
    bench.arrive(1)
    bench.analyze()
    for item in bench.claim_deliveries():
        outbox.finish_delivery(bench.database, item, "pending", "no answer", 5.0)
    outbox.retry_deliveries(bench.database)
    bench.arrive(2)
    assert set(bench.delivery_states().values()) == {"superseded"}
    assert {item.kind for item in queries.sent(bench.database, STUDY)} == {"sc", "sr"}


def test_what_nobody_was_sent_needs_no_withdrawal(bench: Bench) -> None:
    bench.outputs = {"pacs": WITH_WITHDRAWALS}
    bench.arrive(1)
    bench.analyze()
    bench.arrive(2)
    assert queries.sent(bench.database, STUDY) == ()
    bench.analyze()
    bench.deliver()
    assert {item.kind for item in queries.sent(bench.database, STUDY)} == {"sc", "sr"}


def test_a_withdrawal_outlives_the_next_revision(bench: Bench) -> None:
    bench.outputs = {"pacs": WITH_WITHDRAWALS}
    bench.arrive(1)
    bench.analyze()
    bench.deliver()
    withdraw_first_overlay(bench)
    bench.arrive(3)
    states = bench.delivery_states()
    assert states["sc 2", "pacs"] == "superseded"
    assert states["ko 2", "pacs"] == "pending"
    (item,) = bench.claim_deliveries()
    outbox.finish_delivery(bench.database, item, "pending", "busy", 5.0)
    assert bench.delivery_states()["ko 2", "pacs"] == "pending"


def test_what_a_sender_died_over_is_not_sent_after_its_withdrawal(bench: Bench) -> None:
    bench.outputs = {"pacs": WITH_WITHDRAWALS}
    bench.arrive(1)
    bench.analyze()
    dead = {item.path.name: item for item in bench.claim_deliveries()}
    withdraw_first_overlay(bench)
    assert bench.delivery_states()["sc 1", "pacs"] == "superseded"
    bench.clock.wait(LEASE)
    assert "sc 1" not in {item.path.name for item in bench.claim_deliveries()}
    before = bench.everything()
    outbox.finish_delivery(bench.database, dead["sc 1"], "delivered")
    assert bench.everything() == before


def test_a_failed_delivery_of_what_is_withdrawn_is_not_retried(bench: Bench) -> None:
    bench.outputs = {"pacs": WITH_WITHDRAWALS}
    bench.arrive(1)
    bench.analyze()
    for item in bench.claim_deliveries():
        outbox.finish_delivery(bench.database, item, "failed", "refused")
    withdraw_first_overlay(bench)
    outbox.retry_deliveries(bench.database)
    assert bench.delivery_states()["sc 1", "pacs"] == "failed"


def test_a_result_names_what_replaced_it(bench: Bench) -> None:
    bench.outputs = {"pacs": WITH_WITHDRAWALS}
    bench.arrive(1)
    bench.analyze()
    bench.deliver()
    overlay = uid_of(bench, "sc 1")
    withdraw_first_overlay(bench)
    replaced = {x.sop_instance_uid: x.replaced_by for x in queries.sent(bench.database, STUDY)}
    assert replaced[overlay] == uid_of(bench, "ko 2")


def test_a_retry_supersedes_what_has_not_been_sent(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    assert queue.retry_study(bench.database, STUDY)
    assert set(bench.delivery_states().values()) == {"superseded"}


def test_deliveries_are_claimed_for_one_destination_oldest_first(bench: Bench) -> None:
    bench.outputs = {"pacs": ("sc", "sr"), "other": ("sr",)}
    for study in ("1.2", "1.1"):
        bench.arrive(study=study)
        bench.analyze()
    assert all(queries.has_due(bench.database, name) for name in ("pacs", "other"))
    first, second = bench.claim_deliveries(limit=3), bench.claim_deliveries(limit=3)
    assert [item.study_instance_uid for item in first + second] == ["1.2", "1.2", "1.1", "1.1"]
    assert bench.claim_deliveries() == []
    assert queries.has_due(bench.database, "other")
    assert not queries.has_due(bench.database, "pacs")
    assert len(bench.claim_deliveries("other")) == 2


def test_eight_threads_claim_each_delivery_once(bench: Bench) -> None:
    for number in range(1, 11):
        bench.arrive(number)
    bench.analyze()

    def claim_all(_: int) -> list[int]:
        return [
            item.id for batch in iter(lambda: bench.claim_deliveries(limit=2), []) for item in batch
        ]

    with ThreadPoolExecutor(8) as pool:
        claimed = [number for numbers in pool.map(claim_all, range(8)) for number in numbers]
    assert len(claimed) == len(set(claimed)) == len(bench.deliveries()) == 11


def test_what_is_delivered_is_not_due_again(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    assert not queries.is_idle(bench.database)
    bench.deliver()
    row = bench.deliveries()["sc 1", "pacs"]
    assert (row.state, row.due_at, row.delivered_at) == ("delivered", None, bench.clock.now)
    bench.clock.wait(2 * LEASE)
    assert bench.claim_deliveries() == []
    assert queries.is_idle(bench.database)


def test_a_delivery_that_is_put_off_waits_with_its_reason(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    for item in bench.claim_deliveries():
        outbox.finish_delivery(bench.database, item, "pending", "the peer is busy", 30)
    assert bench.deliveries()["sr 1", "pacs"].last_error == "the peer is busy"
    bench.clock.wait(29)
    assert bench.claim_deliveries() == []
    bench.clock.wait(1)
    assert [item.attempts for item in bench.claim_deliveries()] == [1, 1]


def test_a_sender_that_dies_leaves_its_deliveries_due_again(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    dead = bench.claim_deliveries()
    bench.clock.wait(LEASE)
    again = bench.claim_deliveries()
    assert [item.id for item in again] == [item.id for item in dead]
    outbox.finish_delivery(bench.database, dead[0], "failed", "late")
    assert set(bench.delivery_states().values()) == {"sending"}


def test_a_renewed_delivery_is_not_claimed_again(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    held = bench.claim_deliveries()
    bench.clock.wait(LEASE - 1)
    assert outbox.start_delivery(bench.database, held, LEASE)
    bench.clock.wait(LEASE - 1)
    assert bench.claim_deliveries() == []


def test_given_back_deliveries_are_not_counted_as_attempts(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    held = outbox.claim_deliveries(bench.database, "pacs", DATA, LEASE, 50)
    outbox.release_deliveries(bench.database, held)
    assert [item.attempts for item in bench.claim_deliveries()] == [0, 0]


def test_only_what_was_sent_may_be_in_a_pacs(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    held = outbox.claim_deliveries(bench.database, "pacs", DATA, LEASE, 50)
    assert queries.sent(bench.database, STUDY) == ()
    assert outbox.start_delivery(bench.database, held, LEASE)
    assert [item.sop_instance_uid for item in queries.sent(bench.database, STUDY)] == [
        held[0].sop_instance_uid
    ]


def test_failed_and_waiting_deliveries_can_be_retried_now(bench: Bench) -> None:
    bench.outputs = {"pacs": ("sc", "sr"), "other": ("sr",)}
    bench.arrive()
    bench.analyze()
    refused, waiting = bench.claim_deliveries()
    outbox.finish_delivery(bench.database, refused, "failed", "the peer refuses this object")
    outbox.finish_delivery(bench.database, waiting, "pending", "the peer is busy", 900)
    assert bench.claim_deliveries() == []
    assert outbox.retry_deliveries(bench.database, "pacs") == 2
    assert [item.attempts for item in bench.claim_deliveries()] == [0, 0]


# Tasks


def test_a_task_is_inserted_once_for_its_moment_and_run_once(bench: Bench) -> None:
    due = bench.clock.now
    assert [queue.add_task(bench.database, "sweep", due) for _ in range(2)] == [True, False]
    claimed = queue.claim_task(bench.database, LEASE)
    assert claimed is not None
    assert queue.claim_task(bench.database, LEASE) is None
    queue.finish_task(bench.database, claimed, "done", "nothing to sweep")
    bench.clock.wait(2 * LEASE)
    assert not queries.task_is_due(bench.database)


# The audit trail; the fixture looks for gaps after every test above.


def test_every_transition_has_its_event_row(bench: Bench) -> None:
    bench.arrive(1)
    queue.release_study(bench.database, bench.claim_due())
    bench.claim_due()
    bench.analyze()
    bench.arrive(2)
    bench.fail(bench.claim_due(), "broken")
    queue.retry_study(bench.database, STUDY)
    trail = [row["to_state"] for row in queries.events(bench.database, "study", STUDY)]
    assert trail == [
        *("skipped", "receiving", "analyzing", "receiving", "analyzing", "analyzing", "analyzed"),
        *("receiving", "analyzing", "failed", "receiving"),
    ]
    number = str(bench.deliveries()["sc 1", "pacs"].id)
    trail = [row["to_state"] for row in queries.events(bench.database, "delivery", number)]
    assert trail == ["pending", "superseded"]
