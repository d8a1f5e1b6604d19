"""purge: remove what is known of a patient, or of a study."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dicomai.audit import AuditCode
from dicomai.cli.options import Config, audited, load
from dicomai.durable import remove_empty
from dicomai.errors import Misuse, NotDicom
from dicomai.roles import join
from dicomai.settings import Settings
from dicomai.store import queries, removal
from dicomai.store.database import Database
from dicomai.store.removal import Removed


def purge(
    config: Config = None,
    patient: Annotated[str | None, typer.Option(help="Patient ID")] = None,
    study: Annotated[str | None, typer.Option(help="Study Instance UID")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Remove images, results, findings and history of a patient or of a study, for good."""
    if (patient is None) == (study is None) or "" in {patient, study}:
        raise Misuse("name one of --patient PATIENT_ID and --study STUDY_INSTANCE_UID")
    settings = load(config)
    store = join(settings)
    uids = _chosen(settings, store, patient, study)
    for uid in uids:
        counts = len(queries.instances(store, uid)), len(queries.results(store, uid))
        typer.echo(f"{uid}: {counts[0]} images, {counts[1]} results")
    if not yes:
        typer.confirm("Remove this, for good?", abort=True)
    for uid in uids:
        with audited(settings, store, "purge", uid, AuditCode.STUDY_DELETED, "D"):
            _say(_purge(settings, store, uid, patient))
    sent = ", ".join(peer.name for peer in settings.destinations)
    typer.echo(
        f"not removed: what {sent or 'a PACS'} holds, the audit trail (by Study Instance UID), and "
        "backups of the database"
    )


def _chosen(
    settings: Settings, store: Database, patient: str | None, study: str | None
) -> Sequence[str]:
    if study is not None:
        uids = [study] if queries.one_study(store, study) else []
    else:
        assert patient is not None
        _note_patients(settings.data_dir, store)
        uids = removal.studies_of(store, patient)
    if not uids:
        raise Misuse("nothing is known of this patient or study")
    elsewhere = removal.held_elsewhere(store, uids)
    if elsewhere:
        raise Misuse(f"another daemon holds {', '.join(elsewhere)}: run this where its data_dir is")
    return uids


def _note_patients(data_dir: Path, store: Database) -> None:
    from dicomai.receive import inbox

    for name, path in removal.without_patient(store).items():
        try:
            header, _, _ = inbox.read_file(data_dir / path)
        except (NotDicom, OSError):
            continue
        removal.set_patient(store, name, header.patient_id)


def _purge(settings: Settings, store: Database, uid: str, patient: str | None) -> Removed:
    def remove(names: Collection[str]) -> None:
        paths = [settings.data_dir / name for name in names]
        for path in paths:
            path.unlink(missing_ok=True)
        remove_empty(path.parent for path in paths)

    return removal.purge(store, uid, remove, patient)


def _say(removed: Removed) -> None:
    typer.echo(
        f"removed {removed.images} images, {removed.results} results and {removed.findings} "
        f"findings in {removed.files} files"
        + ("" if removed.whole else "; the study holds images of another patient, and is due again")
    )
