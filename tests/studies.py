"""A test bench for the queue: a database, a clock that the test sets, and tiny analyses."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import make
import numpy as np
from pydicom.uid import (
    ComprehensiveSRStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
    SecondaryCaptureImageStorage,
)
from sqlalchemy import select

from dicomai import durable
from dicomai.receive import inbox
from dicomai.receive.header import Header
from dicomai.store import arrivals, outbox, queue
from dicomai.store.arrivals import Arrival, Outcome
from dicomai.store.database import Database
from dicomai.store.outbox import Delivery
from dicomai.store.queue import Claim
from dicomai.store.tables import delivery, event, metadata, result, study
from dicomai.study import (
    WITHDRAWAL,
    Analysis,
    Code,
    Exclusion,
    Finding,
    Frame,
    Instance,
    Label,
    Letterbox,
    Model,
    Prediction,
    Preprocessing,
    Presence,
    Result,
    Score,
    Study,
)

DATA = Path("/data")
STUDY = "1.2.3"
QUIET, RELEASE_QUIET, LEASE, MAX_ATTEMPTS = 10.0, 2.0, 60.0, 3
PNEUMONIA = Label("pneumonia", 0.5, Code("233604007", "SCT", "Pneumonia"))


class Clock:
    """The time that a test sets."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)


def keep(file: Path, data_dir: Path) -> tuple[Header, Instance, int]:
    """A file lies in the inbox, as if it had arrived, and has no row yet."""
    header, item, size = inbox.read_file(file)
    data = file.read_bytes()
    start = inbox.BEFORE_META + int.from_bytes(data[: inbox.BEFORE_META][-4:], "little")
    syntax, desk = item.transfer_syntax_uid, durable.Desk()
    draft = inbox.Draft(data_dir / "inbox", syntax, data[:start], desk)
    draft.write(data[start:])
    assert draft.header() == header
    return header, draft.keep(header), size


@dataclass
class Bench:
    """The queue's functions with the arguments that do not matter filled in."""

    database: Database
    clock: Clock
    outputs: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"pacs": ("sc", "sr")})

    def arrive(
        self,
        number: int = 1,
        study: str = STUDY,
        content: str = "first",
        analyzable: bool = True,
        expected: int | None = None,
        uid: str | None = None,
        stat: bool = False,
    ) -> tuple[Outcome, Path | None]:
        """One instance of a study arrives; content stands for its bytes."""
        arrived = instance(number, study, content, uid)
        arrival = Arrival(arrived, study, 1, analyzable, "MODALITY", expected, stat=stat)
        (done,) = arrivals.arrive(self.database, [arrival], DATA, QUIET, as_it_is)
        return done

    def claim(self, alone: bool = False) -> Claim | None:
        """What is due now."""
        return queue.claim_study(self.database, DATA, LEASE, MAX_ATTEMPTS, alone)

    def claim_due(self) -> Claim:
        """The quiet period, or a lease, passes; then what is due."""
        self.clock.wait(LEASE)
        claimed = self.claim()
        assert claimed is not None
        return claimed

    def complete(self, claimed: Claim, **facts: Any) -> None:
        """Commit a tiny analysis of a claim."""
        done = analysis_of(claimed.study, self.clock.now, **facts)
        queue.complete(self.database, claimed, done, DATA, self.outputs, as_it_is)

    def fail(self, claimed: Claim, reason: str) -> None:
        """Close a claim as failed, with nothing to say about its images."""
        done = Analysis(claimed.study, model(), (), (), (), ())
        queue.fail_study(self.database, claimed, reason, done, DATA, self.outputs, as_it_is)

    def analyze(self, **facts: Any) -> Claim:
        """Wait, claim, complete."""
        claimed = self.claim_due()
        self.complete(claimed, **facts)
        return claimed

    def claim_deliveries(self, destination: str = "pacs", limit: int = 50) -> list[Delivery]:
        """What is to be sent now, each of it under way."""
        items = outbox.claim_deliveries(self.database, destination, DATA, LEASE, limit)
        for index in range(len(items)):
            assert outbox.start_delivery(self.database, items[index:], LEASE)
        return items

    def deliver(self, destination: str = "pacs") -> None:
        """All that waits for a destination is delivered."""
        for item in self.claim_deliveries(destination):
            outbox.finish_delivery(self.database, item, "delivered")

    def study(self, uid: str = STUDY) -> Any:
        """A study's row."""
        with self.database.read() as connection:
            return connection.execute(select(study).where(study.c.study_instance_uid == uid)).one()

    def seconds_until_due(self, uid: str = STUDY) -> float | None:
        """How long a study still waits; None: for ever."""
        due = self.study(uid).due_at
        return None if due is None else (due - self.clock.now).total_seconds()

    def deliveries(self) -> dict[tuple[str, str], Any]:
        """(result, destination) -> the delivery's row; a result is named as in analysis_of()."""
        statement = select(delivery, result.c.kind, result.c.path).join(result)
        with self.database.read() as connection:
            rows = connection.execute(statement).all()
        return {(Path(row.path).stem, row.destination): row for row in rows}

    def delivery_states(self) -> dict[tuple[str, str], str]:
        """(result, destination) -> state."""
        return {key: row.state for key, row in self.deliveries().items()}

    def everything(self) -> dict[str, list[Any]]:
        """Every row of every table."""
        with self.database.read() as connection:
            return {
                table.name: sorted(map(repr, connection.execute(select(table)).all()))
                for table in metadata.sorted_tables
            }

    def unexplained(self) -> list[str]:
        """Studies and deliveries whose audit trail has a gap or does not end in their state."""
        with self.database.read() as connection:
            events = connection.execute(select(event).order_by(event.c.id)).all()
            states = {
                ("study", row.study_instance_uid): row.state
                for row in connection.execute(select(study))
            } | {
                ("delivery", str(row.id)): row.state for row in connection.execute(select(delivery))
            }
        trail: dict[tuple[str, str], str] = {}
        found = []
        for row in events:
            key = (row.subject, row.subject_id)
            if row.from_state != trail.get(key):
                found.append(f"{key}: from {row.from_state}, but was {trail.get(key)}")
            trail[key] = row.to_state
        return found + [f"{key}: {s}" for key, s in states.items() if trail.get(key) != s]


