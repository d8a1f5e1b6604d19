"""No patient in any log, any output, any row; nothing readable by anybody else.

One daemon with everything that goes wrong: broken objects, values where they do not belong, a PACS
that quotes the patient's name.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import make
import pytest
from commands import say
from daemon import Daemon, daemon
from leaks import SECRETS, leaks
from peers import free_port, wait_until
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pynetdicom.events import Event
from scp import Peer
from syslogd import Server

from dicomai.deliver import sender
from dicomai.demo.archive import Archive
from dicomai.errors import PeerRefused, PeerUnreachable
from dicomai.store import tables

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("ignore:Unknown encoding:UserWarning"),  # of this process
]

NAME = "Zzyzx^Quentin"
NAMES = {
    "ISO_IR 100": "Ørsåkerström^Bjørné",
    "\\ISO 2022 IR 87": "Yamaquux^Tarouquux=熊谷澤^鶴太郎=くまがいざわ^つるたろう",
    "ISO_IR 192": "Yamaquux^Tarouquux=熊谷澤^鶴太郎",
}
# What a device, or a person at it, may write where it does not belong.
MISPLACED = {
    "WindowCenter": "DS",
    "WindowWidth": "DS",
    "RescaleSlope": "DS",
    "ImagerPixelSpacing": "DS",
    "BodyPartExamined": "CS",
    "ViewPosition": "CS",
    "Modality": "CS",
    "PhotometricInterpretation": "CS",
    "PresentationIntentType": "CS",
    "PatientOrientation": "CS",
    "PatientAge": "AS",
    "StudyDate": "DA",
    "StudyTime": "TM",
    "SeriesNumber": "IS",
    "InstanceNumber": "IS",
    "PatientSex": "CS",
    "TimezoneOffsetFromUTC": "SH",
    "SeriesInstanceUID": "UI",
    "Manufacturer": "US",
}
REFUSALS = {"refuser": 0xC123, "busy": 0xA700, "mild": 0xB006}
AS_IT_STARTS = ("dicomai (", "listening as ", "scoring with ", "sending ", "stopped")


def patient(name: str = NAME, charset: str = "ISO_IR 100", number: int = 0) -> Dataset:
    """A radiograph with everything that could identify somebody."""
    ds = make.chest_radiograph(number)
    ds.SpecificCharacterSet = charset.split("\\")
    ds.PatientName, ds.PatientID = name, "PID-73991-Q"
    ds.OtherPatientIDs, ds.PatientBirthDate = "OTHER-51515", "19310407"
    ds.AccessionNumber, ds.InstitutionName = "ACC55120Q", "Klinik Quuxstadt"
    ds.ReferringPhysicianName, ds.OperatorsName = "Doktorovic^Vladimira", "Operatorix^Olga"
    ds.StudyDescription = ds.SeriesDescription = "Thorax nach Quallenbiss"
    ds.PatientAddress, ds.PatientTelephoneNumbers = "Quittenallee 5", "+49 621 515151"
    ds.PatientComments = f"{name.split('=')[0]}, PID-73991-Q"
    block = ds.private_block(0x0011, "PRIVQ-4711 SYSTEMS", create=True)
    block.add_new(1, "LO", "PRIVQ-4711")
    block.add_new(2, "PN", "Zzyzx^Quentin")
    return ds


def save(folder: Path, ds: Dataset, old: bytes = b"", new: bytes = b"") -> Path:
    """Write an object; bytes that are there once, or once more in the file meta, are replaced."""
    (file,) = make.save(folder, [ds])
    data = file.read_bytes()
    assert not old or data.count(old) in {1, 2}, old
    file.write_bytes(data.replace(old, new, 1) if old else data)
    return file


def misplaced(folder: Path, keyword: str, vr: str) -> Path:
    """An object with a name for a value: written as text, its VR is put right in the file."""
    ds, tag = patient(), Tag(keyword)
    ds[keyword] = DataElement(tag, "LO", NAME)
    head = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")
    return save(folder, ds, head + b"LO", head + vr.encode())


def broken(folder: Path) -> list[Path]:
    """Objects that are damaged, or not what the command says that they are."""
    short, cut, other = patient(), patient(), patient()
    short.PixelData = short.PixelData[:100]
    ended = save(folder, cut)
    data = ended.read_bytes()
    ended.write_bytes(data[: data.index(b"PID-73991-Q") + 4])
    uid = str(other.SOPInstanceUID)
    command_says = uid[:-1] + str((int(uid[-1]) + 1) % 10)
    return [
        ended,
        save(folder, short),
        save(folder, patient(), b"\x10\x00\x10\x00PN", b"\x10\x00\x10\x00SQ"),
        save(folder, patient(), b"\x10\x00\x10\x00PN", b"\x10\x00\x10\x00ZZ"),
        save(folder, patient(), b"\x20\x00\x0d\x00UI", b"\x20\x00\x0d\x00PN"),
        save(folder, patient(), b"CS\x0a\x00ISO_IR 100", b"CS\x0a\x00Zzyzx^Quen"),
        save(folder, other, uid.encode(), command_says.encode()),
    ]


def no_dicom(folder: Path) -> list[Path]:
    """What somebody may give to `try`."""
    folder.mkdir()
    letter = f"Dear Dr. Doktorovic, {NAME}, born 19310407, ".encode() * 20
    contents = {"letter.txt": letter, "empty.dcm": b"", "prefix.dcm": bytes(128) + b"DICM" + letter}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def refusing(status: int) -> Peer:
    """A PACS that says why, and of whom (Error Comment, PS3.7 C)."""

    def answer(_event: Event) -> Dataset:
        said = Dataset()
        said.Status, said.ErrorComment = status, f"{NAME} (PID-73991-Q, 19310407) is not known"
        return said

    return Peer(answer)  # type: ignore[arg-type]


def send(port: int, files: list[Path]) -> list[str]:
    """Each file over an association of its own; the names of those that were not taken."""
    refused = []
    for file in files:
        try:
            with sender.association(
                "127.0.0.1", port, "DICOMAI", "MODALITY", sender.contexts_for([file]), 10
            ) as assoc:
                sender.store(assoc, file)
        except (PeerRefused, PeerUnreachable):
            refused.append(file.name)
    return refused


def rows_of(running: Daemon) -> bytes:
    """Every row of every table."""
    found = []
    with running.database.read() as connection:
        for table in tables.metadata.sorted_tables:
            for row in connection.execute(table.select()).mappings():
                for column, value in row.items():
                    text = value if isinstance(value, bytes) else str(value).encode()
                    found.append(f"\n{table.name}.{column}: ".encode() + text)
    return b"".join(found)


@dataclass
class Journey:
    """What was said, by whom; the modes of what was written."""

    said: dict[str, bytes] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    errors: dict[str, set[str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    """Everything that the tests below look at, with an administrator's usual umask."""
    folder = tmp_path_factory.mktemp("privacy")
    before = os.umask(0o022)
    try:
        yield travel(folder)
    finally:
        os.umask(before)


