"""A running daemon in a folder of its own, as the tests use it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import free_port, wait_until

from dicomai.deliver import sender
from dicomai.errors import DicomaiError
from dicomai.store import queries
from dicomai.store.database import Database, open_database

SETTINGS = """\
data_dir = "{data_dir}"
[database]
url = "{url}"
[receive]
host = "127.0.0.1"
port = {port}
quiet_seconds = {quiet}
release_quiet_seconds = {release_quiet}
[deliver]
first_retry_seconds = 0.5
timeout_seconds = 10
{destinations}
"""
DESTINATION = """
[[destinations]]
name = "{name}"
ae_title = "{ae_title}"
host = "127.0.0.1"
port = {port}
outputs = {outputs}
"""


@dataclass(frozen=True)
class Daemon:
    """How to reach a running daemon."""

    port: int
    folder: Path
    config: Path
    database: Database
    process: "subprocess.Popen[bytes]"

    @property
    def log(self) -> str:
        """What its processes have written so far."""
        return (self.folder / "daemon.log").read_text()

    def studies(self) -> list[dict[str, Any]]:
        """Rows of v_study."""
        return queries.studies(self.database)

    def wait_idle(self, studies: int, seconds: float = 120) -> list[dict[str, Any]]:
        """Until so many studies are closed and nothing waits to be sent."""
        closed = {"analyzed", "skipped", "failed"}

        def done() -> bool:
            rows = self.studies()
            return len([r for r in rows if r["state"] in closed]) >= studies and (
                queries.is_idle(self.database)
            )

        wait_until(done, seconds, f"{studies} studies closed and delivered")
        return self.studies()

    def processes(self) -> list[int]:
        """Its process ids, the parent first."""
        found = [self.process.pid]
        for pid in found:  # which grows
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                with suppress(OSError):  # a thread that has just ended
                    found += map(int, task.read_text().split())
        return found


class Memory:
    """Samples the resident memory of a daemon's processes together; peak in bytes."""

    def __init__(self, running: Daemon) -> None:
        self.peak = 0
        self._running = running
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, sum(map(resident, self._running.processes())))


def resident(pid: int | str) -> int:
    """Resident set of a process in bytes, shared pages included; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


@contextmanager
def daemon(
    folder: Path,
    url: str,
    port: int,
    destinations: Sequence[tuple[str, str, int]] = (),
    quiet: float = 2.0,
    release_quiet: float = 0.5,
    more: str = "",
    outputs: Sequence[str] = ("sc", "sr"),
) -> Iterator[Daemon]:
    """`dicomai run`; destinations: (name, AE title, port), all of which get the outputs.

    more: further settings as TOML
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "dicomai.toml"
    config.write_text(
        SETTINGS.format(
            data_dir=folder / "data",
            url=url,
            port=port,
            quiet=quiet,
            release_quiet=release_quiet,
            destinations="".join(
                DESTINATION.format(name=n, ae_title=a, port=p, outputs=list(outputs))
                for n, a, p in destinations
            ),
        )
        + more
    )
    with (folder / "daemon.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dicomai", "run", "--config", str(config)],
            stdout=log,
            stderr=log,
            env=dict(os.environ),
        )
    running = Daemon(port, folder, config, open_database(url), process)
    try:
        wait_until(lambda: answers(running), 60, f"the daemon answers: {running.log}")
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(15)
        running.database.engine.dispose()


def answers(running: Daemon) -> bool:
    """Whether a C-ECHO succeeds; fails at once if the daemon has ended."""
    assert running.process.poll() is None, running.log
    try:
        sender.echo("127.0.0.1", running.port, "DICOMAI", "TEST", 5)
    except DicomaiError:
        return False
    return True


def command(
    config: Path, *arguments: str, seconds: float = 120
) -> "subprocess.CompletedProcess[str]":
    """`dicomai ARGUMENTS --config FILE`."""
    return subprocess.run(
        [sys.executable, "-m", "dicomai", *arguments, "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


__all__ = ["Daemon", "Memory", "command", "cpu_seconds", "daemon", "free_port", "resident"]
