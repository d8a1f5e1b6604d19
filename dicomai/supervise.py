"""The parent of all roles: binds the port, starts them, restarts what dies, stops them together."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import structlog

log = structlog.get_logger()

LOOK_UP_SECONDS = 0.5
STOP_SECONDS = 9.0
LONGEST_PAUSE = 30.0
HEALTHY_SECONDS = 60.0
PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """A role's process, and when it may be started (again)."""

    role: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 0.0
    due: float = field(default_factory=time.monotonic)


def supervise(
    roles: list[str], config: Path | None, listening: socket.socket, stop: threading.Event
) -> None:
    """Keep one process a role running until told to stop, then end them within ten seconds."""
    children = [Child(role) for role in roles]
    while not stop.is_set():
        for child in children:
            _care_for(child, config, listening)
        stop.wait(LOOK_UP_SECONDS)
    _end(children)


def _care_for(child: Child, config: Path | None, listening: socket.socket) -> None:
    now = time.monotonic()
    if child.process is not None:
        code = child.process.poll()
        if code is None:
            return
        # A role that dies at once would otherwise be started many times a second.
        lived = now - child.started
        child.pause = 1.0 if lived > HEALTHY_SECONDS else min(LONGEST_PAUSE, child.pause * 2 or 1.0)
        child.due = now + child.pause
        child.process = None
        log.error("died", child=child.role, exit_code=code, restart_seconds=child.pause)
    if now >= child.due:
        child.process = _start(child.role, config, listening)
        child.started = now
        log.info("started", child=child.role, pid=child.process.pid)


def _start(role: str, config: Path | None, listening: socket.socket) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dicomai", role]
    if config is not None:
        command += ["--config", str(config)]
    passed: tuple[int, ...] = ()
    if role == "listen":
        passed = (listening.fileno(),)
        command += ["--socket-fd", str(listening.fileno())]
    parent = os.getpid()
    return subprocess.Popen(command, pass_fds=passed, preexec_fn=lambda: die_with(parent))


def die_with(parent: int) -> None:
    """In a child before it begins: end when the parent does."""
    # A parent that is killed cannot tell its children; the kernel does (prctl(2)).
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)


def _end(children: list[Child]) -> None:
    running = [child.process for child in children if child.process is not None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # What it held becomes due again when its lease runs out.
            log.error("killed", pid=process.pid)
            process.kill()
            process.wait()
