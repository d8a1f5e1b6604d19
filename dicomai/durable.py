"""Files that survive a power cut once the call has returned."""

import errno
import mmap
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".part"
BLOCK_BYTES = 4096
BUFFER_BYTES = 1 << 20
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


def write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write parts to path, all or nothing: temporary file, fsync, rename, fsync of the folder.

    The temporary file lies beside its target and ends in .part.
    """
    make_folder(path.parent)
    temporary, descriptor = scratch(path.parent)
    try:
        for part in parts:
            append(descriptor, part)
        os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def scratch(folder: Path, flags: int = 0) -> tuple[Path, int]:
    """A new temporary file, which only this user may read, and its descriptor.

    flags: of open(2), for a file system that knows them
    """
    path = folder / f"{uuid.uuid4().hex}{TEMPORARY}"
    usual = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        return path, os.open(path, usual | os.O_EXCL | flags, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return path, os.open(path, usual, 0o600)  # it may have been made nevertheless


class Desk:
    """What one Stream after the other is written with: a buffer to fill, and one on its way.

    The buffers lie where a direct write demands it.
    """

    def __init__(self) -> None:
        self._buffers = [memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(2)]
        self._writer = ThreadPoolExecutor(1, "writer")
        self._on_its_way: Future[None] | None = None

    @property
    def buffer(self) -> memoryview:
        """The one to fill."""
        return self._buffers[0]

    def send(self, descriptor: int, size: int) -> None:
        """Write so many bytes of the buffer while the other one is filled. Raises OSError."""
        self.wait()
        try:
            self._on_its_way = self._writer.submit(append, descriptor, self.buffer[:size])
        except RuntimeError as error:  # no more threads
            raise OSError(str(error)) from error
        self._buffers.reverse()

    def wait(self) -> None:
        """Until all is written. Raises OSError."""
        if self._on_its_way is not None:
            written, self._on_its_way = self._on_its_way, None
            written.result()

    def close(self) -> None:
        """No Stream follows."""
        self._writer.shutdown()


class Stream:
    """A new temporary file that is written piece by piece.

    Past the page cache where the file system can (O_DIRECT, open(2)): to copy an image into new
    pages of memory, and these to the disk, took half of the time of receiving it.
    size: bytes that were written
    """

    def __init__(self, folder: Path, desk: Desk, seen: Callable[[memoryview], object]) -> None:
        """seen: is shown what is written, in larger pieces than it comes in.

        The folder is made where it is missing. Raises OSError.
        """
        try:
            self.path, self._file = scratch(folder, O_DIRECT)
        except FileNotFoundError:
            make_folder(folder)
            self.path, self._file = scratch(folder, O_DIRECT)
        self._desk = desk
        self._seen = seen
        self.size = self._filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Raises OSError."""
        view = memoryview(data)
        while len(view):
            buffer = self._desk.buffer
            taken = min(len(view), len(buffer) - self._filled)
            buffer[self._filled : self._filled + taken] = view[:taken]
            self._filled += taken
            view = view[taken:]
            if self._filled == len(buffer):
                self._desk.send(self._file, self._filled)
                self._see(buffer)

    def end(self) -> None:
        """All of it can be read. Raises OSError."""
        left = self._desk.buffer[: self._filled]
        blocks = -(-len(left) // BLOCK_BYTES) * BLOCK_BYTES
        self._see(left)
        self._desk.wait()
        append(self._file, self._desk.buffer[:blocks])
        os.ftruncate(self._file, self.size)

    def _see(self, filled: memoryview) -> None:
        self._seen(filled)
        self.size += len(filled)
        self._filled = 0

    def keep(self, path: Path) -> None:
        """Make the content durable and give it its name, which a sync of its folder makes so.

        The folder is made where it is missing. Raises OSError.
        """
        os.fsync(self._file)
        try:
            self.path.rename(path)
        except FileNotFoundError:
            make_folder(path.parent)
            self.path.rename(path)
        self._close()

    def close(self) -> None:
        """Remove what was not kept."""
        if self._file >= 0:
            with suppress(OSError):
                self._desk.wait()
            with suppress(OSError):  # the sweep removes it
                self._close()
                self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        # Never a second time: the number may be somebody else's by then.
        descriptor, self._file = self._file, -1
        os.close(descriptor)


def append(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def make_folder(path: Path) -> None:
    """Make a folder that only this user may enter, and sync its parent if it is new."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make what somebody else wrote into a file durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of these folders that are empty."""
    for folder in set(folders):
        with suppress(OSError):  # not empty, or gone
            folder.rmdir()


def sync_folder(path: Path) -> None:
    """Make what was renamed into or removed from a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
