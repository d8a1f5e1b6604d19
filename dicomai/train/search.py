"""Recipes near a given one, tried one after the other with Optuna (Akiba et al., KDD 2019)."""

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from dicomai.train.loop import Epoch
from dicomai.train.recipe import Recipe

JOURNAL = "search.journal"
FACTORS = (0.3, 3.0)  # of learning rates and weight decay
STRENGTHS = (0.5, 1.5)  # of the augmentation's bounds
MOST_DROPOUT, MOST_SMOOTHING = 0.5, 0.2
FIRST_UNPRUNED = 4  # trials, before one may be given up for being worse than their median
UNENDED = (TrialState.RUNNING, TrialState.FAIL)

# Train a recipe in a folder, telling each epoch; raises what the telling raises, or Stopped.
Fit = Callable[[Recipe, Path, Callable[[Epoch], None]], list[Epoch]]


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe that was tried; val_loss: the smallest, None where it was given up."""

    number: int
    val_loss: float | None
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Found:
    """The recipe with the smallest validation loss, the folder of its training, and all trials."""

    recipe: Recipe
    folder: Path
    trials: tuple[Trial, ...]


def search(
    recipe: Recipe, count: int, seconds: float, folder: Path, fit: Fit, say: Callable[[str], None]
) -> Found:
    """Try the recipe itself, then others; the smallest loss on the validation split is the best.

    seconds: for all of them, but the first is tried to its end. What is stopped, or was killed,
    goes on with the same call.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        study_name="recipe",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=recipe.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST_UNPRUNED),
    )
    study.enqueue_trial(_as_it_is(recipe), skip_if_exists=True)
    for trial in study.get_trials(states=UNENDED):
        study.enqueue_trial(trial.params)
    ended = _ended(study)
    deadline = time.monotonic() + seconds - sum(_seconds(trial) for trial in ended)

    def attempt(trial: optuna.Trial) -> float:
        tried = _variant(recipe, trial)

        def told(epoch: Epoch) -> None:
            trial.report(epoch.val_loss, epoch.phase * 10_000 + epoch.number)
            is_late = time.monotonic() > deadline and _complete(study)
            if is_late or trial.should_prune():
                raise optuna.TrialPruned

        try:
            epochs = fit(tried, _place(folder, tried), told)
        except optuna.TrialPruned:
            shutil.rmtree(_place(folder, tried), ignore_errors=True)
            say(f"trial {trial.number + 1}: given up")
            raise
        return smallest_loss(tried, epochs)

    def forget_worse(study: optuna.Study, trial: FrozenTrial) -> None:
        """A checkpoint is large, and only the best one is gone on with."""
        if trial.state != TrialState.COMPLETE:
            return
        best = study.best_trial
        say(
            f"trial {trial.number + 1}: validation loss {trial.value:.4f}, "
            f"the best is trial {best.number + 1} with {best.value:.4f}"
        )
        for other in _complete(study):
            if other.number != best.number:
                place = _place(folder, _variant(recipe, other))
                shutil.rmtree(place, ignore_errors=True)

    while len(ended) < count and (time.monotonic() < deadline or not _complete(study)):
        study.optimize(attempt, n_trials=1, callbacks=[forget_worse])
        ended = _ended(study)
    best = _variant(recipe, study.best_trial)
    return Found(
        best, _place(folder, best), tuple(Trial(t.number + 1, t.value, t.params) for t in ended)
    )


def smallest_loss(recipe: Recipe, epochs: list[Epoch]) -> float:
    """On the validation split, of all epochs at the last phase's size: others do not compare."""
    sizes = [phase.size for phase in recipe.phases]
    return min(epoch.val_loss for epoch in epochs if sizes[epoch.phase] == sizes[-1])


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def _seconds(trial: FrozenTrial) -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,))


def _place(folder: Path, recipe: Recipe) -> Path:
    """By what is tried, so that a trial which was killed goes on under another number."""
    place = folder / hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:12]
    place.mkdir(exist_ok=True)
    return place


def _as_it_is(recipe: Recipe) -> dict[str, float]:
    return {
        "learning_rate": 1.0,
        "l2": 1.0,
        "augmentation": 1.0,
        "dropout": recipe.loss.dropout,
        "label_smoothing": recipe.loss.label_smoothing,
    }


def _variant(recipe: Recipe, trial: optuna.Trial | FrozenTrial) -> Recipe:
    """The recipe with other learning rates, weight decay, dropout, smoothing and augmentation."""
    loss, bounds = recipe.loss, recipe.augmentation
    rate = trial.suggest_float("learning_rate", *FACTORS, log=True)
    decay = trial.suggest_float("l2", *FACTORS, log=True)
    strength = trial.suggest_float("augmentation", *STRENGTHS)
    dropout = trial.suggest_float("dropout", 0, max(MOST_DROPOUT, loss.dropout))
    smoothing = trial.suggest_float("label_smoothing", 0, max(MOST_SMOOTHING, loss.label_smoothing))
    stronger = {
        name: min(getattr(bounds, name) * strength, most)
        for name, most in (
            ("rotation_degrees", 20.0),
            ("shift", 0.2),
            ("zoom", 0.9),
            ("aspect", 0.9),
            ("brightness", 0.9),
            ("contrast", 0.9),
        )
    }
    phases = [
        phase.model_copy(update={"learning_rate": phase.learning_rate * rate})
        for phase in recipe.phases
    ]
    changed = {"l2": loss.l2 * decay, "dropout": dropout, "label_smoothing": smoothing}
    return recipe.model_copy(
        update={
            "loss": loss.model_copy(update=changed),
            "augmentation": bounds.model_copy(update=stronger),
            "phases": tuple(phases),
        }
    )
