"""model list, show, verify, activate, rollback, compress, export, import."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from dicomai.cli.options import Config, Format, FormatOption, audited, load, show
from dicomai.errors import DicomaiError, Misuse
from dicomai.infer import package
from dicomai.roles import connect, join, model_folders, note, register_installed
from dicomai.settings import Settings
from dicomai.store import registry
from dicomai.store.database import Database
from dicomai.study import Model

if TYPE_CHECKING:
    from dicomai.compressing import Compressed

app = typer.Typer(help="Model packages.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="name of the model")]
Version = Annotated[str | None, typer.Argument(help="its version; without one, every version")]


@app.command("list")
def list_models(config: Config = None, how: FormatOption = Format.TABLE) -> None:
    """Installed packages, and which version is active."""
    settings = load(config)
    states = _states(settings)
    rows = [
        {
            "name": model.name,
            "version": model.version,
            "state": states.get((model.name, model.version), "installed"),
            "labels": ", ".join(label.key for label in model.labels),
            "folder": str(model.path),
        }
        for model in package.installed(model_folders(settings))
    ]
    show(rows, ["name", "version", "state", "labels", "folder"], how, "no model is installed")


def _states(settings: Settings) -> dict[tuple[str, str], str]:
    try:
        rows = registry.models(connect(settings))
    except DicomaiError:  # the packages can be listed without a database
        return {}
    return {(row["name"], row["version"]): row["state"] for row in rows}


@app.command("show")
def show_model(name: Name, version: Version = None, config: Config = None) -> None:
    """A package's card, what it accepts, its labels and figures."""
    for model in _chosen(load(config), name, version):
        typer.echo(f"{model.name} {model.version}  ({model.path})")
        typer.echo(f"sha256: {model.digest}")
        for key, value in dataclasses.asdict(model.accepts).items():
            typer.echo(f"accepts {key.replace('_', ' ')}: {_words(value)}")
        for label in model.labels:
            code = f"{label.code.value}, {label.code.scheme}, {label.code.meaning}"
            typer.echo(f"label: {label.key}, threshold {label.threshold:g} ({code})")
        _show_figures(model)
        card = model.path / "README.md"
        if card.is_file():
            typer.echo(f"\n{card.read_text()}")


