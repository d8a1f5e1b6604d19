"""Decoding processes: an image that crashes, hangs or floods its decoder costs that image.

    parent                         child: python -m dicomai.prepare.pool FD BYTES
                            <-     ("ready",)
    (function, arguments)   ->
                            <-     ("item", what the generator yields) ... ("end",)
                                   or ("rejected", code, reason), ("disk", error number, words)

Children are started when they are needed and again when they have died. They never import torch.
What is not the image's fault is an OSError, and the study waits: a child that does not start, is
told to stop, or cannot read the disk.
"""

import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import cv2

from dicomai.errors import Rejected, UnsupportedPixels

MEGABYTE = 1 << 20
START_SECONDS = 60.0
STOPPED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # by a person or the system, not the image
PR_SET_PDEATHSIG = 1

# The processes are the parallelism. And glibc gives every large array back to the kernel, only to
# get its pages zeroed again for the next image; kept, they double the rate (measured: 27 to 56
# images/s of 2500 x 2048 in one process).
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(128 * MEGABYTE),
    "MALLOC_TRIM_THRESHOLD_": str(256 * MEGABYTE),
}

Work = Callable[..., Iterator[Any]]


class Pool:
    """workers processes; each piece of work is done by one of them, several at a time."""

    def __init__(self, workers: int, timeout_seconds: float, memory_megabytes: int) -> None:
        """timeout_seconds: for each item that a piece of work yields."""
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._memory_megabytes = memory_megabytes
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._mine = threading.local()
        self._children: list[_Child] = []
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            for child in self._children:
                child.kill()
        self._threads.shutdown()
        for child in list(self._children):
            child.end()

    def process_ids(self) -> list[int]:
        """The decoding processes that run now."""
        return [child.process_id for child in list(self._children)]

    def map(self, work: Work, calls: Iterable[tuple[Any, ...]]) -> Iterator[list[Any] | Rejected]:
        """Do work(*call) for every call, in order: what it yields, or why it was refused.

        No more is begun than the processes can do beside what the caller has in hand: what is done
        takes memory. Raises OSError where the disk failed.
        """
        ahead: deque[Future[list[Any] | Rejected]] = deque()
        for call in calls:
            ahead.append(self._threads.submit(self._try, work, call))
            if len(ahead) > self._workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _try(self, work: Work, call: tuple[Any, ...]) -> list[Any] | Rejected:
        try:
            return self._run(work, call)
        except Rejected as error:
            return error

    def _run(self, work: Work, call: tuple[Any, ...]) -> list[Any]:
        child = self._child()
        try:
            answer, items = child.run(work, call, self._timeout_seconds)
        except (TimeoutError, BlockingIOError):
            self._lose(child)
            raise UnsupportedPixels(
                f"the decoder was stopped after {self._timeout_seconds:g} seconds "
                "(prepare.timeout_seconds)",
                "decoder-hung",
            ) from None
        except (EOFError, OSError):
            code = self._lose(child)
            if -code in STOPPED:
                raise OSError(f"a decoding process was told to stop (signal {-code})") from None
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise UnsupportedPixels(f"the decoder crashed ({how})", "decoder-crashed") from None
        except BaseException:
            self._lose(child)  # what it has still to say must not answer the next call
            raise
        match answer:
            case ("rejected", code, reason):
                raise Rejected(reason, code)
            case ("disk", number, reason):
                raise OSError(number, reason)
        return items

    def _child(self) -> "_Child":
        """This thread's process, started where there is none or it died between two images."""
        child: _Child | None = getattr(self._mine, "child", None)
        if child is not None and child.is_alive:
            return child
        if child is not None:
            self._lose(child)
        with self._lock:
            if self._closed:
                raise OSError("the decoding processes have been ended")
            child = self._mine.child = _Child(self._memory_megabytes, self._timeout_seconds)
            self._children.append(child)
        child.wait_ready()
        return child

    def _lose(self, child: "_Child") -> int:
        """The next call gets a new process; returns this one's exit code."""
        self._mine.child = None
        with self._lock:
            if child in self._children:
                self._children.remove(child)
        return child.end()


class _Child:
    """One decoding process and the socket to it."""

    def __init__(self, memory_megabytes: int, timeout_seconds: float) -> None:
        ours, theirs = socket.socketpair()
        # A message that stops in its middle; poll() sees only its beginning.
        limit = struct.pack("ll", int(timeout_seconds), int(timeout_seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        command = [sys.executable, "-m", "dicomai.prepare.pool"]
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(memory_megabytes * MEGABYTE)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
            )
        self._connection = Connection(ours.detach())

    @property
    def is_alive(self) -> bool:
        """Whether it can be given work."""
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Raises OSError where it does not start."""
        try:
            if self._connection.poll(START_SECONDS) and self._connection.recv() == ("ready",):
                return
        except (EOFError, ConnectionError):
            pass
        self.kill()
        raise OSError("a decoding process does not start: is the installation whole?")

    def run(
        self, work: Work, call: tuple[Any, ...], timeout_seconds: float
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """Its last word, and the items before it. Raises whatever the connection does."""
        self._connection.send((work, call))
        items: list[Any] = []
        while True:
            if not self._connection.poll(timeout_seconds):
                raise TimeoutError
            answer = self._connection.recv()
            if answer[0] != "item":
                return answer, items
            items.append(answer[1])

    @property
    def process_id(self) -> int:
        """Of the child."""
        return self._process.pid

    def kill(self) -> None:
        """Whoever waits for it is told so."""
        self._process.kill()

    def end(self) -> int:
        """Kill it and close the socket; its exit code, negative for a signal."""
        code = self._process.poll()
        if code is None:
            # What closed its end is about to have an exit code of its own.
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(0.2)
        self._process.kill()
        self._process.wait()
        self._connection.close()
        return self._process.returncode if code is None else code


def _serve(connection: Connection) -> None:
    """The child: do what is asked until the parent goes."""
    connection.send(("ready",))
    while True:
        try:
            work, call = connection.recv()
        except EOFError:
            return
        connection.send(_answer(connection, work, call))


def _answer(connection: Connection, work: Work, call: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        for item in work(*call):
            connection.send(("item", item))
    except Rejected as error:
        return "rejected", error.code, str(error)
    except MemoryError:
        return (
            "rejected",
            "too-large",
            "needs more memory than a decoding process may have (prepare.memory_megabytes)",
        )
    except OSError as error:
        return "disk", error.errno or 0, str(error)
    except Exception as error:  # noqa: BLE001 - whatever a damaged image provokes costs this image
        return "rejected", "undecodable", f"cannot be prepared: {type(error).__name__}"
    return ("end",)


def main() -> None:
    """Entry point of the child."""
    descriptor, memory = int(sys.argv[1]), int(sys.argv[2])
    # A terminal's Ctrl-C goes to the whole group, systemd's stop to the whole unit; the parent
    # decides when this ends. A parent that is killed cannot; then the kernel does (prctl(2)).
    for number in STOPPED:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")  # they quote values, which may be a patient's
    logging.disable()
    cv2.setNumThreads(1)
    os.nice(1)  # receiving goes first
    _serve(Connection(descriptor))


if __name__ == "__main__":
    main()
