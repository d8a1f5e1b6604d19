"""Real files, damaged: every one gets a result or a reason, and the daemon lives.

`make mutants` runs 5,000 of them, seed fixed, through the decoding processes (every frame rendered)
and through a whole daemon with a model that accepts everything. test_mutants.py runs a few.
"""

import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pydicom
import torch
from daemon import Daemon, Memory, daemon, resident
from images import entries
from peers import free_port, shared
from pynetdicom import _config
from safetensors.torch import save_file

from dicomai.deliver import sender
from dicomai.errors import PeerRefused, PeerUnreachable, Rejected
from dicomai.infer.network import build
from dicomai.prepare import image
from dicomai.prepare.pool import Pool
from dicomai.store import queries
from dicomai.study import Limits

SEED = 20261121
LIMITS = Limits(max_pixels=64_000_000, max_bytes=1 << 30, max_frames=2000)
TIMEOUT_SECONDS, MEMORY_MEGABYTES = 20.0, 1024
META_END = 400  # file meta information lies before, as a rule

# Attributes that decide how much memory is taken and how cells are read, little endian tags.
DECISIVE = [
    bytes.fromhex(tag)
    for tag in (
        "28000200", "28000400", "28000600", "28000800", "28001000", "28001100", "28000001",
        "28000101", "28000201", "28000301", "28002001", "28002101", "28005010", "28005110",
        "28005210", "28005310", "28000030", "28001030", "28000230", "28000630", "28000111",
        "e07f1000",
    )
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged copy of a real file."""

    number: int
    source: str
    how: str
    data: bytes


def flip(data: bytearray, chance: random.Random, low: int, high: int) -> None:
    """Change 1 to 40 bytes."""
    for _ in range(chance.choice([1, 2, 5, 40])):
        data[chance.randrange(low, high)] = chance.randrange(256)


def flip_header(data: bytearray, chance: random.Random) -> None:
    """Before the pixels."""
    pixels = data.rfind(b"\xe0\x7f\x10\x00")
    flip(data, chance, min(META_END, len(data) - 1), pixels if pixels > META_END else len(data))


def flip_pixels(data: bytearray, chance: random.Random) -> None:
    """In the pixels, the code streams' own headers included."""
    pixels = data.rfind(b"\xe0\x7f\x10\x00")
    low = pixels if META_END < pixels < len(data) - 1 else min(META_END, len(data) - 1)
    high = chance.choice([len(data), min(len(data), low + 200)])
    flip(data, chance, low, high)


def flip_anywhere(data: bytearray, chance: random.Random) -> None:
    """File meta information too."""
    flip(data, chance, 0, len(data))


def cut(data: bytearray, chance: random.Random) -> None:
    """A transfer that broke off."""
    del data[chance.randrange(len(data)) :]


def insert(data: bytearray, chance: random.Random) -> None:
    """Bytes too many."""
    place = chance.randrange(len(data))
    data[place:place] = chance.randbytes(chance.choice([1, 2, 8, 1000]))


def repeat(data: bytearray, chance: random.Random) -> None:
    """A part that comes twice, or a hundred times."""
    start = chance.randrange(len(data))
    part = data[start : start + chance.randrange(1, 2000)]
    data[start:start] = part * chance.choice([1, 3, 100])


def blank(data: bytearray, chance: random.Random) -> None:
    """A sector that could not be read."""
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice([8, 512, 4096]))
    data[start:end] = bytes([chance.choice([0, 255])]) * (end - start)


def lie(data: bytearray, chance: random.Random) -> None:
    """An attribute of the image that says something else, or is longer or shorter than it was."""
    places = [match for tag in DECISIVE if (match := data.rfind(tag)) > 0]
    if not places:
        return flip_header(data, chance)
    for place in chance.sample(places, min(len(places), chance.choice([1, 1, 2, 4]))):
        where = place + chance.choice([4, 6, 8, 8, 8, 8])
        value = chance.choice(
            [b"\0\0", b"\xff\xff", b"\x01\0", b"\x08\0", b"\x10\0", b"\x20\0", chance.randbytes(2)]
        )
        data[where : where + 2] = value
    return None


WAYS: list[Callable[[bytearray, random.Random], None]] = [
    flip_header, flip_header, flip_pixels, flip_pixels, flip_anywhere, cut, insert, repeat, blank,
    lie, lie, lie,
]  # fmt: skip


