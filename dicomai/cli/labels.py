"""labels import, list."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from dicomai.audit import AuditCode
from dicomai.cli.options import Config, Format, FormatOption, audited, load, show
from dicomai.errors import Misuse
from dicomai.roles import join, label_codes
from dicomai.store import truth

app = typer.Typer(help="What readers say of images.", no_args_is_help=True)


@app.command("import")
def import_labels(
    file: Annotated[Path, typer.Argument(help="CSV: an identifier, label, value, reader, date")],
    config: Config = None,
    reader: Annotated[str, typer.Option(help="of lines that name none")] = "import",
) -> None:
    """Take labels of studies that are here; lines about others are counted.

    Identifier: sop_instance_uid, study_instance_uid or accession_number. Value: present, absent or
    unsure. A line that cannot be read refuses the whole file.
    """
    from dicomai.learning import note_accessions
    from dicomai.train.labels import NAMED_BY, digest, read_statements

    settings = load(config)
    store = join(settings)
    statements = read_statements(file, label_codes(settings), reader)
    if any(item.column == "accession_number" for item in statements):
        note_accessions(settings, store)
    found = {
        column: truth.subjects(store, column, {s.name for s in statements if s.column == column})
        for column in NAMED_BY
    }
    origin = digest(file)
    known = [
        truth.Said(
            found[item.column][item.name],
            item.label,
            item.value,
            item.reader,
            item.read_on,
            "file",
            origin,
        )
        for item in statements
        if item.name in found[item.column]
    ]
    detail = f"{len(known)} labels"
    with audited(
        settings, store, "labels import", None, AuditCode.APPLICATION_ACTIVITY, "C", detail
    ):
        outcome = truth.say(store, known)
    typer.echo(f"{len(known)} of {len(statements)} labels are of what is here: {counted(outcome)}")
    if not known:
        raise Misuse(f"{file}: none of its studies or images is here: nothing was imported")


def counted(outcome: "Counter[str]") -> str:
    """What became of rows, for a person."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.items())) or "none"


@app.command("list")
def list_labels(
    config: Config = None,
    study: Annotated[str | None, typer.Option(help="of this study and its images")] = None,
    label: Annotated[str | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, help="the newest so many")] = 50,
    how: FormatOption = Format.TABLE,
) -> None:
    """What each reader said, the newest first."""
    store = join(load(config))
    columns = ["subject", "subject_id", "label", "value", "reader", "read_on", "source", "added_at"]
    show(truth.labels(store, study, label, limit), columns, how, "no label is known")
