"""Who is let in, how many, for how long, and what becomes of those who break the rules."""

import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import doors
import make
import pytest
from doors import connect, data_pdu, dcmtk, establish, is_cut_off, is_served, listening, pdu
from peers import wait_until
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    Verification,
)
from structlog.testing import capture_logs

from dicomai.receive import listener as receiver
from dicomai.receive import server
from dicomai.receive.association import LARGEST_PDU
from dicomai.settings import shipped
from dicomai.store import queries
from dicomai.store.database import Database, open_database, upgrade

RELEASE = pdu(doors.RELEASE_RQ, bytes(4))


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """What is tested here is the same on both databases."""
    return f"sqlite:///{tmp_path}/dicomai.db"


@dataclass(frozen=True)
class Recorded:
    """What DCMTK sends; storing: request, command, dataset in pieces, release."""

    file: Path
    storing: list[bytes]
    echoing: list[bytes]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Recorded once for the whole run."""
    folder = tmp_path_factory.mktemp("recorded")
    (file,) = make.save(folder, [make.chest_radiograph()])
    database = open_database(f"sqlite:///{folder}/dicomai.db")
    upgrade(database, shipped("migrations"))
    with listening(database, folder) as port:
        storing = doors.record(port, "storescu", "-R", file)
        echoing = doors.record(port, "echoscu")
    database.engine.dispose()
    return Recorded(file, storing, echoing)


@pytest.fixture
def file(recorded: Recorded) -> Path:
    """A radiograph to send."""
    return recorded.file


@pytest.fixture
def storing(recorded: Recorded) -> list[bytes]:
    """The PDUs with that radiograph."""
    return recorded.storing


@pytest.fixture
def echoing(recorded: Recorded) -> list[bytes]:
    """The PDUs of an echo: request, command, release."""
    return recorded.echoing


def kept(folder: Path) -> list[Path]:
    """What lies in the inbox, temporary files included."""
    return doors.files_of(folder / "inbox")


# Who


def test_an_address_that_is_not_listed_is_cut_off_before_anything_is_read(
    database: Database, tmp_path: Path
) -> None:
    with listening(database, tmp_path, addresses=("10.0.0.0/8", "192.0.2.1")) as port:
        with connect(port) as silent:
            assert silent.recv(1) == b""
        assert not is_served(port)
        alert = doors.wait_for_alert(database)
    assert (alert["address"], alert["type"]) == ("127.0.0.1", "110126")


def test_an_address_in_a_listed_network_is_served(database: Database, tmp_path: Path) -> None:
    with listening(database, tmp_path, addresses=("10.0.0.0/8", "127.0.0.0/8")) as port:
        assert is_served(port)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"ae_title": "OTHER"}, "called AE title"),
        ({"calling_ae_titles": ("OTHER",)}, "calling AE title"),
    ],
)
def test_a_rejected_peer_is_one_line_and_one_audit_event(
    database: Database, tmp_path: Path, setting: dict[str, Any], reason: str
) -> None:
    with capture_logs() as lines, listening(database, tmp_path, **setting) as port:
        assert "Not Recognized" in dcmtk("echoscu", port).stderr
        alert = doors.wait_for_alert(database)
    assert (alert["who"], alert["count"], alert["outcome"]) == ("MODALITY", 1, 4)
    assert reason in alert["detail"]
    (line,) = [line for line in lines if line["event"] == "refused"]
    assert (line["calling_ae_title"], line["address"]) == ("MODALITY", "127.0.0.1")


def test_a_flood_of_refusals_is_two_audit_events_that_count_them_all(
    database: Database, tmp_path: Path
) -> None:
    with capture_logs() as lines:
        with listening(database, tmp_path, addresses=("10.0.0.0/8",)) as port:
            connect(port).close()
            doors.wait_for_alert(database)
            for _ in range(300):
                connect(port).close()
            time.sleep(0.3)  # in which a second one would come
            assert len(doors.audited(database, doors.SECURITY_ALERT)) == 1
    rows = doors.audited(database, doors.SECURITY_ALERT)
    assert len(rows) == len(lines) == 2  # the second one when the listener stops
    assert [row["count"] for row in rows] == [1, 300]


def test_what_an_association_brought_is_one_audit_event_a_study(
    database: Database, tmp_path: Path
) -> None:
    study = make.chest_radiograph().StudyInstanceUID
    objects = [make.chest_radiograph(number, study, number + 1) for number in range(2)]
    files = make.save(tmp_path / "sent", [*objects, make.chest_radiograph(3)])
    with listening(database, tmp_path) as port:
        assert dcmtk("storescu", port, *files).returncode == 0
        rows = wait_until(
            lambda: doors.audited(database, doors.TRANSFERRED), 5, "the transfer is audited"
        )
    rows = doors.audited(database, doors.TRANSFERRED)
    assert sorted(row["count"] for row in rows) == [1, 2]
    assert {row["study_instance_uid"]: row["count"] for row in rows}[study] == 2
    assert {(row["who"], row["address"], row["action"], row["outcome"]) for row in rows} == {
        ("MODALITY", "127.0.0.1", "C", 0)
    }


# How many


def test_one_association_too_many_is_rejected_until_another_one_ends(
    database: Database, tmp_path: Path, echoing: list[bytes]
) -> None:
    with listening(database, tmp_path, max_associations=1) as port:
        with establish(port, echoing[0]) as first:
            assert "Local Limit Exceeded" in dcmtk("echoscu", port).stderr
            first.sendall(RELEASE)
            assert doors.read_pdu(first)[0] == doors.RELEASE_RP
        assert is_served(port)
        assert "max_associations" in doors.wait_for_alert(database)["detail"]


def test_connections_that_say_nothing_take_no_place_and_are_cut_off(
    database: Database, tmp_path: Path
) -> None:
    with listening(database, tmp_path, max_associations=1, idle_seconds=1.0) as port:
        silent = [connect(port) for _ in range(10)]
        assert is_served(port)
        assert all(is_cut_off(connection) for connection in silent)
        assert "too slow" in doors.wait_for_alert(database)["detail"]
        for connection in silent:
            connection.close()


def test_of_too_many_silent_connections_the_oldest_makes_room(
    database: Database, tmp_path: Path
) -> None:
    with listening(database, tmp_path) as port:
        silent = [connect(port) for _ in range(server.MOST_WAITING + 2)]
        assert is_cut_off(silent[0])
        assert is_served(port)
        silent[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            silent[-1].recv(1)
        for connection in silent:
            connection.close()


# How long


def slow_ones(storing: list[bytes]) -> dict[str, tuple[bytes, list[bytes]]]:
    """What is sent at once, and what is then dripped over and over."""
    request, command = storing[0], storing[1]
    piece = data_pdu(storing[2][10], 0, bytes(100))
    head = data_pdu(storing[2][10], 1, bytes(1 << 15))[:12]
    return {
        "half a request": (request[:40], []),
        "a dripped request": (b"", [bytes([byte]) for byte in request]),
        "silence in an association": (request, []),
        "half a PDU": (request + command[:20], []),
        "a dripped PDU": (request + head, [b"x"]),
        "half a message": (request + command, []),
        "a message in small PDUs": (request + command, [piece]),
    }


@pytest.mark.parametrize("name", list(slow_ones([b"", b"", bytes(20)])))
def test_a_sender_that_does_not_get_on_is_cut_off_and_its_place_is_free(
    database: Database, tmp_path: Path, storing: list[bytes], name: str
) -> None:
    at_once, dripped = slow_ones(storing)[name]
    with listening(database, tmp_path, max_associations=1, idle_seconds=1.0) as port:
        begun = time.monotonic()
        with connect(port) as slow:
            slow.sendall(at_once)
            if dripped:
                doors.drip(slow, dripped, 0.05)
            else:
                assert is_cut_off(slow)
            assert 0.9 < time.monotonic() - begun < 5
            assert is_served(port)
    assert kept(tmp_path) == []


def test_a_sender_on_a_slow_line_is_served(
    database: Database, tmp_path: Path, storing: list[bytes]
) -> None:
    stream = b"".join(storing[1:-1])
    with listening(database, tmp_path, idle_seconds=1.5) as port:
        with establish(port, storing[0]) as connection:
            begun = time.monotonic()
            for start in range(0, len(stream), 20_000):
                connection.sendall(stream[start : start + 20_000])
                time.sleep(2.5 * 20_000 / len(stream))
            assert time.monotonic() - begun > 2
            assert status_of(doors.read_pdu(connection)) == 0x0000
    assert len(kept(tmp_path)) == 1


def test_the_time_that_we_need_ourselves_is_not_the_senders(
    database: Database, tmp_path: Path, storing: list[bytes]
) -> None:
    with listening(database, tmp_path, idle_seconds=0.5) as port:
        with establish(port, storing[0]) as connection:
            with database.write():  # nobody else can write meanwhile
                connection.sendall(b"".join(storing[1:-1]))
                time.sleep(1.2)
            assert status_of(doors.read_pdu(connection)) == 0x0000
            connection.sendall(RELEASE)
            assert doors.read_pdu(connection)[0] == doors.RELEASE_RP


# How much


@pytest.mark.parametrize("kind", [doors.ASSOCIATE_RQ, doors.DATA, doors.RELEASE_RQ, doors.ABORT])
def test_a_pdu_that_announces_too_much_is_refused_before_it_comes(
    database: Database, tmp_path: Path, echoing: list[bytes], kind: int
) -> None:
    with listening(database, tmp_path) as port:
        is_first = kind == doors.ASSOCIATE_RQ
        with connect(port) if is_first else establish(port, echoing[0]) as connection:
            connection.sendall(struct.pack(">BxI", kind, 0xFFFFFFFF))
            assert is_cut_off(connection)
        assert "4294967295 bytes" in doors.wait_for_alert(database)["detail"]
        assert is_served(port)


def test_the_largest_pdu_that_we_announce_is_taken(
    database: Database, tmp_path: Path, storing: list[bytes]
) -> None:
    most = LARGEST_PDU - 6
    dataset = b"".join(piece[12:] for piece in storing[2:-1])
    trailing = struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, most - len(dataset) - 12)
    whole = (dataset + trailing).ljust(most, b"\0")
    with listening(database, tmp_path) as port:
        with establish(port, storing[0]) as connection:
            connection.sendall(storing[1] + data_pdu(storing[2][10], 2, whole))
            assert status_of(doors.read_pdu(connection)) == 0x0000


def test_an_object_that_is_too_large_ends_its_association(
    database: Database, tmp_path: Path
) -> None:
    (large,) = make.save(tmp_path / "sent", [make.large_radiograph()])
    assert large.stat().st_size > 2 << 20
    with listening(database, tmp_path, max_megabytes=2) as port:
        assert dcmtk("storescu", port, large).returncode != 0
        alert = doors.wait_for_alert(database)
        assert is_served(port)
    assert (alert["type"], alert["who"]) == ("too-large", "MODALITY")
    assert kept(tmp_path) == []


def test_with_too_little_space_nothing_is_written_and_it_is_said_once(
    database: Database, tmp_path: Path
) -> None:
    files = make.save(tmp_path / "sent", [make.chest_radiograph(number) for number in range(3)])
    with capture_logs() as lines:
        with listening(database, tmp_path, min_free_megabytes=1 << 30) as port:
            said = dcmtk("storescu", port, "-v", "-nh", *files)
    assert said.stderr.count("Refused: OutOfResources") == 3, said.stdout + said.stderr
    assert [line["event"] for line in lines] == ["disk_nearly_full"]
    assert not (tmp_path / "inbox").exists()


# Those who break off


def aborted(connection: socket.socket) -> None:
    """An A-ABORT in the middle of an object."""
    connection.sendall(pdu(doors.ABORT, bytes(4)))
    connection.close()


def closed(connection: socket.socket) -> None:
    """The connection ends in the middle of a PDU."""
    connection.sendall(b"\x04\0\0")
    connection.close()


def gone(connection: socket.socket) -> None:
    """The machine is switched off: a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def released(connection: socket.socket) -> None:
    """A release although the object is not whole."""
    connection.sendall(RELEASE)
    assert doors.read_pdu(connection)[0] == doors.RELEASE_RP
    connection.close()


