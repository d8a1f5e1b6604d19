"""Audit events: rows, the XML of PS3.15 A.5, and syslog servers that are there or are not."""

import base64
import dataclasses
import json
import os
import pwd
import re
import signal
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from commands import say
from daemon import Daemon, daemon
from peers import free_port, wait_until
from structlog.testing import capture_logs
from syslogd import Server, certificate

from dicomai import settings, syslog
from dicomai.audit import (
    APPLICATION_START,
    APPLICATION_STOP,
    SENT,
    AuditCode,
    AuditEvent,
    Auditor,
    Outcome,
    open_auditor,
)
from dicomai.audit_message import audit_message
from dicomai.store import queries
from dicomai.store.database import Database, open_database, upgrade

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
STUDY = "1.2.826.0.1.3680043.8.498.1"
RECEIVED = AuditEvent(
    AuditCode.TRANSFERRED, "C", "MODALITY", address="10.1.2.3", study_instance_uid=STUDY, count=3
)
ALERT = AuditEvent(
    AuditCode.SECURITY_ALERT, "E", "STRANGER", "110126", Outcome.MINOR_FAILURE, "10.9.9.9",
    detail="calling AE title is not in receive.calling_ae_titles",
)  # fmt: skip
STARTED = AuditEvent(AuditCode.APPLICATION_ACTIVITY, "E", "dicomai", APPLICATION_START)
EVENTS = {
    "received": RECEIVED,
    "sent": AuditEvent(AuditCode.TRANSFERRED, "R", "PACS", SENT, address="10.1.2.4", count=2),
    "alert": ALERT,
    "started": STARTED,
    "retried": AuditEvent(
        AuditCode.APPLICATION_ACTIVITY, "E", "Jörg", "study retry", Outcome.MINOR_FAILURE,
        study_instance_uid=STUDY,
    ),
    "backed up": AuditEvent(AuditCode.EXPORT, "R", "root", "db backup", detail="/backup/<1>.db"),
    "read": AuditEvent(AuditCode.AUDIT_LOG_USED, "R", "root", "audit list"),
    "deleted": AuditEvent(
        AuditCode.STUDY_DELETED, "D", "root", "purge", study_instance_uid=STUDY, count=2
    ),
}  # fmt: skip

# PS3.15 A.5.1.1, the RELAX NG schema by hand: attributes (a pattern; "?" before it: optional) and
# children in their order, with how often they may come.
CODED = {"csd-code": r".+", "codeSystemName": r".+", "displayName": r"?.*", "originalText": r".+"}
SCHEMA: dict[str, tuple[dict[str, str], list[tuple[str, str]]]] = {
    "AuditMessage": (
        {},
        [
            ("EventIdentification", "1"),
            ("ActiveParticipant", "+"),
            ("AuditSourceIdentification", "1"),
            ("ParticipantObjectIdentification", "*"),
        ],
    ),
    "EventIdentification": (
        {
            "EventActionCode": r"?[CRUDE]",
            "EventDateTime": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)",
            "EventOutcomeIndicator": r"0|4|8|12",
        },
        [("EventID", "1"), ("EventTypeCode", "*"), ("EventOutcomeDescription", "?")],
    ),
    "EventID": (CODED, []),
    "EventTypeCode": (CODED, []),
    "EventOutcomeDescription": ({}, []),
    "ActiveParticipant": (
        {
            "UserID": r".*",
            "AlternativeUserID": r"?.*",
            "UserName": r"?.*",
            "UserIsRequestor": r"true|false|0|1",
            "NetworkAccessPointID": r"?.+",
            "NetworkAccessPointTypeCode": r"?[1-5]",
        },
        [("RoleIDCode", "*"), ("MediaIdentifier", "?")],
    ),
    "RoleIDCode": (CODED, []),
    "MediaIdentifier": ({}, [("MediaType", "1")]),
    "MediaType": (CODED, []),
    "AuditSourceIdentification": (
        {"AuditEnterpriseSiteID": r"?.*", "AuditSourceID": r".+"},
        [("AuditSourceTypeCode", "*")],
    ),
    "AuditSourceTypeCode": ({"csd-code": r"[1-9]"}, []),
    "ParticipantObjectIdentification": (
        {
            "ParticipantObjectID": r".+",
            "ParticipantObjectTypeCode": r"?[1-4]",
            "ParticipantObjectTypeCodeRole": r"?(1?\d|2[0-6])",
            "ParticipantObjectDataLifeCycle": r"?([1-9]|1[0-5])",
            "ParticipantObjectSensitivity": r"?.*",
        },
        [
            ("ParticipantObjectIDTypeCode", "1"),
            ("ParticipantObjectName", "1"),
            ("ParticipantObjectDetail", "*"),
            ("ParticipantObjectDescription", "*"),
        ],
    ),
    "ParticipantObjectIDTypeCode": (CODED, []),
    "ParticipantObjectName": ({}, []),
    "ParticipantObjectDetail": ({"type": r".+", "value": r"[A-Za-z0-9+/]*={0,2}"}, []),
    "ParticipantObjectDescription": ({}, [("SOPClass", "*")]),
    "SOPClass": ({"UID": r"?[0-9.]+", "NumberOfInstances": r"[0-9]+"}, []),
}
OFTEN = {"1": (1, 1), "?": (0, 1), "*": (0, 999), "+": (1, 999)}


