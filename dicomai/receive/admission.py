"""From a file in the inbox to a row; only after that is the sender told Success."""

from collections.abc import Collection
from pathlib import Path

from dicomai.durable import remove_empty
from dicomai.errors import HeldElsewhere
from dicomai.receive.inbox import Header
from dicomai.store import queue, removal
from dicomai.store.database import Database
from dicomai.store.queue import Arrival, Outcome
from dicomai.study import Instance


def admit(
    database: Database,
    data_dir: Path,
    header: Header,
    instance: Instance,
    size: int,
    calling_ae_title: str,
    quiet_seconds: float,
) -> Outcome:
    """Commit an instance that lies in the inbox, and remove the file that it replaces.

    Raises HeldElsewhere, and OSError where somebody removed the file before it had its row, and
    then nothing is changed; the sender, who has not been told Success, sends it again.
    """
    arrival = Arrival(
        instance,
        header.study_instance_uid,
        size,
        header.analyzable,
        calling_ae_title,
        header.expected_instances,
        header.patient_id,
        header.accession_number,
    )
    try:
        outcome, replaced = queue.arrive(database, arrival, data_dir, quiet_seconds)
    except HeldElsewhere:
        _remove(instance.path)
        raise
    if replaced == instance.path:
        _remove(replaced)
        return outcome
    if replaced is not None:
        discard(database, data_dir, header.study_instance_uid, [replaced])
    return outcome


def _remove(path: Path) -> None:
    # No row of ours names it, and while another daemon holds the study none will.
    path.unlink(missing_ok=True)
    remove_empty([path.parent])


def discard(
    database: Database, data_dir: Path, study_instance_uid: str, paths: Collection[Path]
) -> int:
    """Remove files that no row of their study names (any more); returns bytes.

    The study's row is locked meanwhile: an object that arrives again lies under the same name, and
    must not lose its file after its commit.
    """
    freed = 0
    names = {str(path.relative_to(data_dir)): path for path in paths}
    with removal.unreferenced(database, study_instance_uid, list(names)) as free:
        for path in (names[name] for name in free):
            freed += path.stat().st_size if path.exists() else 0
            path.unlink(missing_ok=True)
    remove_empty(path.parent for path in paths)
    return freed
