"""Real byte streams of real senders, damaged: the listener answers or aborts, and lives.

`make fuzz` sends 100,000 of them, seed fixed, to `dicomai listen`; test_fuzz.py sends a few.
"""

import json
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import doors
import make
import numpy as np
from daemon import command, resident
from peers import free_port, storescu, wait_until
from sqlalchemy import select

from dicomai.demo.radiographs import set_pixels
from dicomai.store.database import Database, open_database
from dicomai.store.tables import instance

SEED = 20261122
MUTANTS = 100_000
SENDERS = 4
PATIENCE_SECONDS = 30.0  # for the listener's last word; more is a hang
SETTINGS = """\
data_dir = "{folder}/data"
[database]
url = "{url}"
[receive]
host = "127.0.0.1"
port = {port}
idle_seconds = 10.0
max_megabytes = 4
min_free_megabytes = 0
quiet_seconds = 86400.0
release_quiet_seconds = 86400.0
"""

Stream = list[bytes]  # PDUs


# What is damaged


def recordings(port: int, folder: Path) -> list[Stream]:
    """What DCMTK sends: an echo, small and large objects, several, an abort."""
    small = make.computed_radiograph()
    set_pixels(small, np.arange(40 * 32, dtype=np.uint8).reshape(40, 32), 8)
    study = str(small.StudyInstanceUID)
    report = make.report(study)
    small_file, report_file = make.save(folder, [small, report])
    (large_file,) = make.save(folder, [make.chest_radiograph(1)])
    return [
        doors.record(port, "echoscu"),
        doors.record(port, "echoscu", "--propose-ts", "3", "--repeat", "3"),
        doors.record(port, "storescu", "-R", small_file),
        doors.record(port, "storescu", small_file),  # with every context that DCMTK knows
        doors.record(port, "storescu", "-R", "--max-send-pdu", "4096", small_file, report_file),
        doors.record(port, "storescu", "-R", "--abort", report_file),
        doors.record(port, "storescu", "-R", large_file),
    ]


WEIGHTS = [2, 2, 8, 2, 8, 4, 1]  # of the recordings: the large one takes longest


# How


def flip(data: bytearray, chance: random.Random) -> None:
    """Change some bits."""
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def overwrite(data: bytearray, chance: random.Random) -> None:
    """Some bytes in a row that are something else."""
    start = chance.randrange(len(data) + 1)
    size = chance.choice([1, 2, 4, 16, 100])
    data[start : start + size] = chance.choice(
        [bytes(size), b"\xff" * size, chance.randbytes(size)]
    )


def insert(data: bytearray, chance: random.Random) -> None:
    """Bytes too many."""
    start = chance.randrange(len(data) + 1)
    data[start:start] = chance.randbytes(chance.choice([1, 2, 4, 100, 5000]))


def cut_out(data: bytearray, chance: random.Random) -> None:
    """Bytes too few."""
    start = chance.randrange(len(data) + 1)
    del data[start : start + chance.choice([1, 2, 4, 100, 100_000])]