def violations(element: ElementTree.Element) -> list[str]:
    """What the schema forbids in an element and below."""
    if element.tag not in SCHEMA:
        return [f"{element.tag} is unknown"]
    attributes, children = SCHEMA[element.tag]
    found = [f"{element.tag}/@{name} is unknown" for name in element.keys() - attributes.keys()]
    for name, pattern in attributes.items():
        value = element.get(name)
        if value is None and not pattern.startswith("?"):
            found.append(f"{element.tag}/@{name} is missing")
        if value is not None and not re.fullmatch(pattern.removeprefix("?"), value):
            found.append(f"{element.tag}/@{name}: {value}")
    order = [name for name, _ in children]
    tags = [child.tag for child in element]
    if tags != sorted(tags, key=lambda tag: order.index(tag) if tag in order else 99):
        found.append(f"{element.tag} has {tags}")
    for name, often in children:
        least, most = OFTEN[often]
        if not least <= tags.count(name) <= most:
            found.append(f"{element.tag} has {tags.count(name)} {name}")
    return found + [line for child in element for line in violations(child)]


def parsed(event: AuditEvent) -> ElementTree.Element:
    """The event as XML."""
    return ElementTree.fromstring(audit_message(event, NOON, "DICOMAI"))


def roles(root: ElementTree.Element) -> dict[str, tuple[str, str]]:
    """Role -> (user, whether he asked for it)."""
    return {
        participant.find("RoleIDCode").get("csd-code"): (  # type: ignore[union-attr, misc]
            participant.get("UserID"),
            participant.get("UserIsRequestor"),
        )
        for participant in root.iter("ActiveParticipant")
        if participant.find("RoleIDCode") is not None
    }


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS.keys())
def test_an_event_is_a_message_of_the_standards_schema(event: AuditEvent) -> None:
    root = parsed(event)

    assert violations(root) == []
    what = root.find("EventIdentification/EventID")
    assert what is not None
    assert (what.get("csd-code"), what.get("codeSystemName")) == (event.code.value, "DCM")
    requestors = [p for p in root.iter("ActiveParticipant") if p.get("UserIsRequestor") == "true"]
    assert len(requestors) <= 1  # A.5.2: not several


def test_the_schemas_check_finds_what_is_wrong() -> None:
    root = parsed(RECEIVED)
    root.append(root[0])  # twice, and behind the participants
    del root[0].attrib["EventOutcomeIndicator"]
    root[1].set("UserIsRequestor", "TRUE")

    found = "\n".join(violations(root))

    assert "EventOutcomeIndicator is missing" in found
    assert "2 EventIdentification" in found
    assert "UserIsRequestor: TRUE" in found