def _words(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    if not value:
        return "any"
    return ", ".join("not stated" if part == "" else str(part) for part in value)


def _show_figures(model: Model) -> None:
    file = model.path / "evaluation.json"
    if not file.is_file():
        return
    found = json.loads(file.read_text())
    for item in found.get("compressed", {}).get("labels", []):
        what = f"{item['label']}, {item['images']} images"
        aucs = f"AUC {item['auc_after']:.3f}, before {item['auc_before']:.3f}"
        largest = item["largest_change"]
        typer.echo(f"8 bits: {what}: {aucs}; probabilities change by {largest:.3f} at most")
    for item in found.get("figures", []):
        value, low, high = item["figures"]["auc"]
        what = f"{item['label']}, {item['group']}, {item['images']} images"
        typer.echo(f"test: {what}: AUC {value:.3f} ({low:.3f} to {high:.3f})")


@app.command()
def verify(name: Name, version: Version = None, config: Config = None) -> None:
    """Whether the weights are, byte for byte, the ones that the package names."""
    for model in _chosen(load(config), name, version):
        package.verify(model)
        typer.echo(f"{model.name} {model.version}: good")


@app.command()
def activate(
    name: Name,
    version: Annotated[str, typer.Argument(help="see 'dicomai model list'")],
    config: Config = None,
) -> None:
    """Score with this version from now on; a running daemon takes it between two batches."""
    settings = load(config)
    (model,) = _chosen(settings, name, version)
    # What cannot be loaded would stop the analysis.
    from dicomai.infer.engine import try_out

    try_out(model)
    store = connect(settings)
    with audited(settings, store, "model activate", detail=f"{name} {version}"):
        if note(store, model) != model.digest:
            raise Misuse(f"{model.path} is not the {name} {version} that the database knows")
        before = registry.activate(store, name, version, "by a person")
    typer.echo(f"{name} {version} is active" + (f", {before} was before" if before else " already"))


@app.command()
def rollback(name: Name, config: Config = None) -> None:
    """Go back to the version that was active before; again, and it goes further back."""
    settings = load(config)
    store = connect(settings)
    with audited(settings, store, "model rollback", detail=name):
        withdrawn, active = registry.rollback(store, name)
    typer.echo(f"{name} {active} is active again, {withdrawn} is withdrawn")


@app.command("compress")
def compress_model(
    name: Name,
    version: Annotated[str | None, typer.Argument(help="[default: the active one]")] = None,
    config: Config = None,
) -> None:
    """Make an 8-bit version for processors; it is installed only where it says nearly the same.

    It is calibrated with labelled images of the training split, and held against the model that it
    was made of on those of the test split; a candidate until 'dicomai model activate'.
    """
    settings = load(config)
    store = join(settings)
    register_installed(settings, store)
    version = version or registry.active_version(store, name)
    if version is None:
        raise Misuse(f"no version of {name} is active: name one of 'dicomai model list'")
    (model,) = _chosen(settings, name, version)
    with audited(settings, store, "model compress", detail=f"{name} {version}"):
        done = _compressed(settings, store, model)
        note(store, done.model)
    for label in done.labels:
        typer.echo(str(label))
    typer.echo(
        f"{name} {done.model.version} is installed, {done.after:.0f} images/s where {version} "
        f"scores {done.before:.0f}: 'dicomai model activate' uses it"
    )


def _compressed(settings: Settings, store: Database, model: Model) -> "Compressed":
    from dicomai import compressing

    console = Console(stderr=True, highlight=False)

    def follow(words: str, items: Iterable[object], count: int) -> Iterable[object]:
        live = console.is_terminal
        return track(items, words, count, console=console, transient=True, disable=not live)

    def say(words: str) -> None:
        console.print(words, soft_wrap=True)

    return compressing.compress(settings, store, model, compressing.Watch(say, follow))


@app.command("export")
def export_model(
    name: Name,
    version: Annotated[str, typer.Argument(help="see 'dicomai model list'")],
    file: Annotated[Path, typer.Argument(help="a new .zip file")],
    config: Config = None,
) -> None:
    """Write a package as one file, for 'dicomai model import' at another site."""
    from dicomai.packing import pack

    settings = load(config)
    (model,) = _chosen(settings, name, version)
    with audited(settings, connect(settings), "model export", detail=f"{name} {version}"):
        pack(model, file)
    typer.echo(f"wrote {file}")


@app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(help="of 'model export'; with --describe, weights")],
    describe: Annotated[
        str | None,
        typer.Option(help="torchxrayvision, or a model.toml without sha256: FILE is a state_dict"),
    ] = None,
    config: Config = None,
) -> None:
    """Install a package; it is a candidate until 'dicomai model activate'.

    Weights are read without running anything that they hold.
    """
    settings = load(config)
    store = connect(settings)
    register_installed(settings, store)  # so that what is imported is not the first one
    with audited(settings, store, "model import", detail=file.name):
        known = partial(registry.sha256_of, store)
        model = _imported(file, describe, settings.data_dir / "models", known)
        note(store, model)
    typer.echo(f"{model.name} {model.version} is installed: 'dicomai model activate' uses it")


def _imported(
    file: Path, describe: str | None, models: Path, known: Callable[[str, str], str | None]
) -> Model:
    if describe is None:
        from dicomai.packing import unpack

        return unpack(file, models, known)
    from dicomai import importing

    return importing.take(file, importing.description(describe), models)


def _chosen(settings: Settings, name: str, version: str | None) -> list[Model]:
    found = [
        model
        for model in package.installed(model_folders(settings))
        if model.name == name and version in {None, model.version}
    ]
    if not found:
        raise Misuse(f"model {name} {version or ''} is not installed: see 'dicomai model list'")
    return found
