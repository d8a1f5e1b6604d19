"""demo: the whole line on this machine, with real radiographs."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dicomai import logs
from dicomai.errors import DicomaiError, Unready
from dicomai.settings import PREFIX
from dicomai.store import queries
from dicomai.store.database import Database, open_database

PATIENCE_SECONDS = 180.0
SETTINGS = """\
data_dir = "{folder}"
[database]
url = "sqlite:///{folder}/dicomai.db"
[receive]
host = "127.0.0.1"
port = {port}
quiet_seconds = 2.0
release_quiet_seconds = 0.5
[infer]
device = "cpu"
[[destinations]]
name = "archive"
ae_title = "ARCHIVE"
host = "127.0.0.1"
port = {archive_port}
"""


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="stay up until Ctrl-C")] = False,
    out: Annotated[Path, typer.Option(help="where to put everything")] = Path("var"),
) -> None:
    """Send real radiographs through a daemon of its own and show what comes back."""
    from dicomai.demo.archive import Archive

    logs.configure("demo")
    console = Console(highlight=False, soft_wrap=True)
    folder = (out / f"demo-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    folder.mkdir(parents=True)
    archive = Archive(folder / "archive")
    config, port = folder / "dicomai.toml", free_port()
    config.write_text(SETTINGS.format(folder=folder, port=port, archive_port=archive.port))
    console.print("dicomai demo. Research software, not a medical device.\n")
    console.print(f"daemon   DICOMAI on 127.0.0.1:{port}, its log in {folder}/daemon.log")
    console.print(f"archive  ARCHIVE on 127.0.0.1:{archive.port}, a Storage SCP\n")
    try:
        with daemon(config, folder / "daemon.log"):
            database = open_database(f"sqlite:///{folder}/dicomai.db")
            objects = write_radiographs(folder / "sent")
            with progress(console) as bars:
                send(bars, port, objects)
                follow(bars, database, archive.files, len(objects))
            report(console, database, folder, objects)
            if keep:
                stay(console, config, port)
    finally:
        archive.close()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def daemon(config: Path, log: Path) -> Iterator[None]:
    """`dicomai run` with these settings alone, until the block ends."""
    environment = {k: v for k, v in os.environ.items() if not (k.startswith(PREFIX) and "__" in k)}
    environment.pop(f"{PREFIX}DATA_DIR", None)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dicomai", "run", "--config", str(config)],
            stdout=file,
            stderr=file,
            env=environment,
        )
    try:
        wait_for(config, process, log)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(15)


def wait_for(config: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the daemon answers a C-ECHO."""
    from dicomai.deliver import sender
    from dicomai.settings import load

    port = load(config).receive.port
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            sender.echo("127.0.0.1", port, "DICOMAI", "DEMO", 5)
        except DicomaiError:
            time.sleep(0.2)
        else:
            return
    raise Unready(f"the daemon did not start: see {log}")


