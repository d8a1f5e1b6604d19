"""The soak: 20,000 images at full speed through a whole daemon, and whether it stays as it was.

`make soak` sends studies of eight small radiographs from five senders as fast as they are analyzed,
to a daemon that sends its results on, and samples the memory, the open files and the threads of
each role, and how many images are analyzed. Memory at the end within a tenth of what it was after
the first 2,000, open files flat, rate flat: else it fails. Writes soak.csv and soak.png.
"""

import argparse
import copy
import csv
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import cv2
import make
import numpy as np
from daemon import Daemon, daemon, resident
from numpy.typing import NDArray
from peers import free_port, need, storescu
from pydicom.dataset import Dataset
from sqlalchemy import func, select

from dicomai.demo.radiographs import set_pixels
from dicomai.store import queries
from dicomai.store.database import Database
from dicomai.store.tables import delivery, instance, study

IMAGES, IN_STUDY, SENDERS = 20_000, 8, 5
WARM = 2000  # images after which the first memory is taken
AHEAD = 12  # studies that may wait to be analyzed: enough to keep the daemon busy
SAMPLE_SECONDS = 2.0
ROLES = ("run", "listen", "infer", "decode", "deliver", "schedule")
MORE_MEMORY, MORE_FILES, SLOWER = 1.10, 3, 0.85
SPARE_BYTES = 3 << 30
SEED = 20261121


@dataclass(frozen=True)
class Sample:
    """One moment. memory: bytes by role, of its processes together."""

    seconds: float
    received: int
    analyzed: int
    delivered: int
    memory: dict[str, int]
    files: dict[str, int]
    threads: dict[str, int]


@dataclass
class Course:
    """All samples of a soak, and what is wrong with them."""

    samples: list[Sample] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    bytes_per_image: float = 0.0

    def between(self, low: float, high: float) -> list[Sample]:
        """Samples taken while that part of all images was analyzed."""
        last = self.samples[-1].analyzed
        return [s for s in self.samples if low * last <= s.analyzed <= high * last]


# Sending


def template(number: int) -> Dataset:
    """A radiograph of 128 x 128 pixels as a CR image."""
    ds = make.computed_radiograph(number)
    whole = np.frombuffer(ds.PixelData, np.uint8).reshape(ds.Rows, ds.Columns)
    set_pixels(ds, np.asarray(cv2.resize(whole, (128, 128)), np.uint8), 8)
    return ds


