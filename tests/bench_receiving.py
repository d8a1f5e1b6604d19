"""How fast images are received, beside the peers: DCMTK, Orthanc, plain pynetdicom, a bare loop.

Every receiver gets the same files from `storescu`, an association each, in turn, several times.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import make
import numpy as np
from daemon import SETTINGS, command
from peers import Orthanc, free_port, wait_until
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid

from dicomai.deliver import sender
from dicomai.demo.radiographs import set_pixels
from dicomai.errors import DicomaiError

FAST = {**os.environ, "TCP_NODELAY": "1"}
PLAIN = """
import sys
from pathlib import Path
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification

def store(event):
    name = Path(sys.argv[2]) / event.request.AffectedSOPInstanceUID
    name.write_bytes(event.encoded_dataset())
    return 0

ae = AE("DICOMAI")
for context in AllStoragePresentationContexts:
    ae.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
ae.add_supported_context(Verification)
ae.maximum_associations, ae.maximum_pdu_size = 20, 0
ae.start_server(("127.0.0.1", int(sys.argv[1])), evt_handlers=[(evt.EVT_C_STORE, store)])
"""


# Images


def tomogram(number: int, study: str, series: str) -> Dataset:
    """A slice of a computed tomography: 512 x 512 pixels of 16 bits."""
    ds = make.computed_radiograph(0, study)
    random = np.random.default_rng(number)
    set_pixels(ds, random.integers(0, 4096, (512, 512), np.uint16), bits_stored=12)
    ds.SOPClassUID, ds.Modality, ds.SeriesInstanceUID = CTImageStorage, "CT", series
    ds.InstanceNumber, ds.RescaleIntercept, ds.RescaleSlope = number + 1, "-1024", "1"
    ds.PatientID, ds.StudyID = "TEST", "1"
    make.add_file_meta(ds)
    return ds


def radiograph(number: int, study: str, _series: str) -> Dataset:
    """A computed radiograph of 2500 x 2048 pixels of 16 bits."""
    ds = make.large_radiograph(study, number + 1)
    ds.PatientID = "TEST"
    return ds


KINDS: dict[str, Callable[[int, str, str], Dataset]] = {"CT": tomogram, "CR": radiograph}


def folders(root: Path, kind: str, associations: int, images: int) -> list[Path]:
    """A folder for each association, with the files of one study."""
    made = []
    for sender_number in range(associations):
        study, series = generate_uid(), generate_uid()
        folder = root / f"{kind}-{associations}-{sender_number}"
        make.save(folder, [KINDS[kind](number, study, series) for number in range(images)])
        made.append(folder)
    return made


# Receivers


@contextmanager
def storescp(folder: Path) -> Iterator[int]:
    """DCMTK, a process for each association; nothing is made durable."""
    port = free_port()
    with _program(["/usr/bin/storescp", "--fork", "-od", str(folder), str(port)], port):
        yield port


@contextmanager
def orthanc(folder: Path) -> Iterator[int]:
    """Orthanc as Debian ships it."""
    pacs = Orthanc(folder / "orthanc", free_port())
    try:
        yield pacs.dicom
    finally:
        pacs.stop()


@contextmanager
def pynetdicom(folder: Path) -> Iterator[int]:
    """pynetdicom with a handler that writes the bytes as they came."""
    port = free_port()
    with _program([sys.executable, "-c", PLAIN, str(port), str(folder)], port):
        yield port


@contextmanager
def dicomai(folder: Path) -> Iterator[int]:
    """Our listener alone, with fsync and the row committed, on SQLite."""
    with listening(folder, f"sqlite:///{folder}/dicomai.db") as port:
        yield port


@contextmanager
def listening(folder: Path, url: str) -> Iterator[int]:
    """`dicomai listen` on a new database."""
    port, config = free_port(), folder / "dicomai.toml"
    config.write_text(
        SETTINGS.format(
            data_dir=folder / "data", url=url, port=port, quiet=10, release_quiet=2, destinations=""
        )
    )
    done = command(config, "db", "upgrade")
    assert done.returncode == 0, done.stderr
    program = [sys.executable, "-m", "dicomai", "listen", "--config", str(config)]
    with _program(program, port, "DICOMAI"):
        yield port


@contextmanager
def _program(words: list[str], port: int, ae_title: str = "ANY-SCP") -> Iterator[None]:
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=FAST
    )

    def answers() -> bool:
        assert process.poll() is None, words
        try:
            sender.echo("127.0.0.1", port, ae_title, "BENCH", 5)
        except DicomaiError:
            return False
        return True

    try:
        wait_until(answers, 30, f"{words[0]} answers")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


RECEIVERS = {
    "DCMTK storescp": (storescp, "ANY-SCP"),
    "Orthanc": (orthanc, "ORTHANC"),
    "pynetdicom": (pynetdicom, "DICOMAI"),
    "dicomai": (dicomai, "DICOMAI"),
}


def rate(receiver: str, sent: list[Path], folder: Path) -> float:
    """Images/s from the start of the senders to the last one's end; folder: an empty one."""
    start, ae_title = RECEIVERS[receiver]
    with start(folder) as port:
        os.sync()  # what the one before has left to the kernel
        began = time.monotonic()
        senders = [_sender(port, ae_title, item) for item in sent]
        codes = [process.wait() for process in senders]
        seconds = time.monotonic() - began
    assert not any(codes), (receiver, codes)
    return sum(len(list(item.iterdir())) for item in sent) / seconds


def _sender(port: int, ae_title: str, folder: Path) -> "subprocess.Popen[bytes]":
    words = ["/usr/bin/storescu", "-R", "+sd", "-aec", ae_title, "127.0.0.1", str(port)]
    return subprocess.Popen([*words, str(folder)], env=FAST, stderr=subprocess.DEVNULL)


def bare_loop(sent: list[Path], folder: Path) -> float:
    """Images/s of what durability alone costs: write, fsync, rename, fsync of the folder."""
    files = [file.read_bytes() for item in sent for file in item.iterdir()]
    directory = os.open(folder, os.O_RDONLY)
    os.sync()
    began = time.monotonic()
    for number, data in enumerate(files):
        scratch = folder / f"{number}.part"
        with scratch.open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        scratch.rename(folder / f"{number}.dcm")
        os.fsync(directory)
    seconds = time.monotonic() - began
    os.close(directory)
    return len(files) / seconds
