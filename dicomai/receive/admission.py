"""From files in the inbox to rows; only after that is the sender told Success."""

import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from dicomai import durable
from dicomai.errors import HeldElsewhere
from dicomai.receive.header import Header
from dicomai.store import arrivals, removal
from dicomai.store.arrivals import Arrival, Outcome
from dicomai.store.database import Database
from dicomai.study import Instance


@dataclass(slots=True, eq=False)
class _Waiting:
    """An arrival, and what became of it."""

    arrival: Arrival
    answer: tuple[Outcome, Path | None] | Exception | None = None


class Admission:
    """Commits what several threads bring: whoever comes to it first commits for all who wait.

    So the database's fsync is shared, and nobody waits for company.
    """

    def __init__(self, database: Database, data_dir: Path, quiet_seconds: float) -> None:
        self._database = database
        self._data_dir = data_dir
        self._quiet_seconds = quiet_seconds
        self._waiting: list[_Waiting] = []
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def admit(
        self, header: Header, instance: Instance, size: int, calling_ae_title: str
    ) -> Outcome:
        """Commit an instance whose file lies in the inbox, and remove the file that it replaces.

        The file's content is durable; its name becomes so here.
        Raises HeldElsewhere, and OSError where somebody removed the file before it had its row, and
        then nothing is changed; the sender, who has not been told Success, sends it again.
        """
        mine = _Waiting(
            Arrival(
                instance,
                header.study_instance_uid,
                size,
                header.analyzable,
                calling_ae_title,
                header.expected_instances,
                header.patient_id,
                header.accession_number,
                header.stat,
            )
        )
        # Not in turn: the kernel does what comes at the same time in one (ext4's journal).
        durable.sync_folder(instance.path.parent)
        with self._lock:
            self._waiting.append(mine)
        with self._turn:
            if mine.answer is None:
                with self._lock:
                    group, self._waiting = self._waiting, []
                # Who has taken mine without an answer has failed.
                self._commit(group if mine in group else [*group, mine])
        return self._tidied(mine)

    def _commit(self, group: list[_Waiting]) -> None:
        try:
            answers = arrivals.arrive(
                self._database,
                [item.arrival for item in group],
                self._data_dir,
                self._quiet_seconds,
            )
        except (OSError, SQLAlchemyError, HeldElsewhere) as error:
            if len(group) > 1 and not isinstance(error, OperationalError):
                for item in group:
                    self._commit([item])
                return
            for item in group:
                item.answer = error
            return
        for item, answer in zip(group, answers, strict=True):
            item.answer = answer

    def _tidied(self, mine: _Waiting) -> Outcome:
        path = mine.arrival.instance.path
        if isinstance(mine.answer, Exception):
            if isinstance(mine.answer, HeldElsewhere):
                _remove(path)
            raise mine.answer
        assert mine.answer is not None
        outcome, replaced = mine.answer
        if replaced == path:
            _remove(path)
        elif replaced is not None:
            discard(self._database, self._data_dir, mine.arrival.study_instance_uid, [replaced])
        return outcome


def _remove(path: Path) -> None:
    # No row of ours names it, and while another daemon holds the study none will.
    path.unlink(missing_ok=True)
    durable.remove_empty([path.parent])


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
    durable.remove_empty(path.parent for path in paths)
    return freed