def test_a_transfer_names_who_sent_to_whom_and_which_study() -> None:
    """PS3.15 A.5.3.7."""
    received, sent = parsed(RECEIVED), parsed(EVENTS["sent"])

    me = str(os.getpid())
    assert roles(received) == {"110153": ("MODALITY", "true"), "110152": (me, "false")}
    assert roles(sent) == {"110153": (me, "true"), "110152": ("PACS", "false")}
    (source, _) = received.iter("ActiveParticipant")
    assert source.get("NetworkAccessPointID") == "10.1.2.3"
    assert source.get("NetworkAccessPointTypeCode") == "2"
    study = received.find("ParticipantObjectIdentification")
    assert study is not None
    assert study.get("ParticipantObjectID") == STUDY
    count = study.find("ParticipantObjectDescription/SOPClass")
    assert count is not None
    assert count.get("NumberOfInstances") == "3"


def test_an_alert_says_who_did_it_and_what_was_wrong() -> None:
    root = parsed(ALERT)
    detail = root.find("ParticipantObjectIdentification/ParticipantObjectDetail")

    assert [p.get("UserID") for p in root.iter("ActiveParticipant")][1] == "STRANGER"
    assert detail is not None
    assert base64.b64decode(detail.get("value") or "").decode() == ALERT.detail


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """A migrated database."""
    opened = open_database(f"sqlite:///{tmp_path}/dicomai.db")
    upgrade(opened, settings.shipped("migrations"))
    yield opened
    opened.engine.dispose()


def opened(database: Database, address: str, tls_ca: Path | None = None) -> Auditor:
    """As the settings would open it."""
    how = settings.Audit(syslog=address, tls_ca=tls_ca)
    return open_auditor(settings.Settings(audit=how), database)


@pytest.mark.parametrize("kind", ["udp", "tcp", "tls", "path"])
def test_an_event_is_a_row_and_a_message_of_rfc_5424(
    tmp_path: Path, sqlite: Database, kind: str
) -> None:
    tls = certificate(tmp_path / "tls") if kind == "tls" else None
    with Server(kind, tmp_path, tls=tls) as server:
        auditor = opened(sqlite, server.address, tls[0] if tls else None)
        for event in EVENTS.values():
            auditor.note(event)
        auditor.close(10)
        messages = server.wait(len(EVENTS))

    rows = list(reversed(queries.audit_events(sqlite, queries.AuditFilter())))
    assert [row["code"] for row in rows] == [event.code.value for event in EVENTS.values()]
    for message, row, event in zip(messages, rows, EVENTS.values(), strict=True):
        assert (message.program, message.kind) == ("dicomai", "DICOM+RFC3881")
        assert abs(message.moment - row["at"]) < timedelta(seconds=5)
        # PS3.15 A.6: facility 10; severity 5, and 4 where something is wrong.
        wrong = event.outcome or event.code is AuditCode.SECURITY_ALERT
        assert message.priority == (84 if wrong else 85)
        assert violations(message.root) == []
    assert "Jörg" in messages[list(EVENTS).index("retried")].text


def test_a_server_with_another_certificate_gets_nothing(tmp_path: Path, sqlite: Database) -> None:
    stranger, trusted = certificate(tmp_path / "stranger"), certificate(tmp_path / "trusted")
    with Server("tls", tls=stranger) as server, capture_logs() as lines:
        auditor = opened(sqlite, server.address, trusted[0])
        auditor.note(STARTED)
        wait_until(lambda: lines, 10, "a line in the log")
        auditor.close(5)

        assert server.messages == []
    (line,) = lines
    assert (line["event"], line["error"]) == ("syslog_away", "SSLCertVerificationError")
    assert len(queries.audit_events(sqlite, queries.AuditFilter())) == 1


