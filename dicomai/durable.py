"""Files that survive a power cut once the call has returned."""

import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".part"


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


def scratch(folder: Path) -> tuple[Path, int]:
    """A new temporary file, which only this user may read, and its descriptor."""
    path = folder / f"{uuid.uuid4().hex}{TEMPORARY}"
    return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


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