def mutants(root: Path, count: int, seed: int = SEED) -> Iterator[Mutant]:
    """Damaged copies of the files of root/manifest.csv in turn; each has UIDs of its own."""
    files = [entry["file"] for entry in entries(root)]
    chance = random.Random(seed)
    order = chance.sample(files, len(files))
    for number in range(count):
        source = order[number % len(order)]
        data = bytearray(identified((root / source).read_bytes(), number))
        way = chance.choice(WAYS)
        way(data, chance)
        yield Mutant(number, source, way.__name__, bytes(data))


def identified(data: bytes, number: int) -> bytes:
    """Another SOP and Study Instance UID, of the same length, in place."""
    for tag in (b"\x08\x00\x18\x00", b"\x20\x00\x0d\x00", b"\x00\x08\x00\x18", b"\x00\x20\x00\x0d"):
        found = re.search(re.escape(tag) + rb"(?:UI)?..?.?.?([0-9.]{10,64})", data, re.DOTALL)
        if found:
            old = found[1]
            data = data.replace(old, old[:-7] + b"%07d" % (1_000_000 + number))
    return data


# Through the decoding processes


def render_all(root: Path, count: int, report: Callable[[str], None]) -> Counter[str]:
    """Render every frame of every mutant; the outcomes, "rendered" or the code of the reason."""
    outcomes: Counter[str] = Counter()
    slowest = peak = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        Pool(2, TIMEOUT_SECONDS, MEMORY_MEGABYTES) as pool,
    ):
        stream = mutants(root, count)
        while batch := list(islice(stream, 20)):
            files = []
            for mutant in batch:
                file = Path(folder) / f"{mutant.number}.dcm"
                file.write_bytes(mutant.data)
                files.append(file)
            started = time.perf_counter()
            calls = [(file, file.with_suffix(""), LIMITS) for file in files]
            for mutant, done in zip(batch, pool.map(image.render, calls), strict=True):
                outcome = done.code if isinstance(done, Rejected) else "rendered"
                if isinstance(done, list) and not any(frame.path for frame in done):
                    outcome = "no frame"
                    assert done[0].reason, mutant
                outcomes[outcome] += 1
                if outcome in {"decoder-crashed", "decoder-hung"}:
                    report(f"{outcome}: {mutant.number} {mutant.source} {mutant.how}")
            slowest = max(slowest, time.perf_counter() - started)
            peak = max(peak, sum(map(resident, pool.process_ids())))
            for left in Path(folder).iterdir():
                left.unlink()
    report(f"slowest 20 files {slowest:.1f} s, peak of both processes {peak / 1e6:.0f} MB")
    return outcomes


# Through a daemon


MODEL = """\
name = "anything"
version = "1"
architecture = "resnet50"
channels = 1
activation = "sigmoid"
sha256 = "{sha256}"
[accepts]
modalities = []
sop_classes = []
body_parts = []
views = []
photometric = []
presentation_intents = []
localizers = true
age_years = [0, 130]
min_size = 1
frames = "middle"
[preprocessing]
size = 32
resize = "letterbox"
value_range = [0.0, 1.0]
mean = [0.5]
std = [0.25]
[[labels]]
key = "pneumonia"
threshold = 0.5
code = ["233604007", "SCT", "Pneumonia"]
[provenance]
"""


def permissive_model(models: Path) -> None:
    """A package that accepts every image; its weights are random, its scores mean nothing."""
    import hashlib

    folder = models / "anything" / "1"
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    weights = build("resnet50", 1, 1).state_dict()
    save_file({key: value.half().contiguous() for key, value in weights.items()},
              folder / "weights.safetensors")  # fmt: skip
    sha256 = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "model.toml").write_text(MODEL.format(sha256=sha256))


@dataclass
class Fate:
    """What became of the mutants that were sent."""

    answers: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    kept: set[str] = field(default_factory=set)
    unexplained: list[str] = field(default_factory=list)
    died: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0


