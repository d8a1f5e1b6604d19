"""Runs a part of dicomai that kills itself at one exact point: killed.py ROLE POINT ARGUMENTS...

It is forked from a process that has imported everything; say() is the same for a whole command.
The product knows nothing of it: one function of it, or of what it calls, is wrapped beforehand.
ROLE is a command of dicomai.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# A process that has imported everything and only forks: torch takes seconds to import.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["dicomai.cli", "dicomai.worker", "dicomai.retraining"])


@dataclass(frozen=True)
class Point:
    """Before or after the so manyth call of a function, named as module:name.name."""

    function: str
    when: Literal["before", "after"]
    call: int = 1


POINTS = {
    # run
    "a role is forked": Point("dicomai.supervise:die_with", "before"),
    # listen
    "an object's file is begun": Point("dicomai.durable:scratch", "after"),
    "an object's file is written": Point("pathlib:Path.rename", "before"),
    "an object is on disk": Point("dicomai.store.arrivals:arrive", "before"),
    "an object is committed": Point("dicomai.store.arrivals:arrive", "after"),
    # infer
    "a study is claimed": Point("dicomai.worker:analyze", "before"),
    "a study is scored": Point("dicomai.infer.batcher:Batcher.predict", "after"),
    "a result's file is begun": Point("dicomai.durable:scratch", "after"),
    "one result is on disk": Point("dicomai.analyze:write", "after"),
    "all results are on disk": Point("dicomai.store.queue:complete", "before"),
    "a study is committed": Point("dicomai.store.queue:complete", "after"),
    # deliver
    "a result is in the PACS": Point("dicomai.deliver.sender:store", "after"),
    # purge
    "a study is purged": Point("dicomai.store.removal:purge", "after"),
    # db upgrade
    "a table of the new schema is made": Point(
        "alembic.operations:Operations.create_table", "after"
    ),
    # retrain
    "an epoch is in the middle": Point("dicomai.train.loop:training_loss", "before", 4),
    "the first epoch is saved": Point("dicomai.train.loop:_save", "after"),
    "an epoch is saved": Point("dicomai.train.loop:_save", "after", 2),
    "a model's weights are written": Point("dicomai.train.publish:describe", "before"),
    "a model is about to be renamed": Point("pathlib:Path.rename", "before"),
}


# What happens at a point: the signal that the process gives itself, or the file that its thread
# waits for (the others go on).
Deed = int | Path


def arm(point: Point, deed: Deed = signal.SIGKILL) -> None:
    """Wrap the function that the point names."""
    module, _, path = point.function.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, deadly(getattr(owner, name), point, deed))


def deadly(function: Callable[..., Any], point: Point, deed: Deed) -> Callable[..., Any]:
    """The function, and the end (or a pause) of this process before or after one of its calls."""
    lock, calls = threading.Lock(), 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            mine = calls == point.call
        if mine and point.when == "before":
            do(deed)
        result = function(*arguments, **named)
        if mine and point.when == "after":
            do(deed)
        return result

    return wrapped


def do(deed: Deed) -> None:
    """Die, stop, or wait."""
    if isinstance(deed, int):
        os.kill(os.getpid(), deed)
        return
    reached(deed).touch()
    while not deed.exists():
        time.sleep(0.02)


def reached(gate: Path) -> Path:
    """Is there when a thread waits for the gate."""
    return gate.with_suffix(".reached")


def start(
    role: str, point: str | None, arguments: list[str], log: Path, deed: Deed = signal.SIGKILL
) -> Any:
    """A process that runs a role, and dies at the point if one is named; output goes to log."""
    process = SERVER.Process(target=run, args=(role, point, arguments, log, deed))
    process.start()
    return process


def run(
    role: str,
    point: str | None,
    arguments: list[str],
    log: Path | None = None,
    deed: Deed = signal.SIGKILL,
) -> None:
    """As the command line does."""
    if log is not None:
        with log.open("ab") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    if point is not None:
        arm(POINTS[point], deed)
    if role == "retrain":  # which would wait for all other tests, and draw many pictures
        importlib.import_module("dicomai.cli.retrain").__dict__["yield_to_others"] = lambda: None
        importlib.import_module("dicomai.train.page").__dict__["CHANNELS"] = 2
    sys.argv = ["dicomai", role, *arguments]
    from dicomai.cli import main

    main()


def say(config: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`dicomai ARGUMENTS --config FILE`, as a fork: to import everything takes over a second."""
    words = [*arguments, "--config", str(config)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = SERVER.Process(target=_say, args=(words, dict(os.environ), out, err))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{words} does not end")
        return subprocess.CompletedProcess(
            words, process.exitcode, out.read_text(), err.read_text()
        )


def _say(words: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    run(words[0], None, words[1:])


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