def write_radiographs(folder: Path) -> list[Path]:
    """One DX study a radiograph, as a modality would send it."""
    from pydicom.uid import generate_uid

    from dicomai.demo.radiographs import digital_xray, radiographs

    folder.mkdir()
    files = []
    for number, radiograph in enumerate(radiographs(), 1):
        file = folder / f"{radiograph.path.stem}.dcm"
        study = generate_uid(entropy_srcs=[str(folder), radiograph.path.name])
        digital_xray(radiograph, f"DEMO{number:02}", study).save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def progress(console: Console) -> Progress:
    """Bars that name what they count."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def send(bars: Progress, port: int, files: list[Path]) -> None:
    """C-STORE every file, one association."""
    from dicomai.deliver import sender

    sent = bars.add_task("studies sent (C-STORE)", total=len(files))
    contexts = sender.contexts_for(files)
    with sender.association("127.0.0.1", port, "DICOMAI", "DEMO", contexts, 30) as assoc:
        for file in files:
            sender.store(assoc, file)
            bars.advance(sent)


def follow(bars: Progress, database: Database, archived: Any, studies: int) -> None:
    """Show how the daemon gets on until every study is closed and every result delivered."""
    analyzed = bars.add_task("studies analyzed", total=studies)
    back = bars.add_task("results in the archive", total=None)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        rows = queries.studies(database)
        closed = [row for row in rows if row["state"] in {"analyzed", "skipped", "failed"}]
        bars.update(analyzed, completed=len(closed))
        made = len(queries.deliveries(database))
        bars.update(back, completed=len(archived()), total=made or None)
        if len(closed) == studies and queries.is_idle(database):
            return
        time.sleep(0.1)
    raise Unready(f"not finished after {PATIENCE_SECONDS:.0f} s: see daemon.log")


def report(console: Console, database: Database, folder: Path, objects: list[Path]) -> None:
    """The findings as a table, and where the overlays lie."""
    from dicomai.cli.try_files import write_png
    from dicomai.demo.radiographs import radiographs

    known = {file.stem: item.label for file, item in zip(objects, radiographs(), strict=True)}
    names = {uid: file.stem for file in objects for uid in [_sop_instance_uid(file)]}
    table = Table(box=box.SIMPLE)
    for column in ("radiograph", "NIH says", "finding", "probability", "model says"):
        table.add_column(column, no_wrap=True)
    rows = queries.findings(database, queries.FindingFilter())
    pngs = []
    for row in sorted(rows, key=lambda row: -row["probability"]):
        name = names[row["sop_instance_uid"]]
        capture = _overlay(database, folder, row)
        png = write_png(capture).rename(folder / f"{name}.png")
        pngs.append(png)
        table.add_row(
            name,
            known[name],
            row["label"],
            f"{row['probability']:.3f}",
            "[bold yellow]present[/]" if row["positive"] else "absent",
        )
    console.print(table)
    made = queries.deliveries(database)
    delivered = [row for row in made if row["state"] == "delivered"]
    console.print(f"{len({row['study_instance_uid'] for row in rows})} studies with findings")
    words = f"{len(delivered)} of {len(made)} results delivered, as DICOM in {folder}/archive"
    console.print(words)
    console.print(f"overlays as PNG in {folder}, all in one: {_sheet(pngs, folder).name}")
    # Each study has its summary and its report, and what is positive has an overlay.
    expected = 2 * len(objects) + sum(row["positive"] for row in rows)
    if len(delivered) != expected or len(rows) != len(objects):
        raise Unready(f"some results are missing: see {folder}/daemon.log")


def _sop_instance_uid(file: Path) -> str:
    from dicomai.receive import inbox

    return inbox.read_file(file)[1].sop_instance_uid


def _overlay(database: Database, folder: Path, row: dict[str, Any]) -> Path:
    """The overlay of a positive image, or the study's summary, as the archive got it."""
    source = row["sop_instance_uid"] if row["positive"] else None
    for result in queries.results(database, row["study_instance_uid"]):
        if result["kind"] == "sc" and result["source_sop_instance_uid"] == source:
            name = f"{result['sop_instance_uid']}.dcm"
            return folder / "archive" / str(row["study_instance_uid"]) / name
    raise Unready(f"no overlay of {row['sop_instance_uid']}: see {folder}/daemon.log")


def _sheet(pngs: list[Path], folder: Path) -> Path:
    """All overlays in one picture."""
    import cv2
    import numpy as np

    images = [cv2.imread(str(png)) for png in pngs]
    tiles = [
        cv2.resize(i, (384, round(i.shape[0] * 384 / i.shape[1]))) for i in images if i is not None
    ]
    height = max(tile.shape[0] for tile in tiles)
    tiles = [np.pad(t, ((0, height - t.shape[0]), (0, 0), (0, 0))) for t in tiles]
    while len(tiles) % 5:
        tiles.append(np.zeros_like(tiles[0]))
    sheet = np.vstack([np.hstack(tiles[i : i + 5]) for i in range(0, len(tiles), 5)])
    path = folder / "overlays.png"
    cv2.imwrite(str(path), sheet)
    return path


def stay(console: Console, config: Path, port: int) -> None:
    """Until Ctrl-C or SIGTERM."""
    from dicomai.roles import stop_on_signal

    console.print("\n[bold]The daemon stays up.[/] Send it studies (DCMTK):")
    console.print(f"  /usr/bin/storescu -R -aec DICOMAI 127.0.0.1 {port} FILE...")
    console.print(f"  dicomai results --config {config}")
    console.print("Ctrl-C stops it.")
    stop_on_signal().wait()
