"""The data folder: which database it belongs to, and who works in it."""

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dicomai import durable
from dicomai.errors import FolderNotOurs

IDENTITY = "identity.json"
LOCK = "lock"


def join(data_dir: Path, site_uid: str) -> str:
    """This folder's node UID; a new folder is given one and belongs to the database from then on.

    Raises FolderNotOurs where it belongs to another database: its sweep would take the files of
    this one for orphans.
    """
    file = data_dir / IDENTITY
    if not file.exists():
        _found(file, site_uid)
    owner, node = _read(file)
    if owner != site_uid:
        raise FolderNotOurs(
            f"{data_dir} belongs to another database: correct data_dir or database.url, "
            f"or remove {file} to give its files to this one"
        )
    return node


def node_of(data_dir: Path) -> str | None:
    """Whose files lie in a data folder; None where it does not say."""
    try:
        return _read(data_dir / IDENTITY)[1]
    except (OSError, FolderNotOurs):
        return None


def _read(file: Path) -> tuple[str, str]:
    try:
        identity = json.loads(file.read_text())
        return str(identity["site"]), str(identity["node"])
    except (ValueError, KeyError, TypeError) as error:
        raise FolderNotOurs(f"{file} is damaged: restore it, or remove it") from error


def _found(file: Path, site_uid: str) -> None:
    # All roles start at once: the first link wins, and all read the same file afterwards.
    scratch = file.with_name(f"{uuid.uuid4().hex}{durable.TEMPORARY}")
    durable.write(scratch, [json.dumps({"site": site_uid, "node": str(uuid.uuid4())}).encode()])
    try:
        os.link(scratch, file)
    except FileExistsError:
        return
    finally:
        scratch.unlink()
    durable.sync_folder(file.parent)


@contextmanager
def alone(data_dir: Path) -> Iterator[None]:
    """Hold the folder for one `dicomai run`. Raises FolderNotOurs where another one holds it."""
    durable.make_folder(data_dir)
    descriptor = os.open(data_dir / LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderNotOurs(
                f"another 'dicomai run' works in {data_dir}: stop it, or give this one a data_dir "
                "of its own"
            ) from None
        yield
    finally:
        os.close(descriptor)