def travel(folder: Path) -> Journey:
    """Images in, results out, with all that goes wrong."""
    done, archive = Journey(), Archive(folder / "archive")
    sent = folder / "sent"
    names = [patient(), *(patient(name, charset) for charset, name in NAMES.items())]
    good = make.save(sent, names) + [misplaced(sent, *item) for item in MISPLACED.items()]
    bad, others = broken(sent / "broken"), no_dicom(folder / "letters")
    url = f"sqlite:///{folder}/data/dicomai.db"
    with refusing(REFUSALS["refuser"]).listening() as refuser, Server("udp") as syslog:
        with refusing(REFUSALS["busy"]).listening() as busy:
            with refusing(REFUSALS["mild"]).listening() as mild:
                peers = {"refuser": refuser, "busy": busy, "mild": mild}
                destinations = [(name, "PACS", peer.port) for name, peer in peers.items()]
                destinations.append(("archive", "ARCHIVE", archive.port))
                with daemon(
                    folder,
                    url,
                    free_port(),
                    destinations,
                    quiet=0.5,
                    more=f'[audit]\nsyslog = "{syslog.address}"',
                    outputs=("sr", "not-analyzed"),
                ) as running:
                    done.refused = send(running.port, [*good, *bad])
                    finish(running, len(good))
                    look(done, running, [*good[:2], *bad[:2], *others])
                    done.said["syslog"] = b"\n".join(message for _, message in syslog.messages)
    archive.close()
    done.said["log"] = (folder / "daemon.log").read_bytes()
    return done


def finish(running: Daemon, least: int) -> None:
    """Until all is analyzed, and each destination has said what it says."""

    def done() -> bool:
        rows = running.studies()
        return len(rows) >= least and not any(
            row["state"] in {"receiving", "analyzing"} for row in rows
        )

    wait_until(done, 120, "all studies are closed")

    def answered() -> bool:
        with running.database.read() as connection:
            rows = connection.execute(tables.delivery.select()).all()
        return bool(rows) and all(
            row.state in {"delivered", "failed"} or row.last_error or row.destination == "busy"
            for row in rows
        )

    wait_until(answered, 120, "every destination has answered")


def look(done: Journey, running: Daemon, files: list[Path]) -> None:
    """What commands say, what the rows hold, who may read the files."""
    studies = [str(row["study_instance_uid"]) for row in running.studies()]
    data, out = running.folder / "data", running.folder / "tried"
    tried = ["try", *map(str, files), "--out", str(out), "--render", str(out / "frames")]
    looks = [
        *(["study", "show", uid] for uid in studies),
        ["study", "list", "--format", "json", "--limit", "1000"],
        ["study", "retry", studies[0]],
        ["results", "--format", "csv"],
        ["delivery", "list", "--format", "json", "--limit", "1000"],
        ["delivery", "retry"],
        ["audit", "list", "--format", "json", "--limit", "1000"],
        ["db", "backup", str(data / "backup.db")],
        ["doctor", "--deep"],
        ["config", "show"],
        [*tried, "--format", "json"],
    ]
    done.said["commands"] = say(running.config, looks)
    say(running.config, [["study", "retry", NAME]])  # whoever typed it may see it, no row may
    done.said["rows"] = rows_of(running)
    done.reasons = [str(row["reason"]) for row in running.studies() if row["reason"]]
    with running.database.read() as connection:
        for row in connection.execute(tables.delivery.select()):
            done.errors.setdefault(row.destination, set()).add(str(row.last_error))
    for top in (data, out):
        for path in [top, *top.rglob("*")]:
            with suppress(FileNotFoundError):  # a temporary file that has got its name
                done.modes[str(path.relative_to(running.folder))] = path.stat().st_mode