def lie_about_length(data: bytearray, chance: random.Random) -> None:
    """A number of two or four bytes, of either order, that is extreme."""
    form = chance.choice([">H", ">I", "<H", "<I"])
    if len(data) < 8:
        return
    place = chance.randrange(len(data) - 4)
    top = 0xFFFF if form[1] == "H" else 0xFFFFFFFF
    near = struct.unpack_from(form, data, place)[0] + chance.choice([-2, -1, 1, 2, 256])
    value = chance.choice([0, 1, top, top - 1, top // 2, near % (top + 1)])
    struct.pack_into(form, data, place, value)


BYTES: list[Callable[[bytearray, random.Random], None]] = [
    flip, flip, overwrite, insert, cut_out, lie_about_length, lie_about_length,
]  # fmt: skip


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one kind of damage, or two."""
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2])):
        chance.choice(BYTES)(found, chance)
    return bytes(found)


def anywhere(stream: Stream, chance: random.Random) -> Stream:
    """In the byte stream, framing or not."""
    return [damaged(b"".join(stream), chance)]


def request(stream: Stream, chance: random.Random) -> Stream:
    """In the request, whose length stays right."""
    return [doors.pdu(doors.ASSOCIATE_RQ, damaged(stream[0][6:], chance)), *stream[1:]]


def one_pdu(stream: Stream, chance: random.Random) -> Stream:
    """In one PDU after the request, whose length stays right."""
    place = chance.randrange(1, len(stream))
    changed = doors.pdu(stream[place][0], damaged(stream[place][6:], chance))
    return [*stream[:place], changed, *stream[place + 1 :]]


def content(stream: Stream, chance: random.Random) -> Stream:
    """In a command set or a piece of a dataset, in whole PDUs with whole fragments."""
    places = [place for place, pdu in enumerate(stream) if pdu[0] == doors.DATA]
    place = chance.choice(places)
    context_id, control, fragment = stream[place][10], stream[place][11], stream[place][12:]
    changed = doors.data_pdu(context_id, control, damaged(fragment, chance))
    return [*stream[:place], changed, *stream[place + 1 :]]


def head(stream: Stream, chance: random.Random) -> Stream:
    """The type or the length of a PDU."""
    place = chance.randrange(len(stream))
    pdu = bytearray(stream[place])
    if chance.random() < 0.4:
        pdu[0] = chance.choice([*range(12), 255])
    else:
        length = len(pdu) - 6
        size = chance.choice([0, 1, length - 1, length + 1, 1 << 20, (1 << 20) + 7, 0xFFFFFFFF])
        pdu[2:6] = struct.pack(">I", max(size, 0))
    return [*stream[:place], bytes(pdu), *stream[place + 1 :]]


def fragment(stream: Stream, chance: random.Random) -> Stream:
    """The length, the context or the control header of a fragment."""
    places = [place for place, pdu in enumerate(stream) if pdu[0] == doors.DATA]
    place = chance.choice(places)
    pdu = bytearray(stream[place])
    where = chance.choice(["length", "context", "control"])
    if where == "length":
        pdu[6:10] = struct.pack(">I", chance.choice([0, 1, 2, 0xFFFFFFFF, len(pdu) - 11]))
    else:
        pdu[10 if where == "context" else 11] = chance.randrange(256)
    return [*stream[:place], bytes(pdu), *stream[place + 1 :]]


def order(stream: Stream, chance: random.Random) -> Stream:
    """PDUs twice, missing, or in another order."""
    found = list(stream)
    for _ in range(chance.choice([1, 1, 2, 4])):
        place = chance.randrange(len(found))
        match chance.choice(["twice", "missing", "swapped", "first"]):
            case "twice":
                found.insert(place, found[place])
            case "missing" if len(found) > 1:
                del found[place]
            case "swapped":
                other = chance.randrange(len(found))
                found[place], found[other] = found[other], found[place]
            case _:
                found.insert(chance.choice([0, 1]), found.pop(place))
    return found


def refragmented(stream: Stream, chance: random.Random) -> Stream:
    """Nothing wrong, but in small pieces, some of them several to a PDU."""
    found: Stream = []
    for pdu in stream:
        if pdu[0] != doors.DATA:
            found.append(pdu)
            continue
        size = max(chance.choice([1, 7, 100, 1000]), len(pdu) // 500)
        body = pdu[12:]
        pieces = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
        for number, piece in enumerate(pieces):
            control = pdu[11] & (1 if number < len(pieces) - 1 else 3)
            made = struct.pack(">IBB", len(piece) + 2, pdu[10], control) + piece
            if found[-1][0] == doors.DATA and chance.random() < 0.5:
                found[-1] = doors.pdu(doors.DATA, found[-1][6:] + made)
            else:
                found.append(doors.pdu(doors.DATA, made))
    return found


def half(stream: Stream, chance: random.Random) -> Stream:
    """Something is missing at the end."""
    data = b"".join(stream)
    return [data[: chance.randrange(1, len(data))]]


WAYS: list[Callable[[Stream, random.Random], Stream]] = [
    anywhere, request, request, one_pdu, content, content, content, head, fragment, order,
    refragmented, half,
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """What is sent over one connection; reset: it ends with a reset, else by closing."""

    how: str
    data: bytes
    reset: bool


def mutant(number: int, streams: list[Stream]) -> Mutant:
    """Always the same one for a number."""
    chance = random.Random(f"{SEED}/{number}")  # whichever thread sends it
    stream = chance.choices(streams, WEIGHTS)[0]
    way = chance.choice(WAYS)
    found = way(stream, chance)
    if chance.random() < 0.1:
        found = chance.choice(WAYS[:1])(found, chance)
    return Mutant(way.__name__, b"".join(found), chance.random() < 0.05)


# The listener


@dataclass(frozen=True)
class Site:
    """A listener in a process of its own."""

    port: int
    folder: Path
    database: Database
    process: "subprocess.Popen[bytes]"

    def size(self) -> tuple[int, int, int]:
        """Resident bytes, open files, threads."""
        at = Path(f"/proc/{self.process.pid}")
        files, threads = (sum(1 for _ in (at / name).iterdir()) for name in ("fd", "task"))
        return resident(self.process.pid), files, threads

    def lines(self) -> list[str]:
        """What it has written so far."""
        return (self.folder / "listen.log").read_text().splitlines()

    def rows(self) -> set[str]:
        """The files that the database knows."""
        with self.database.read() as connection:
            return set(connection.execute(select(instance.c.path)).scalars())

    def files(self) -> set[str]:
        """The files of the inbox, temporary ones included."""
        data = self.folder / "data"
        return {str(f.relative_to(data)) for f in doors.files_of(data / "inbox")}


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """`dicomai listen` with SQLite."""
    folder.mkdir(parents=True, exist_ok=True)
    config, port = folder / "dicomai.toml", free_port()
    url = f"sqlite:///{folder}/dicomai.db"
    config.write_text(SETTINGS.format(folder=folder, url=url, port=port))
    (folder / "data").mkdir(exist_ok=True)
    done = command(config, "db", "upgrade")
    assert done.returncode == 0, done.stderr
    with (folder / "listen.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dicomai", "listen", "--config", str(config)],
            stdout=log,
            stderr=log,
        )
    found = Site(port, folder, open_database(url), process)
    try:
        wait_until(lambda: doors.is_served(port), 60, "the listener answers")
        yield found
    finally:
        process.terminate()
        process.wait(15)
        found.database.engine.dispose()


# The conversation


def send(port: int, item: Mutant) -> str:
    """What the listener's last word was: a PDU's type, "nothing", or "hung"."""
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS) as connection:
            return _converse(connection, item)
    except TimeoutError:
        return "hung"
    except OSError:
        return "reset"


def _converse(connection: socket.socket, item: Mutant) -> str:
    answers = bytearray()
    reader = threading.Thread(target=_collect, args=(connection, answers), daemon=True)
    reader.start()
    with suppress(ConnectionError):
        connection.sendall(item.data)
        connection.shutdown(socket.SHUT_RD if item.reset else socket.SHUT_WR)
    # Before the descriptor is closed, and may be another connection's.
    reader.join(PATIENCE_SECONDS)
    if reader.is_alive():
        return "hung"
    if item.reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return "we reset"
    pdus = doors.split(bytes(answers))
    return NAMES.get(pdus[-1][0], "rubbish") if pdus else "nothing"


NAMES = {
    doors.ASSOCIATE_AC: "accepted",
    doors.ASSOCIATE_RJ: "rejected",
    doors.DATA: "answered",
    doors.RELEASE_RP: "released",
    doors.ABORT: "aborted",
}


def _collect(connection: socket.socket, answers: bytearray) -> None:
    with suppress(OSError):
        while received := connection.recv(1 << 16):
            answers += received


# The run


@dataclass
class Outcome:
    """What became of the mutants; sizes: (mutants sent, resident bytes, open files, threads)."""

    ends: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int, int, int]] = field(default_factory=list)
    unstructured: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)
    good: int = 0
    stored: int = 0
    without_row: int = 0
    without_file: int = 0
    seconds: float = 0.0

    def growth(self) -> float:
        """Resident memory at the end over that after a tenth."""
        return self.sizes[-1][1] / self.sizes[0][1]

    def flat(self) -> bool:
        """Whether open files and threads are as they were after a tenth."""
        return all(self.sizes[-1][index] <= self.sizes[0][index] + 2 for index in (2, 3))


def run(folder: Path, count: int, report: Callable[[str], None]) -> Outcome:
    """Send so many mutants, and a good object after each tenth of them."""
    outcome = Outcome()
    begun = time.monotonic()
    with site(folder) as here:
        streams = recordings(here.port, folder / "sent")
        for tenth in range(10):
            numbers = range(count * tenth // 10, count * (tenth + 1) // 10)
            _send_all(here, numbers, streams, outcome)
            assert here.process.poll() is None, here.lines()[-20:]
            _send_good(here, outcome)
            outcome.sizes.append((numbers.stop, *_settled(here)))
            done = outcome.sizes[-1]
            report(
                f"{done[0]} mutants, {time.monotonic() - begun:.0f} s: {done[1] / 1e6:.0f} MB, "
                f"{done[2]} files, {done[3]} threads; {dict(outcome.ends.most_common())}"
            )
        rows, files = here.rows(), here.files()
        outcome.stored = len(rows)
        outcome.without_row, outcome.without_file = len(files - rows), len(rows - files)
    _read_log(here, outcome)
    outcome.seconds = time.monotonic() - begun
    return outcome


def _send_all(here: Site, numbers: range, streams: list[Stream], outcome: Outcome) -> None:
    def one(number: int) -> tuple[str, str]:
        item = mutant(number, streams)
        return item.how, send(here.port, item)

    with ThreadPoolExecutor(SENDERS) as pool:
        for how, end in pool.map(one, numbers):
            outcome.ends[end] += 1
            outcome.ways[f"{how}: {end}"] += 1


def _send_good(here: Site, outcome: Outcome) -> None:
    ds = make.chest_radiograph(2)
    storescu(here.port, make.save(here.folder / "good", [ds]))
    assert any(str(ds.SOPInstanceUID) in path for path in here.rows())
    outcome.good += 1


def _settled(here: Site) -> tuple[int, int, int]:
    """Its size when the last connections have ended."""
    deadline = time.monotonic() + 5
    before: Any = None
    while time.monotonic() < deadline:
        now = here.size()
        if before is not None and now[1:] == before[1:]:
            return now
        before = now
        time.sleep(0.5)
    return here.size()


def _read_log(here: Site, outcome: Outcome) -> None:
    for line in here.lines():
        try:
            event = json.loads(line)
        except ValueError:
            outcome.unstructured.append(line)
            continue
        what = event.get("kind") or event.get("error") or event.get("reason") or ""
        outcome.events[f"{event['event']} {what}".strip()] += 1
        if event.get("kind") == "too-slow":
            outcome.slow.append(line)
        if "exception" in event:
            outcome.exceptions.append(line)


def summary(outcome: Outcome) -> str:
    """One line."""
    _, resident_first, files_first, threads_first = outcome.sizes[0]
    _, resident_last, files_last, threads_last = outcome.sizes[-1]
    return (
        f"{sum(outcome.ends.values())} mutants in {outcome.seconds:.0f} s, "
        f"{outcome.ends['hung']} hung, {outcome.good} of 10 good objects stored between; "
        f"memory {resident_first / 1e6:.1f} -> {resident_last / 1e6:.1f} MB, "
        f"files {files_first} -> {files_last}, threads {threads_first} -> {threads_last}; "
        f"{outcome.stored} objects kept, {outcome.without_row} files without row, "
        f"{outcome.without_file} rows without file; {len(outcome.exceptions)} exceptions, "
        f"{len(outcome.unstructured)} lines that are no event"
    )


def main() -> None:
    """All of them."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else MUTANTS
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Path(folder) / "site", count, lambda line: print(line, flush=True))
    for name, found in (("ends", outcome.ends), ("events", outcome.events)):
        print(f"{name}: {dict(found.most_common())}")
    for line in sorted(outcome.ways):
        print(f"  {line}: {outcome.ways[line]}")
    for line in [*outcome.slow[:5], *outcome.exceptions[:5], *outcome.unstructured[:5]]:
        print(line)
    print(summary(outcome))
    good = outcome.growth() < 1.1 and outcome.flat() and outcome.ends["hung"] == 0
    clean = not (outcome.exceptions or outcome.unstructured)
    whole = outcome.without_row == outcome.without_file == 0
    sys.exit(0 if good and clean and whole else 1)


if __name__ == "__main__":
    main()