def as_it_is(made: Any) -> Any:
    """There are no files that would be there, or get their names."""
    return made


def bench(database: Database) -> Bench:
    """A bench whose clock starts now."""
    clock = Clock(datetime.now(UTC).replace(microsecond=0))
    return Bench(Database(database.engine, clock), clock)


def instance(
    number: int = 1, study: str = STUDY, content: str = "first", uid: str | None = None
) -> Instance:
    """An instance of a study, as it would lie in the inbox."""
    uid = uid or f"{study}.{number}"
    digest = hashlib.sha256(f"{uid} {content}".encode()).hexdigest()
    return Instance(
        uid,
        DigitalXRayImageStorageForPresentation,
        f"{study}.0",
        ExplicitVRLittleEndian,
        DATA / "inbox" / study / f"{uid}.{digest[:12]}.dcm",
        digest,
    )


def analysis_of(
    study: Study,
    analyzed_at: datetime,
    probability: float = 0.9,
    version: str = "1",
    excluded: Collection[int] = (),
    withdrawn: Sequence[str] = (),
    successor_of: Sequence[str] = (),
) -> Analysis:
    """An overlay for each instance ("sc <number>") and a report ("sr <revision>").

    excluded: numbers of instances that the model did not take; withdrawn: SOP Instance UIDs of
    results that a Key Object ("ko <revision>") withdraws for the destination "pacs";
    successor_of: those of the reports that this one replaces
    """
    out = DATA / "results" / study.study_instance_uid
    taken = [i for i in study.instances if _number(i) not in excluded]
    frames = [_frame(i) for i in taken]
    score = Score(
        np.array([probability], "f4"),
        np.zeros((1, 1, 1), "f4"),
        np.zeros(1, "f4"),
        "test",
        analyzed_at,
    )
    cells = np.zeros((2, 2), "f4")
    presence = Presence.PRESENT if probability >= PNEUMONIA.threshold else Presence.ABSENT
    results = [
        Result(
            f"{i.sop_instance_uid}.{int(i.digest[:8], 16)}",
            SecondaryCaptureImageStorage,
            f"{study.study_instance_uid}.100",
            "sc",
            out / f"sc {_number(i)}",
            i.sop_instance_uid,
        )
        for i in taken
    ]
    if taken:
        series, revision = f"{study.study_instance_uid}.200", study.revision
        sr = out / f"sr {revision}"
        results.append(
            Result(
                f"{series}.{revision}",
                ComprehensiveSRStorage,
                series,
                "sr",
                sr,
                None,
                tuple(successor_of),
            )
        )
    if withdrawn:
        series = f"{study.study_instance_uid}.300"
        results.append(
            Result(
                f"{series}.{study.revision}",
                KeyObjectSelectionDocumentStorage,
                series,
                WITHDRAWAL,
                out / f"ko {study.revision}",
                None,
                tuple(withdrawn),
                "pacs",
            )
        )
    return Analysis(
        study=study,
        model=model(version),
        predictions=tuple(Prediction(frame, score) for frame in frames),
        findings=tuple(
            Finding(frame, PNEUMONIA, probability, presence, cells, analyzed_at) for frame in frames
        ),
        exclusions=tuple(
            Exclusion(i, "view", "the model takes no lateral view")
            for i in study.instances
            if _number(i) in excluded
        ),
        results=tuple(results),
    )


def _number(item: Instance) -> int:
    return int(item.sop_instance_uid.rpartition(".")[2])


def _frame(source: Instance) -> Frame:
    pixels, display = np.zeros((1, 2, 2), "f4"), np.zeros((2, 2), "u1")
    return Frame(source, 1, pixels, display, Letterbox(2, 2, 2, 0, 0, 2, 2))


def model(version: str = "1") -> Model:
    """A model with one label."""
    return Model(
        name="tiny",
        version=version,
        architecture="resnet50",
        channels=1,
        activation="sigmoid",
        sha256="0" * 64,
        accepts=make.accepts(),
        preprocessing=Preprocessing(2, (0.0, 1.0), (0.5,), (0.25,)),
        labels=(PNEUMONIA,),
        calibrated=False,
        provenance={},
        path=DATA / "models" / "tiny" / version,
    )
