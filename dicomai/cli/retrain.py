"""retrain: learn from labels, prove it, and only then use it."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from dicomai import logs
from dicomai.audit import AuditCode
from dicomai.cli.options import Config, audited, load
from dicomai.roles import join, recipe_file
from dicomai.settings import Settings
from dicomai.store import runs
from dicomai.store.database import Database

if TYPE_CHECKING:
    from dicomai.retraining import Outcome, Watch
    from dicomai.train.loop import Epoch, Step


def retrain(
    config: Config = None,
    recipe: Annotated[Path | None, typer.Option(help="[default: retrain.recipe]")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="train and judge, but change nothing")
    ] = False,
    search: Annotated[
        int | None, typer.Option(min=1, help="try so many recipes near this one first (Optuna)")
    ] = None,
    search_hours: Annotated[float, typer.Option(min=0, help="for the search, at most")] = 8.0,
    stop: Annotated[
        bool, typer.Option("--stop", help="stop the training that runs; the next one goes on")
    ] = False,
    scheduled: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Train on what is labelled, and let the gate decide; Ctrl-C stops it, to go on later."""
    settings = load(config)
    store = join(settings)
    if stop:
        _stop(settings, store)
        return
    logs.configure("retrain")
    tried = (search, search_hours * 3600) if search else None
    with audited(settings, store, "retrain", None, AuditCode.APPLICATION_ACTIVITY, "E"):
        outcome = _retrain(settings, store, recipe, tried, dry_run, scheduled)
    _tell(outcome)


def _stop(settings: Settings, store: Database) -> None:
    with audited(settings, store, "retrain --stop", None, AuditCode.APPLICATION_ACTIVITY, "E"):
        stopped = runs.stop(store)
    typer.echo(f"training {stopped} stops" if stopped else "no training is running")


def _retrain(
    settings: Settings,
    store: Database,
    recipe: Path | None,
    tried: tuple[int, float] | None,
    dry_run: bool,
    scheduled: bool,
) -> "Outcome":
    from dicomai import retraining
    from dicomai.train.recipe import load as read_recipe

    read = read_recipe(recipe or recipe_file(settings))
    yield_to_others()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with _watch(scheduled) as watch:
        searched = retraining.Search(*tried) if tried else None
        return retraining.retrain(settings, store, read, searched, dry_run, watch, stopped)


def yield_to_others() -> None:
    """Whatever else this machine has to do goes first (sched(7)); not every container may."""
    os.nice(19)
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        return


@contextmanager
def _watch(quiet: bool) -> "Iterator[Watch]":
    """A live bar where there is a terminal; else a line for each epoch."""
    from dicomai.retraining import Watch

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    live = console.is_terminal and not quiet
    with Progress(*columns, console=console, disable=not live) as bars:
        where, task, reached = (-1, -1), TaskID(0), ""

        def step(now: "Step") -> None:
            nonlocal where, task
            if where != (now.phase, now.epoch):
                for old in bars.task_ids:
                    bars.update(old, visible=False)
                where = now.phase, now.epoch
                words = f"phase {now.phase + 1}, epoch {now.epoch + 1}"
                task = bars.add_task(words, total=now.of, told="")
            told = f"loss {now.loss:.4f}{reached}, {now.images_per_second:.0f} images/s"
            bars.update(task, completed=now.step, told=told)

        def epoch(done: "Epoch") -> None:
            nonlocal reached
            reached = f", accuracy {done.accuracy:.3f}, AUC {done.auc:.3f}"
            console.print(
                f"phase {done.phase + 1}, epoch {done.number}: loss {done.loss:.4f}, validation "
                f"{done.val_loss:.4f}, accuracy {done.accuracy:.3f}, AUC {done.auc:.4f}, "
                f"{done.images_per_second:.0f} images/s"
            )

        def track(words: str, items: Iterable[object], count: int) -> Iterable[object]:
            reading = bars.add_task(words, total=count, told="")
            for item in items:
                yield item
                bars.advance(reading)
            bars.update(reading, visible=False)

        yield Watch(step, epoch, console.print, track)


def _tell(outcome: "Outcome") -> None:
    decision = outcome.decision
    if outcome.model is None:
        words = "would be promoted" if decision.promoted else "would be kept as a candidate"
        typer.echo(f"training {outcome.run}: it {words}; nothing was changed")
    else:
        words = "promoted" if outcome.promoted else "kept as a candidate"
        typer.echo(f"training {outcome.run}: {outcome.model.name} {outcome.model.version} {words}")
    for reason in decision.reasons:
        typer.echo(f"  {reason}")
    typer.echo(f"report: {outcome.page}")