@pytest.mark.parametrize("who", ["log", "commands", "rows", "syslog"])
def test_nothing_that_is_said_names_the_patient(journey: Journey, who: str) -> None:
    assert len(journey.said[who]) > 1000
    assert leaks(journey.said[who]) == []


def test_everything_has_gone_wrong_that_was_to_go_wrong(journey: Journey) -> None:
    """Without this, the tests above would look at nothing."""
    log, commands = journey.said["log"].decode(), journey.said["commands"].decode()
    assert len(journey.refused) >= 3
    assert '"refused"' in log
    for name, status in REFUSALS.items():
        assert any(f"0x{status:04X}" in error for error in journey.errors[name]), name
    assert "truncated" in commands
    assert "not a DICOM file" in commands
    assert commands.count(">>> study show") >= 20
    assert journey.errors["archive"] == {"None"}


def test_each_line_of_the_log_is_json_but_for_the_greeting(journey: Journey) -> None:
    lines = journey.said["log"].decode().splitlines()
    for line in lines:
        assert line.startswith(AS_IT_STARTS) or isinstance(json.loads(line), dict), line
    said = [json.loads(line) for line in lines if line.startswith("{")]
    assert {line["role"] for line in said} == {"run", "listen", "infer", "deliver", "schedule"}
    events = [line["event"] for line in said]
    assert events.count("analyzed") >= 10
    assert "uncaught" not in events
    assert "unraisable" not in events


def test_all_that_is_written_is_for_this_user_alone(journey: Journey) -> None:
    open_to_others = {
        name: oct(mode & 0o777) for name, mode in journey.modes.items() if mode & 0o077
    }
    assert open_to_others == {}
    kinds = {Path(name).parts[1] for name in journey.modes if len(Path(name).parts) > 1}
    assert {"inbox", "results", "backup.db", "frames"} < kinds
    assert {"dicomai.db", "dicomai.db-wal", "dicomai.db-shm"} < kinds
    assert {name.rsplit(".", 1)[-1] for name in journey.modes} >= {"dcm", "png", "db"}


@pytest.mark.parametrize("secret", SECRETS)
def test_a_leak_is_found_in_whatever_form(secret: str) -> None:
    raw = secret.encode()
    shown = [
        f"the patient {secret.upper()} is unknown",
        f"... {raw.hex()} ...",
        json.dumps({"x": f"name {secret}"}),
        repr(raw),
        re.sub("(..)", r"%\1", raw.hex()),
    ]
    found = {text: leaks(text.encode()) for text in shown}
    assert [text for text, leaked in found.items() if not leaked] == []
    assert leaks(b"a study of 2026-11-21 with 3 findings, 1.2.826.0.1.3680043.8.498") == []


HOOKS = """
import logging, sys, threading, warnings
from dicomai import logs
if sys.argv[1] != "command":
    logs.configure("test")
name = "Zzyzx^" + "Quentin"
class Gone:
    def __del__(self):
        raise ValueError(name)
def fail():
    raise ValueError(name)
match sys.argv[1]:
    case "main": fail()
    case "thread":
        thread = threading.Thread(target=fail); thread.start(); thread.join()
    case "finalizer": del (gone := [Gone()])[0]
    case "library": logging.getLogger("some.library").error("cannot read %s", name)
    case "warning": warnings.warn(name)
    case "command":
        from dicomai import cli
        cli.app.command()(fail)
        sys.argv = ["dicomai", "fail"]
        cli.main()
"""
KINDS = {
    "main": "uncaught",
    "thread": "uncaught",
    "finalizer": "unraisable",
    "library": "library",
    "command": "uncaught",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_caught_is_one_line_with_type_and_place(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOOKS, kind], capture_output=True, text=True, check=False
    )

    assert leaks((done.stdout + done.stderr).encode()) == []
    (line,) = done.stderr.splitlines()
    said = json.loads(line)
    assert said["event"] == KINDS[kind]
    if kind == "library":
        assert said["library"] == "some.library"
        assert said["logged_at"].startswith("<string>:")
    else:
        assert said["exception"] == "ValueError"
        assert said["raised_at"][-1].startswith("<string>:")
    assert (done.returncode == 0) == (kind in {"thread", "finalizer", "library"})


def test_a_warning_is_not_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOOKS, "warning"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