def test_a_server_that_is_away_delays_nothing_and_gets_what_waited_when_it_is_back(
    sqlite: Database,
) -> None:
    port = free_port()
    auditor = opened(sqlite, f"tcp://127.0.0.1:{port}")
    with capture_logs() as lines:
        started = time.monotonic()
        for count in range(20):
            auditor.note(dataclasses.replace(RECEIVED, count=count))
        took = time.monotonic() - started
        wait_until(lambda: lines, 10, "a line in the log")
        with Server("tcp", port=port) as server:
            messages = server.wait(20, 20)
            wait_until(lambda: len(lines) == 2, 5, "another line")
            auditor.close(5)

    assert took < 2  # twenty commits
    assert [line["event"] for line in lines] == ["syslog_away", "syslog_back"]
    counts = [next(message.root.iter("SOPClass")) for message in messages]
    assert [one.get("NumberOfInstances") for one in counts] == [str(n) for n in range(20)]


def test_after_a_server_has_hung_up_the_next_message_goes_over_a_new_connection(
    sqlite: Database,
) -> None:
    with Server("tcp") as server:
        auditor = opened(sqlite, server.address)
        auditor.note(STARTED)
        server.wait(1)
        server.hang_up()
        auditor.note(RECEIVED)
        server.wait(2)
        auditor.close(5)

        assert [number for number, _ in server.messages] == [1, 2]