def send_all(root: Path, count: int, folder: Path) -> Fate:
    """C-STORE every mutant that can be sent to a daemon, and wait until it has dealt with all."""
    fate = Fate()
    permissive_model(folder / "data" / "models")
    url = f"sqlite:///{folder}/dicomai.db"
    started = time.monotonic()
    with daemon(folder, url, free_port(), quiet=1.0, release_quiet=0.2, more=SETTINGS) as running:
        with Memory(running) as memory:
            for mutant in mutants(root, count):
                answer, uid = send(running, mutant, folder)
                fate.answers[answer] += 1
                if answer == "stored":
                    fate.kept.add(uid)
            fate.states.update(row["state"] for row in settled(running))
        fate.peak_bytes = memory.peak
        fate.died = running.log.count('"event": "died"')
        explain(running, fate)
    fate.seconds = time.monotonic() - started
    return fate


SETTINGS = """
[infer]
model = "anything"
[prepare]
timeout_seconds = 20.0
"""


def send(running: Daemon, mutant: Mutant, folder: Path) -> tuple[str, str]:
    """One mutant over an association of its own: the answer, and the SOP Instance UID."""
    file = folder / "mutant.dcm"
    file.write_bytes(mutant.data)
    try:
        meta = pydicom.filereader.read_file_meta_info(file)
        kind, uid = str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID)
        uids = (kind, uid, str(meta.TransferSyntaxUID))
        if not all(re.fullmatch("[0-9.]{1,64}", value) for value in uids):
            return "not sendable", ""
        contexts = sender.contexts_for([file])
        with sender.association(
            "127.0.0.1", running.port, "DICOMAI", "MUTANT", contexts, 20
        ) as assoc:
            sender.store(assoc, file)
    except PeerRefused as error:
        return f"refused {re.findall('0x....', str(error)) or ['no context']}", ""
    except PeerUnreachable as error:
        # It has to be the mutant's fault, not the daemon's end.
        assert running.process.poll() is None, running.log
        return f"no answer: {error}", ""
    except Exception as error:  # noqa: BLE001 - what the sender cannot send is not our subject
        return f"not sendable ({type(error).__name__})", ""
    return "stored", uid


def settled(running: Daemon) -> list[dict[str, object]]:
    """All studies, once nothing is due."""
    deadline = time.monotonic() + 3600
    while time.monotonic() < deadline:
        rows = running.studies()
        if all(r["state"] in {"analyzed", "skipped", "failed"} for r in rows):
            return rows
        time.sleep(0.5)
    raise AssertionError("studies are left over")


def explain(running: Daemon, fate: Fate) -> None:
    """Every stored object has a finding, a reason, or is kept only."""
    found = {
        row["sop_instance_uid"]
        for row in queries.findings(running.database, queries.FindingFilter())
    }
    known = set()
    for study in running.studies():
        for item in queries.instances(running.database, str(study["study_instance_uid"])):
            uid = item["sop_instance_uid"]
            known.add(uid)
            if uid in found:
                fate.reasons["finding"] += 1
            elif not item["analyzable"]:
                fate.reasons["kept only"] += 1
            elif item["exclusion_code"]:
                fate.reasons[str(item["exclusion_code"])] += 1
            elif study["state"] == "failed" and study["reason"]:
                fate.reasons[f"study failed: {study['reason']}"] += 1
            else:
                fate.unexplained.append(f"{uid}: {study['state']}")
    fate.unexplained += [f"{uid}: no row" for uid in fate.kept - known]


def main() -> None:
    """`mutants.py [COUNT]`."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    root = shared() / "data/dicom"
    started = time.monotonic()
    outcomes = render_all(root, count, lambda words: print("  ", words, flush=True))
    print(f"rendered: {sum(outcomes.values())} files in {time.monotonic() - started:.0f} s")
    for code, number in outcomes.most_common():
        print(f"  {number:5} {code}")
    folder = Path(tempfile.mkdtemp())
    fate = send_all(root, count, folder)
    print(f"sent: {fate.seconds:.0f} s, peak {fate.peak_bytes / 1e6:.0f} MB, died {fate.died}")
    for title in ("answers", "states", "reasons"):
        print(f" {title}")
        for code, number in getattr(fate, title).most_common():
            print(f"  {number:5} {code}")
    print(f" without a result or a reason: {fate.unexplained or 'none'}")
    if fate.unexplained or fate.died:
        sys.exit(f"look into {folder}")
    shutil.rmtree(folder)


_config.STORE_SEND_CHUNKED_DATASET = True  # bytes as they are, not parsed and written again

if __name__ == "__main__":
    main()