@pytest.mark.parametrize("end", [aborted, closed, gone, released])
def test_a_sender_that_breaks_off_leaves_nothing_behind(
    database: Database, tmp_path: Path, file: Path, storing: list[bytes], end: Any
) -> None:
    with listening(database, tmp_path, max_associations=1) as port:
        connection = establish(port, storing[0])
        connection.sendall(b"".join(storing[1:3]))
        end(connection)
        wait_until(lambda: is_served(port), 5, "the place is free")
        assert kept(tmp_path) == []
        assert queries.studies(database) == []
        assert dcmtk("storescu", port, file).returncode == 0


def test_an_open_association_is_aborted_when_the_listener_stops(
    database: Database, tmp_path: Path, echoing: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.2)
    with listening(database, tmp_path) as port:
        before = doors.attending()
        connection = establish(port, echoing[0])
        waiting = connect(port)
        wait_until(lambda: len(doors.attending() - before) == 2, 5, "both are served")
    with connection, waiting:
        assert is_cut_off(connection)
        assert is_cut_off(waiting)


# Those who break the protocol


def lies(storing: list[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """What no peer may send after its association was accepted."""
    context_id = storing[1][10]
    command = storing[1][12:]
    yield "an unknown PDU", [pdu(9, b"")]
    yield "a second request", [storing[0]]
    yield "an acceptance", [pdu(doors.ASSOCIATE_AC, bytes(68))]
    yield "an empty fragment", [pdu(doors.DATA, struct.pack(">I", 0))]
    yield "a fragment without a header", [pdu(doors.DATA, struct.pack(">IB", 1, context_id))]
    beyond = struct.pack(">IBB", 99, context_id, 2) + b"x"
    yield "a fragment longer than its PDU", [storing[1], pdu(doors.DATA, beyond)]
    yield "a context that was not accepted", [data_pdu(255, 3, command)]
    yield "a message in two contexts", [storing[1], data_pdu(context_id ^ 2, 2, b"x")]
    yield "a dataset without a command", [data_pdu(context_id, 2, b"x")]
    yield "a command within a dataset", [storing[1], data_pdu(context_id, 3, command)]
    yield "a command that is none", [data_pdu(context_id, 3, b"Doe^John" * 4)]
    yield "a command that is cut off", [data_pdu(context_id, 3, command[:-3])]
    yield "a command without its field", [data_pdu(context_id, 3, command[:12])]
    yield "an endless command", [data_pdu(context_id, 1, bytes(60_000))] * 2
    yield "a response", [data_pdu(context_id, 3, command.replace(b"\0\1\2\0\0\0\1\0", b"\0\1\2\0\0\0\1\x80"))]  # fmt: skip # noqa: E501


def test_whatever_breaks_the_protocol_is_answered_by_an_abort(
    database: Database, tmp_path: Path, storing: list[bytes]
) -> None:
    with capture_logs() as lines, listening(database, tmp_path) as port:
        for name, sent in lies(storing):
            with establish(port, storing[0]) as connection:
                connection.sendall(b"".join(sent))
                assert is_cut_off(connection), name
        assert is_served(port)
    assert {line["event"] for line in lines} <= {"refused", "unfinished"}, lines
    assert "Doe" not in str(lines)


def item(kind: int, value: bytes) -> bytes:
    """An item of an A-ASSOCIATE PDU (PS3.8 9.3.2)."""
    return struct.pack(">BxH", kind, len(value)) + value


def broken_requests(request: bytes) -> Iterator[tuple[str, bytes]]:
    """Bodies of requests that are none."""
    fixed = request[6:74]
    abstract, transfer = item(0x30, b"1.2.840.10008.1.1"), item(0x40, b"1.2.840.10008.1.2")
    good = item(0x20, b"\1\0\0\0" + abstract + transfer)
    yield "nothing in it", b""
    yield "too short for its titles", fixed[:40]
    yield "no presentation context", fixed
    yield "no calling AE title", fixed[:20] + b" " * 16 + fixed[36:] + good
    yield "an AE title that is not ASCII", fixed[:20] + b"\xc4" * 16 + fixed[36:] + good
    yield "an AE title with a line feed", fixed[:20] + b"A\nB".ljust(16) + fixed[36:] + good
    yield "an item that is cut off", fixed + good + b"\x20\0"
    yield "an item longer than its PDU", fixed + good + b"\x77\0\xff\xff"
    yield "a sub-item longer than its item", fixed + item(0x20, b"\1\0\0\0\x30\0\0\x99")
    yield "a context without identifier", fixed + item(0x20, b"")
    yield "an even identifier", fixed + item(0x20, b"\2\0\0\0" + abstract + transfer)
    yield "no abstract syntax", fixed + item(0x20, b"\1\0\0\0" + transfer)
    yield "no transfer syntax", fixed + item(0x20, b"\1\0\0\0" + abstract)
    yield (
        "a UID that is not ASCII",
        fixed + item(0x20, b"\1\0\0\0" + item(0x30, b"\xff") + transfer),
    )
    yield "half a role selection", fixed + good + item(0x50, item(0x54, b"\0\x20\1"))


def test_a_request_that_is_no_request_is_answered_by_an_abort(
    database: Database, tmp_path: Path, echoing: list[bytes]
) -> None:
    with capture_logs() as lines, listening(database, tmp_path) as port:
        for name, body in broken_requests(echoing[0]):
            with connect(port) as connection:
                connection.sendall(pdu(doors.ASSOCIATE_RQ, body))
                assert is_cut_off(connection), name
        assert is_served(port)
    assert {(line["event"], line["kind"]) for line in lines} == {("refused", "malformed")}, lines


def test_items_of_unknown_types_are_passed_over(
    database: Database, tmp_path: Path, echoing: list[bytes]
) -> None:
    unknown = struct.pack(">BxH4s", 0x77, 4, b"news")
    body = echoing[0][6:74] + unknown + echoing[0][74:]
    with listening(database, tmp_path) as port:
        establish(port, pdu(doors.ASSOCIATE_RQ, body)).close()


def test_another_protocol_version_is_rejected(
    database: Database, tmp_path: Path, echoing: list[bytes]
) -> None:
    body = b"\0\2" + echoing[0][8:]
    with listening(database, tmp_path) as port:
        with connect(port) as connection:
            connection.sendall(pdu(doors.ASSOCIATE_RQ, body))
            assert doors.read_pdu(connection) == pdu(doors.ASSOCIATE_RJ, b"\0\1\2\2")


def test_a_dataset_of_another_instance_than_the_commands_is_a_mismatch(
    database: Database, tmp_path: Path, file: Path, storing: list[bytes]
) -> None:
    uid = file.stem.encode()
    other = generate_uid().encode()[: len(uid)].ljust(len(uid), b"1")
    assert uid in storing[1]
    with listening(database, tmp_path) as port:
        with establish(port, storing[0]) as connection:
            connection.sendall(storing[1].replace(uid, other) + b"".join(storing[2:-1]))
            assert status_of(doors.read_pdu(connection)) == 0xA900
    assert kept(tmp_path) == []


def test_an_operation_that_we_do_not_offer_is_answered_so(
    database: Database, tmp_path: Path, echoing: list[bytes]
) -> None:
    find = echoing[1].replace(b"\0\1\2\0\0\0\x30\0", b"\0\1\2\0\0\0\x20\0")
    assert find != echoing[1]
    with listening(database, tmp_path) as port:
        with establish(port, echoing[0]) as connection:
            connection.sendall(find)
            assert status_of(doors.read_pdu(connection)) == 0x0211


def test_what_is_no_image_does_not_fill_the_memory(
    database: Database, tmp_path: Path, echoing: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "LARGEST_IN_MEMORY", 1 << 20)
    without = b"\0\0\0\x08\2\0\0\0\1\1"  # (0000,0800), no dataset
    assert without in echoing[1]
    asking = echoing[1].replace(without, without[:-2] + b"\0\0")
    part = data_pdu(asking[10], 0, bytes(1 << 19))
    with listening(database, tmp_path) as port:
        with establish(port, echoing[0]) as connection:
            connection.sendall(asking + part + data_pdu(asking[10], 2, b"end"))
            assert status_of(doors.read_pdu(connection)) == 0x0000
            connection.sendall(asking + part * 2)
            connection.sendall(data_pdu(asking[10], 2, b"one more"))
            assert is_cut_off(connection)
        alert = doors.wait_for_alert(database)
    assert (alert["type"], alert["who"]) == ("too-large", "MODALITY")


def test_an_answer_comes_in_pdus_that_the_peer_can_take(
    database: Database, tmp_path: Path, echoing: list[bytes]
) -> None:
    place = echoing[0].index(b"\x51\0\0\4") + 4
    modest = echoing[0][:place] + struct.pack(">I", 32) + echoing[0][place + 4 :]
    with listening(database, tmp_path) as port:
        with establish(port, modest) as connection:
            connection.sendall(echoing[1])
            pieces = [doors.read_pdu(connection)]
            while not pieces[-1][11] & 2:  # the last fragment (PS3.8 E.2)
                pieces.append(doors.read_pdu(connection))
    assert {len(piece) - 6 for piece in pieces[:-1]} == {32}
    assert status_of(b"".join(piece[12:] for piece in pieces)) == 0x0000


def test_a_pacs_reports_what_it_has_committed_itself_to(database: Database, tmp_path: Path) -> None:
    reports: list[Dataset] = []
    ds = Dataset()
    ds.TransactionUID = generate_uid()
    ae = AE("PACS")
    ae.add_requested_context(StorageCommitmentPushModel)
    ae.add_requested_context(Verification)
    role = build_role(StorageCommitmentPushModel, scp_role=True)

    def committed(report: Dataset) -> bool:
        reports.append(report)
        return True

    with listening(database, tmp_path, committed) as port:
        assoc = ae.associate("127.0.0.1", port, ae_title="DICOMAI", ext_neg=[role])
        assert assoc.accepted_contexts[0].as_scp
        status, _ = assoc.send_n_event_report(
            ds, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
        )
        assert assoc.send_c_echo().Status == 0x0000
        assoc.release()
    assert status.Status == 0x0000
    assert [report.TransactionUID for report in reports] == [ds.TransactionUID]


def status_of(answer: bytes) -> int:
    """The status in a response (PS3.7 E.1)."""
    place = answer.index(b"\0\0\0\x09\2\0\0\0")
    return int.from_bytes(answer[place + 8 : place + 10], "little")
