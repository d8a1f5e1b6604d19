"""python -m dicomai.train FOLDER: train a model from scratch and publish its package."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dicomai import logs
from dicomai.errors import DicomaiError
from dicomai.settings import shipped
from dicomai.train.dataset import read_samples
from dicomai.train.loop import train
from dicomai.train.publish import publish, refuse_existing
from dicomai.train.recipe import Recipe, load


def main(
    folder: Annotated[Path, typer.Argument(help="folder with labels.csv and its images")],
    out: Annotated[Path, typer.Option(help="folder of model packages")] = Path("var/models"),
    name: Annotated[str, typer.Option(help="name of the model")] = "chest-starter",
    version: Annotated[str, typer.Option(help="its new version")] = "1",
    recipe: Annotated[Path | None, typer.Option(help="default: config/recipe.toml")] = None,
) -> None:
    """Train, choose on val, measure on test, write OUT/NAME/VERSION."""
    try:
        _train(folder, out, name, version, load(recipe or shipped("config/recipe.toml")))
    except DicomaiError as error:
        typer.echo(f"dicomai: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def _train(folder: Path, out: Path, name: str, version: str, recipe: Recipe) -> None:
    logs.configure("train")
    torch.set_flush_denormal(True)
    refuse_existing(out, name, version)
    samples = read_samples(folder, recipe.labels[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = sum(s.split == "train" for s in samples) // recipe.batch_size
    total = sum(phase.epochs for phase in recipe.phases) * steps
    columns = (TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=total, loss=float("nan"))
        trained = train(
            samples, recipe, device, lambda _s, _n, loss: bar.update(task, advance=1, loss=loss)
        )
    model = publish(trained, samples, recipe, name, version, out)
    typer.echo(f"wrote {model.path}")


if __name__ == "__main__":
    typer.run(main)
