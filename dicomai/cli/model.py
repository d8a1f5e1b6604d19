"""model list, show, verify."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from dicomai.cli.options import Config, Format, FormatOption, load, show
from dicomai.errors import DicomaiError, Misuse
from dicomai.infer import package
from dicomai.roles import connect, model_folders
from dicomai.settings import Settings
from dicomai.store import queries
from dicomai.study import Model

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
        rows = queries.models(connect(settings))
    except DicomaiError:  # the packages can be listed without a database
        return {}
    return {(row["name"], row["version"]): row["state"] for row in rows}


@app.command("show")
def show_model(name: Name, version: Version = None, config: Config = None) -> None:
    """A package's card, what it accepts, its labels and figures."""
    for model in _chosen(load(config), name, version):
        typer.echo(f"{model.name} {model.version}  ({model.path})")
        typer.echo(f"sha256: {model.sha256}")
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
    for source, figures in json.loads(file.read_text()).get("sources", {}).items():
        low, high = figures["auc_95"]
        typer.echo(f"test {source}: AUC {figures['auc']} ({low} to {high}), n {figures['images']}")


@app.command()
def verify(name: Name, version: Version = None, config: Config = None) -> None:
    """Whether the weights are, byte for byte, the ones that the package names."""
    for model in _chosen(load(config), name, version):
        package.verify(model)
        typer.echo(f"{model.name} {model.version}: good")


def _chosen(settings: Settings, name: str, version: str | None) -> list[Model]:
    found = [
        model
        for model in package.installed(model_folders(settings))
        if model.name == name and version in {None, model.version}
    ]
    if not found:
        raise Misuse(f"model {name} {version or ''} is not installed: see 'dicomai model list'")
    return found