def write_study(folder: Path, number: int, templates: Sequence[Dataset]) -> list[Path]:
    """Images that nobody has seen before."""
    chance = random.Random(SEED + number)
    datasets = []
    for place in range(IN_STUDY):
        ds = copy.deepcopy(chance.choice(templates))
        ds.PatientID, ds.StudyInstanceUID = f"SOAK{number:06}", f"1.2.826.0.1.3680043.10.1.{number}"
        ds.SeriesInstanceUID = f"{ds.StudyInstanceUID}.1"
        ds.SOPInstanceUID = f"{ds.SeriesInstanceUID}.{place}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.InstanceNumber = place + 1
        noise = np.frombuffer(chance.randbytes(128 * 128), np.uint8) // 32
        ds.PixelData = (np.frombuffer(ds.PixelData, np.uint8) // 2 + noise + 60).tobytes()
        datasets.append(ds)
    return make.save(folder / str(number), datasets)


def send_all(running: Daemon, studies: int, folder: Path, stop: threading.Event) -> None:
    """Five senders, never far ahead of the analysis."""
    templates = [template(number) for number in range(10)]

    def send(number: int) -> None:
        while not stop.is_set() and waiting(running.database) > AHEAD:
            time.sleep(0.2)
        if stop.is_set():
            return
        files = write_study(folder, number, templates)
        storescu(running.port, files)
        shutil.rmtree(files[0].parent)

    with ThreadPoolExecutor(SENDERS) as senders:
        list(senders.map(send, range(1, studies + 1)))


def waiting(database: Database) -> int:
    """Studies that are not analyzed yet."""
    statement = select(func.count()).where(study.c.state.in_(("receiving", "analyzing")))
    with database.read() as connection:
        return connection.execute(statement).scalar_one()


# Sampling


def sample(running: Daemon, started: float) -> Sample:
    """What there is now."""
    memory, files, threads = (dict.fromkeys(ROLES, 0) for _ in range(3))
    for pid in running.processes():
        role = role_of(pid)
        memory[role] += resident(pid)
        with suppress(OSError):  # it has ended
            files[role] += len(list(Path(f"/proc/{pid}/fd").iterdir()))
            threads[role] += len(list(Path(f"/proc/{pid}/task").iterdir()))
    return Sample(time.monotonic() - started, *counts(running.database), memory, files, threads)


def role_of(pid: int) -> str:
    """A role's name from the command line."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return "run"
    if "dicomai.prepare.pool" in arguments:
        return "decode"
    return next((role for role in ROLES if role in arguments), "run")


def counts(database: Database) -> tuple[int, int, int]:
    """Images received, images in analyzed studies, results delivered."""
    with database.read() as connection:
        received = connection.execute(select(func.count()).select_from(instance)).scalar_one()
        closed = select(func.count()).where(study.c.state == "analyzed")
        sent = select(func.count()).where(delivery.c.state == "delivered")
        return (
            received,
            connection.execute(closed).scalar_one() * IN_STUDY,
            connection.execute(sent).scalar_one(),
        )


def observe(running: Daemon, course: Course, images: int, stop: threading.Event) -> None:
    """Sample until all is analyzed and sent; stop where the disk would not do."""
    started = said = time.monotonic()
    while not stop.wait(SAMPLE_SECONDS):
        now = sample(running, started)
        course.samples.append(now)
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{now.seconds:6.0f} s: {now.analyzed} of {images} analyzed, "
                  f"{sum(now.memory.values()) / 1e6:.0f} MB", flush=True)  # fmt: skip
        if not course.bytes_per_image and now.analyzed >= 100:
            course.bytes_per_image = used(running.folder) / now.analyzed
            needed = course.bytes_per_image * images + SPARE_BYTES
            if needed > shutil.disk_usage(running.folder).free:
                course.faults.append(f"needs {needed / 1e9:.1f} GB of disk, which there are not")
                stop.set()
        if now.analyzed >= images and queries.is_idle(running.database):
            return


def used(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# Judging


def judge(course: Course, images: int) -> list[str]:
    """What has grown or slowed down."""
    last = course.samples[-1]
    faults = []
    if last.analyzed < images:
        faults.append(f"only {last.analyzed} of {images} images were analyzed")
    for role, (early, late) in memory_of(course).items():
        if late > early * MORE_MEMORY:
            faults.append(f"memory of {role}: {early / 1e6:.0f} MB, then {late / 1e6:.0f} MB")
    for role, (early, late) in files_of(course).items():
        if late > early + MORE_FILES:
            faults.append(f"open files of {role}: {early:.0f}, then {late:.0f}")
    second, fourth = rate(course, 0.25, 0.5), rate(course, 0.75, 1.0)
    if fourth < second * SLOWER:
        faults.append(f"rate: {second:.2f} images/s in the second quarter, {fourth:.2f} at the end")
    return faults


def memory_of(course: Course) -> dict[str, tuple[float, float]]:
    """Role -> bytes after the first images, bytes at the end; medians."""
    return _ends(course, "memory")


def files_of(course: Course) -> dict[str, tuple[float, float]]:
    """Role -> open files after the first images, and at the end; medians."""
    return _ends(course, "files")


def _ends(course: Course, name: str) -> dict[str, tuple[float, float]]:
    warm = min(0.2, WARM / course.samples[-1].analyzed)
    early, late = course.between(warm, warm + 0.1), course.between(0.9, 1.0)
    return {
        role: (
            median(getattr(s, name)[role] for s in early),
            median(getattr(s, name)[role] for s in late),
        )
        for role in ROLES
    }


def rate(course: Course, low: float, high: float) -> float:
    """Images analyzed a second while that part of them was."""
    part = course.between(low, high)
    return (part[-1].analyzed - part[0].analyzed) / (part[-1].seconds - part[0].seconds)


def summary(course: Course) -> list[str]:
    """The figures."""
    last = course.samples[-1]
    lines = [
        f"{last.analyzed} images, {last.delivered} results in {last.seconds:.0f} s, "
        f"{course.bytes_per_image / 1e3:.0f} kB of disk an image",
        f"{rate(course, 0.25, 0.5):.2f} images/s in the second quarter, "
        f"{rate(course, 0.75, 1.0):.2f} in the last",
    ]
    files = files_of(course)
    for role, (early, late) in memory_of(course).items():
        lines.append(
            f"{role:9} memory {early / 1e6:5.0f} MB -> {late / 1e6:5.0f} MB, "
            f"open files {files[role][0]:.0f} -> {files[role][1]:.0f}, "
            f"threads {last.threads[role]}"
        )
    return lines


# Writing down


def write_csv(course: Course, file: Path) -> None:
    """One line a sample."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        kinds = ("memory_bytes", "open_files", "threads")
        names = [f"{role}_{kind}" for kind in kinds for role in ROLES]
        writer.writerow(["seconds", "received", "analyzed", "delivered", *names])
        for s in course.samples:
            values = [d[role] for d in (s.memory, s.files, s.threads) for role in ROLES]
            writer.writerow([f"{s.seconds:.1f}", s.received, s.analyzed, s.delivered, *values])


COLOURS = [(60, 60, 60), (200, 90, 0), (0, 60, 200), (0, 150, 0), (160, 0, 160), (0, 150, 200)]
WIDTH, HEIGHT, LEFT, TOP = 1200, 300, 90, 40


def write_png(course: Course, file: Path) -> None:
    """Memory, open files and rate over the images analyzed."""
    across = [s.analyzed for s in course.samples]
    memory = {role: [s.memory[role] / 1e6 for s in course.samples] for role in ROLES}
    files = {role: [float(s.files[role]) for s in course.samples] for role in ROLES}
    panels = [
        panel("memory (MB)", across, memory),
        panel("open files", across, files),
        panel("images analyzed a second", across[WINDOW:], {"": rates(course)}),
    ]
    cv2.imwrite(str(file), np.vstack(panels))


WINDOW = 15  # samples of a rate


def rates(course: Course) -> list[float]:
    """Images a second over the last half minute, at each sample."""
    pairs = zip(course.samples, course.samples[WINDOW:], strict=False)
    return [(b.analyzed - a.analyzed) / (b.seconds - a.seconds) for a, b in pairs]


def panel(title: str, across: list[int], lines: dict[str, list[float]]) -> NDArray[np.uint8]:
    """A plot of some lines from zero on."""
    picture = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    highest = max([1.0, *(value for line in lines.values() for value in line)]) * 1.05
    furthest = max([1, *across])
    right, bottom = WIDTH - 150, HEIGHT - 40

    def at(x: float, y: float) -> tuple[int, int]:
        return (
            round(LEFT + x / furthest * (right - LEFT)),
            round(bottom - y / highest * (bottom - TOP)),
        )

    def write(words: str, x: int, y: int, colour: tuple[int, int, int] = (0, 0, 0)) -> None:
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(picture, words, (x, y), font, 0.5, colour, 1, cv2.LINE_AA)

    write(title, LEFT, TOP - 15)
    for part in range(5):
        height = highest * part / 4
        cv2.line(picture, at(0, height), at(furthest, height), (225, 225, 225), 1)
        write(f"{height:.0f}" if highest > 20 else f"{height:.1f}", 20, at(0, height)[1] + 5)
        write(f"{furthest * part // 4}", at(furthest * part / 4, 0)[0] - 15, bottom + 22)
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [at(x, y) for x, y in zip(across, line, strict=False)]
        cv2.polylines(picture, [np.array(points, np.int32)], False, colour, 1, cv2.LINE_AA)
        write(name, right + 15, TOP + 20 * number, colour)
    return picture


# The soak


def soak(folder: Path, url: str, images: int) -> Course:
    """Send, sample, judge."""
    need("/usr/bin/storescp", "/usr/bin/storescu")
    course, stop, port = Course(), threading.Event(), free_port()
    # Takes what it gets and keeps nothing: the disk is for the daemon.
    peer = subprocess.Popen(
        ["/usr/bin/storescp", "--ignore", "-aet", "ARCHIVE", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with daemon(folder, url, free_port(), [("archive", "ARCHIVE", port)], 2.0, 0.2) as running:
            sending = threading.Thread(
                target=send_all, args=(running, images // IN_STUDY, folder / "sent", stop)
            )
            sending.start()
            try:
                observe(running, course, images, stop)
            finally:
                stop.set()
                sending.join()
    finally:
        peer.terminate()
        peer.wait()
    course.faults += judge(course, images)
    return course


def main() -> None:
    """`soak.py [--images N] [--out FOLDER]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dicomai-soak-"))
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"{given.images} images, {folder}", flush=True)
    course = soak(folder, f"sqlite:///{folder}/dicomai.db", given.images)
    write_csv(course, given.out / "soak.csv")
    write_png(course, given.out / "soak.png")
    print("\n".join(summary(course)))
    print(f"{given.out}/soak.csv, {given.out}/soak.png")
    if course.faults:
        sys.exit("\n".join([*course.faults, f"look into {folder}"]))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
