"""dataset add, list, remove."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from dicomai.audit import AuditCode
from dicomai.cli.labels import counted
from dicomai.cli.options import Config, Format, FormatOption, audited, load, show
from dicomai.errors import Misuse
from dicomai.roles import join, label_codes
from dicomai.store import truth

app = typer.Typer(help="Labelled images from elsewhere, to learn from.", no_args_is_help=True)
LISTED = 3


@app.command()
def add(
    folder: Annotated[Path, typer.Argument(help="DICOM, PNG or JPEG; stays where it is")],
    labels: Annotated[Path, typer.Option(help="CSV: file, label, patient_id, and maybe more")],
    name: Annotated[str | None, typer.Option(help="[default: the folder's name]")] = None,
    column: Annotated[str | None, typer.Option(help="the one that lists labels")] = None,
    reader: Annotated[str, typer.Option(help="of lines that name none")] = "dataset",
    config: Config = None,
) -> None:
    """Add a folder of images with their labels; again, and it is brought up to date.

    A patient never changes the split (train, val, test); a column split decides it once.
    """
    from dicomai.train.examples import read_examples
    from dicomai.train.labels import digest

    settings = load(config)
    store = join(settings)
    known = label_codes(settings)
    found = read_examples(folder, labels, known, column, reader, _track)
    if not found.examples:
        raise Misuse(f"{labels}: none of its {len(found.missing)} files is in {folder}")
    dataset = name or folder.resolve().name
    detail = f"{len(found.examples)} images"
    with audited(settings, store, "dataset add", None, AuditCode.APPLICATION_ACTIVITY, "C", detail):
        images, said = truth.add_examples(store, dataset, found.examples, digest(labels))
    typer.echo(f"{dataset}: images: {counted(images)}; labels: {counted(said)}")
    for words, names in (
        ("cannot be decoded", found.undecodable),
        ("are named, but not in the folder", found.missing),
    ):
        if names:
            first = ", ".join(names[:LISTED])
            typer.echo(
                f"left out: {len(names)} files {words}: {first}{' ...' if names[LISTED:] else ''}"
            )
    if found.unlabelled:
        typer.echo(f"left out: {found.unlabelled} files have no label")


def _track(paths: Sequence[Path], words: str) -> Iterable[Path]:
    console = Console(stderr=True)
    return track(paths, words, console=console, transient=True, disable=not console.is_terminal)


@app.command("list")
def list_datasets(config: Config = None, how: FormatOption = Format.TABLE) -> None:
    """What was added."""
    columns = ["dataset", "images", "patients", "sources", "added_at"]
    show(truth.datasets(join(load(config))), columns, how, "no dataset was added")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="as in dataset list")], config: Config = None
) -> None:
    """Forget a dataset; its files stay, and so does the split of its patients."""
    settings = load(config)
    store = join(settings)
    with audited(settings, store, "dataset remove", None, AuditCode.APPLICATION_ACTIVITY, "D"):
        count = truth.remove_dataset(store, name)
    if not count:
        raise Misuse(f"there is no dataset '{name}': see 'dicomai dataset list'")
    typer.echo(f"{name}: {count} images forgotten")
