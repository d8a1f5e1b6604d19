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
    scratch = path.with_name(f"{uuid.uuid4().hex}{TEMPORARY}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part)
                while len(view):
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        scratch.rename(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