def test_a_server_that_never_answers_holds_up_neither_work_nor_the_end(
    tmp_path: Path, sqlite: Database
) -> None:
    (trusted, _) = certificate(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        auditor = opened(sqlite, f"tls://127.0.0.1:{silent.getsockname()[1]}", trusted)
        started = time.monotonic()
        auditor.note(STARTED)
        noted = time.monotonic() - started
        auditor.close()

        assert noted < 1
        assert time.monotonic() - started < 2.5
    assert len(queries.audit_events(sqlite, queries.AuditFilter())) == 1


def test_no_more_than_so_many_messages_wait_for_a_server(sqlite: Database) -> None:
    server = syslog.Syslog(f"tcp://127.0.0.1:{free_port()}")
    for _ in range(syslog.MOST_WAITING + 50):
        server.send(b"x")
    waiting = server._waiting.qsize()
    server.close(1)

    assert waiting <= syslog.MOST_WAITING


def test_without_the_table_the_server_is_told_and_the_log_says_so(sqlite: Database) -> None:
    with sqlite.write() as connection:
        connection.exec_driver_sql("DROP TABLE audit")
    with Server("udp") as server, capture_logs() as lines:
        auditor = opened(sqlite, server.address)
        auditor.note(STARTED)
        server.wait(1)
        auditor.close(5)

    assert [(line["event"], line["code"]) for line in lines] == [("not_audited", "110100")]


def test_a_peer_cannot_evade_the_audit_by_its_ae_title(database: Database) -> None:
    with Server("udp") as server:
        auditor = opened(database, server.address)
        auditor.note(dataclasses.replace(ALERT, who="EVIL\x00\n\x1b[2J<&" + "X" * 90))
        (message,) = server.wait(1)
        auditor.close(5)

    (row,) = queries.audit_events(database, queries.AuditFilter())
    assert row["who"].startswith("EVIL???[2J<&X")
    assert len(row["who"]) == 64
    assert violations(message.root) == []


def test_events_are_listed_newest_first_and_filtered(database: Database) -> None:
    auditor = Auditor(database)
    for event in EVENTS.values():
        auditor.note(event)

    def codes(**wanted: Any) -> list[str]:
        rows = queries.audit_events(database, queries.AuditFilter(**wanted))
        return [row["code"] for row in rows]

    assert codes() == [event.code.value for event in reversed(EVENTS.values())]
    assert codes(code="110113") == ["110113"]
    assert codes(who="root") == ["110105", "110101", "110106"]
    assert codes(study_instance_uid=STUDY) == ["110105", "110100", "110104"]
    assert codes(since=datetime.now(UTC) + timedelta(hours=1)) == []
    assert codes(until=datetime.now(UTC) + timedelta(hours=1), who="STRANGER") == ["110113"]
    assert len(queries.audit_events(database, queries.AuditFilter(), 2)) == 2


def test_commands_that_change_or_take_something_are_audited_with_how_they_went(
    tmp_path: Path, sqlite: Database
) -> None:
    config = tmp_path / "dicomai.toml"
    with Server("tcp") as server:
        config.write_text(
            f'[database]\nurl = "{sqlite.engine.url}"\n[audit]\nsyslog = "{server.address}"\n'
        )
        commands = [
            ["db", "upgrade"],
            ["study", "retry", STUDY],
            ["study", "retry", "Zzyzx^Quentin"],  # what is typed for a UID may be anything
            ["delivery", "retry", "--destination", "pacs"],
            ["db", "backup", str(tmp_path / "backup.db")],
            ["study", "list"],  # only looks
            ["audit", "list", "--format", "json"],
        ]
        said = say(config, commands).decode()
        messages = server.wait(6)

    rows = list(reversed(queries.audit_events(sqlite, queries.AuditFilter())))
    seen = [(r["code"], r["type"], r["outcome"], r["study_instance_uid"]) for r in rows]
    assert seen == [
        ("110100", "db upgrade", 0, None),
        ("110100", "study retry", 4, STUDY),
        ("110100", "study retry", 4, None),
        ("110100", "delivery retry", 0, None),
        ("110106", "db backup", 0, None),
        ("110101", "audit list", 0, None),
    ]
    types = [next(m.root.iter("EventTypeCode")).get("csd-code") for m in messages]
    assert sorted(types) == sorted(row["type"] for row in rows)
    # The user who logged in, else the user of this process.
    login = int(Path("/proc/self/loginuid").read_text())
    mine = pwd.getpwuid(os.getuid() if login == 2**32 - 1 else login).pw_name
    assert {row["who"] for row in rows} == {mine}
    listed = json.loads(said[said.rindex("[\n") : said.rindex("<<<")])
    assert [row["event"] for row in listed] == ["Export"] + ["Application Activity"] * 4
    assert re.findall("<<< ([0-9])", said) == list("0220000")


def is_up(running: Daemon) -> bool:
    """Whether every role has said its first word; scoring takes longest to begin."""
    first = ("listening", "scoring", "delivering", "scheduling")
    return all(f'"event": "{word}"' in running.log for word in first)


def test_start_and_stop_of_each_process_of_the_daemon_are_audited(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/dicomai.db"
    with Server("udp") as server:
        more = f'[audit]\nsyslog = "{server.address}"'
        with daemon(tmp_path, url, free_port(), more=more) as running:
            wait_until(lambda: is_up(running), 90, "all roles are up")
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(15) == 0
            rows = queries.audit_events(running.database, queries.AuditFilter(code="110100"))
        messages = server.wait(10)

    everybody = ["deliver", "infer", "listen", "run", "schedule"]
    for kind in (APPLICATION_START, APPLICATION_STOP):
        assert sorted(row["detail"] for row in rows if row["type"] == kind) == everybody
    assert rows[0]["detail"] == "run"  # the parent ends last
    types = [next(m.root.iter("EventTypeCode")).get("csd-code") for m in messages]
    assert types.count(APPLICATION_START) == types.count(APPLICATION_STOP) == 5
    assert all(violations(message.root) == [] for message in messages)


def test_the_daemon_starts_and_ends_in_time_while_its_syslog_server_is_away(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/dicomai.db"
    more = f'[audit]\nsyslog = "tcp://127.0.0.1:{free_port()}"'
    with daemon(tmp_path, url, free_port(), more=more) as running:
        wait_until(lambda: is_up(running), 90, "all roles are up")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(10) == 0
        rows = queries.audit_events(running.database, queries.AuditFilter(code="110100"))

    assert rows[0]["type"] == APPLICATION_STOP
    assert '"event": "syslog_away"' in running.log
