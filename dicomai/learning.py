"""What is learnt, from what: documents that came are read for labels."""

import structlog

from dicomai.errors import NotDicom, Rejected
from dicomai.receive import inbox
from dicomai.roles import label_codes
from dicomai.settings import Settings
from dicomai.store import truth
from dicomai.store.database import Database
from dicomai.study import Code
from dicomai.train import documents
from dicomai.train.labels import DOCUMENT

log = structlog.get_logger()


def note_accessions(settings: Settings, database: Database) -> None:
    """Look into studies that were received before Accession Numbers were noted."""
    for uid, path in truth.without_accession(database).items():
        try:
            header, _, _ = inbox.read_file(settings.data_dir / path)
        except (NotDicom, OSError):
            continue
        truth.set_accession(database, uid, header.accession_number)


def read_documents(settings: Settings, database: Database) -> str:
    """Take the labels of Structured Reports that came since the last time, each once."""
    table = label_codes(settings)
    unread = truth.unread_documents(database, documents.SOP_CLASSES)
    count = sum(_read(settings, database, item, table) for item in unread)
    log.info("documents_read", documents=len(unread), labels=count)
    return f"{count} labels of {len(unread)} documents"


def _read(
    settings: Settings, database: Database, item: truth.Document, table: dict[str, Code]
) -> int:
    said: list[truth.Said] = []
    reason = None
    try:
        report = documents.read(settings.data_dir / item.path, table)
        reader = truth.reader_key(database, report.reader)
        images = {reading.sop_instance_uid for reading in report.readings} - {""}
        known = truth.images_of(database, item.study_instance_uid, images)
        known[""] = ("study", item.study_instance_uid)
        said = [
            truth.Said(
                known[reading.sop_instance_uid],
                reading.label,
                reading.value,
                reader,
                report.read_on,
                DOCUMENT,
                item.sop_instance_uid,
            )
            for reading in report.readings
            if reading.sop_instance_uid in known
        ]
    except Rejected as error:
        reason = str(error)
    truth.document_read(database, item, said, reason)
    return len(said)
