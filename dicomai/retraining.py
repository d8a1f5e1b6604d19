"""The process that learns: gather, train, judge, and let the gate decide; one at a time."""

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
import torch
from sqlalchemy.exc import SQLAlchemyError

from dicomai.errors import DicomaiError, LeaseLost, Rejected, Stopped
from dicomai.infer import package
from dicomai.infer.network import NetworkWithMaps
from dicomai.prepare.pool import Pool
from dicomai.prepare.sample import sample
from dicomai.roles import choose_model, first_line, model_folders
from dicomai.scoring import decoding_pool, limits, open_engine
from dicomai.settings import Settings
from dicomai.store import queries, registry, runs, truth
from dicomai.store.database import Database
from dicomai.store.runs import Run
from dicomai.store.truth import Candidate
from dicomai.study import Model
from dicomai.train import ancestry, judge, page
from dicomai.train.ancestry import PUBLIC, Ancestry
from dicomai.train.dataset import RECEIVED, Data, Gathered, gather, subgroups
from dicomai.train.evaluate import Array
from dicomai.train.gate import Decision, Rule, decide
from dicomai.train.loop import Epoch, Step, train
from dicomai.train.publish import Origin, publish, rounded
from dicomai.train.recipe import Recipe
from dicomai.train.start import begin

if TYPE_CHECKING:
    from dicomai.train.search import Trial

log = structlog.get_logger()

LOOK_SECONDS = 2.0  # between looks at what the daemon has to do
LONGEST_PAUSE = 60.0  # of the training, for the daemon's work
PAGE = "report.html"


@dataclass(frozen=True, slots=True)
class Watch:
    """How a person follows a training: steps, epochs, and counted work with its name."""

    step: Callable[[Step], None]
    epoch: Callable[[Epoch], None]
    say: Callable[[str], None]
    track: Callable[[str, Iterable[object], int], Iterable[object]]


@dataclass(frozen=True, slots=True)
class Search:
    """How many recipes near the given one are tried first, in how many seconds at most."""

    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a training; model: the package, None of a dry run."""

    run: int
    decision: Decision
    promoted: bool
    model: Model | None
    page: Path


def retrain(
    settings: Settings,
    database: Database,
    recipe: Recipe,
    searched: Search | None,
    dry_run: bool,
    watch: Watch,
    stop: threading.Event,
) -> Outcome:
    """Train, judge and decide; the active model is untouched until the gate lets another pass.

    Raises Stopped where stop is set: the same call goes on from the last checkpoint. Raises Misuse
    where there is too little to learn from, or another training is running.
    """
    parent = choose_model(settings, database)
    text = recipe.as_text(asdict(searched) if searched else None)
    run = runs.begin(database, parent.name, parent.version, text, dry_run)
    folder = settings.data_dir / "training" / str(run.id)
    _forget_others(folder)
    keeper = _Keeper(database, run, stop)
    try:
        with keeper, decoding_pool(settings) as pool:
            outcome = _Training(
                settings, database, recipe, searched, parent, run, folder, pool, watch, keeper
            ).run()
    except Stopped as error:
        if not keeper.lost:
            runs.end(database, run, "stopped", str(error))
        raise
    except LeaseLost:
        raise
    except (OSError, SQLAlchemyError) as error:  # disk or database: it may be better later
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        words = f"{first_line(error)}; the same call goes on"
        if full:
            words = f"no space is left in {settings.data_dir}: make room, and the same call goes on"
        with suppress(SQLAlchemyError):  # else its lease runs out
            runs.end(database, run, "stopped", words)
        raise Stopped(words) from error
    except Exception as error:  # the run is not to stay open, whatever it was: it goes on to fail
        words = str(error) if isinstance(error, DicomaiError) else type(error).__name__
        runs.end(database, run, "failed", words)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return outcome


def _forget_others(folder: Path) -> None:
    """Remove the checkpoints of trainings that were given up; their pages stay."""
    for other in folder.parent.glob("*/"):
        if other != folder:
            _tidy(other)


def _tidy(folder: Path) -> None:
    """Leave only the page."""
    for left in folder.iterdir():
        if left.name != PAGE:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


class _Keeper:
    """Renews the lease while the training works; sets stop where it is lost."""

    def __init__(self, database: Database, run: Run, stop: threading.Event) -> None:
        self._database, self._run, self.stop = database, run, stop
        self.lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> "_Keeper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._ended.wait(runs.LEASE_SECONDS / 6):
            try:
                runs.renew(self._database, self._run)
            except LeaseLost:
                self.lost = True
                self.stop.set()
                return
            except SQLAlchemyError as error:  # the database may be away for a while
                log.error("not_renewed", error=type(error).__name__)


class _Training:
    """One run, step by step."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        recipe: Recipe,
        searched: Search | None,
        parent: Model,
        run: Run,
        folder: Path,
        pool: Pool,
        watch: Watch,
        keeper: _Keeper,
    ) -> None:
        self._keeper = keeper
        self._settings, self._database, self._recipe = settings, database, recipe
        self._searched = searched
        self._trials: tuple[Trial, ...] = ()
        self._parent, self._run, self._folder = parent, run, folder
        self._ancestry = ancestry.read(parent.path)
        self._pool, self._watch = pool, watch
        is_wanted = settings.infer.device in {"auto", "cuda"}
        self._device = torch.device("cuda" if is_wanted and torch.cuda.is_available() else "cpu")
        self._looked = 0.0
        torch.set_flush_denormal(True)

    def run(self) -> Outcome:
        """From labels to a decision."""
        gathered = self._gather()
        data = gathered.data
        self._watch.say(counts(gathered))
        runs.note_data(self._database, self._run, data.digest(), len(data))
        self._folder.mkdir(parents=True, exist_ok=True)
        place = self._choose_recipe(data) if self._searched else self._folder
        network, epochs = self._fit(self._recipe, data, place, self._told)
        if self._searched:  # which tells nobody of its trials' epochs
            for epoch in epochs:
                runs.note_epoch(self._database, self._run, asdict(epoch))
        return self._judge(network, epochs, gathered)

    def _fit(
        self, recipe: Recipe, data: Data, folder: Path, tell: Callable[[Step | Epoch], None]
    ) -> tuple[NetworkWithMaps, list[Epoch]]:
        network = begin(recipe, self._parent).to(self._device)
        stop = self._keeper.stop
        train_on, check_on = data.of("train"), data.of("val")
        return network, train(network, train_on, check_on, recipe, folder, tell, stop)

    def _choose_recipe(self, data: Data) -> Path:
        """Try recipes; the best one's training, in the folder returned, is gone on with."""
        from dicomai.train.search import search

        assert self._searched is not None

        def fit(recipe: Recipe, folder: Path, report: Callable[[Epoch], None]) -> list[Epoch]:
            def told(what: Step | Epoch) -> None:
                if isinstance(what, Epoch):
                    report(what)
                else:
                    self._watch.step(what)
                    self._yield()

            return self._fit(recipe, data, folder, told)[1]

        how = self._searched
        found = search(self._recipe, how.count, how.seconds, self._folder, fit, self._watch.say)
        self._recipe, self._trials = found.recipe, found.trials
        return found.folder

    def _told(self, what: Step | Epoch) -> None:
        if isinstance(what, Epoch):
            runs.note_epoch(self._database, self._run, asdict(what))
            self._watch.epoch(what)
        else:
            self._watch.step(what)
            self._yield()

    def _yield(self) -> None:
        """Wait while studies are waiting: they come first."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        while time.monotonic() - now < LONGEST_PAUSE and queries.is_scoring(self._database):
            time.sleep(0.5)
        self._looked = time.monotonic()

    # What is learnt from

    def _gather(self) -> Gathered:
        recipe = self._recipe
        gathered = gather(
            truth.candidates(self._database, recipe.keys),
            recipe.keys,
            max(recipe.size, *(phase.size or 0 for phase in recipe.phases)),
            self._parent.accepts,
            partial(file_of, self._settings),
            self._pool,
            limits(self._settings),
            truth.splits(self._database),
            learnt_here(self._database, self._ancestry),
            self._ancestry.fingerprints,
            self._track,
        )
        truth.keep_splits(self._database, gathered.chosen)
        return gathered

    def _track(self, items: Iterable[object], count: int) -> Iterator[object]:
        for item in self._watch.track("reading images", items, count):
            if self._keeper.stop.is_set():
                raise Stopped("training was stopped while it read its images")
            yield item

    # How good it is

    def _judge(
        self,
        network: NetworkWithMaps,
        epochs: list[Epoch],
        gathered: Gathered,
    ) -> Outcome:
        recipe, data = self._recipe, gathered.data
        self._watch.say("judging the candidate")
        size = recipe.phases[-1].size or recipe.size
        check, test = (data.of(split).at(size) for split in ("val", "test"))
        plain = judge.probabilities(judge.exact(network, test, recipe), recipe.kind)
        scales = judge.calibrate(network, check, recipe)
        final = rounded(network, recipe)
        scores = {
            name: judge.probabilities(judge.exact(final, part, recipe), recipe.kind)
            for name, part in (("val", check), ("test", test))
        }
        thresholds = judge.choose_thresholds(scores["val"], check, recipe)
        evaluation = judge.evaluate(plain, scores["test"], test, thresholds, scales, recipe)
        before = self._scores_of_parent(test)
        decision = self._decide(test, before, scores["test"])
        self._go_on()
        version = next_version(self._settings, self._database, self._parent.name)
        path = page.write(
            self._folder / PAGE,
            page.Story(
                run=self._run.id,
                name=self._parent.name,
                version=version,
                parent=self._parent.version,
                recipe=recipe,
                epochs=tuple(epochs),
                data=data,
                test=test,
                left_out=gathered.left_out,
                evaluation=evaluation,
                before=before,
                decision=decision,
                dry_run=self._run.dry_run,
                network=final,
                trials=self._trials,
            ),
        )
        self._go_on()
        if self._run.dry_run:
            runs.end(self._database, self._run, "done", decision.words, decision.would)
            promoted, model = False, None
        else:
            measured = {**evaluation.as_json(), "gate": decision.as_json(self._parent.version)}
            model = self._publish(final, size, thresholds, measured, data, version)
            promoted = runs.conclude(
                self._database, self._run, version, model.sha256, decision.promoted, decision.words
            )
        _tidy(self._folder)
        return Outcome(self._run.id, decision, promoted, model, path)

    def _go_on(self) -> None:
        if self._keeper.stop.is_set():
            raise Stopped("training was stopped while it was judged; it goes on from there")

    def _scores_of_parent(self, test: Data) -> Array:
        """What the active model says of the same images; a label that it does not know is NaN."""
        engine = open_engine(self._settings, self._parent)
        squares = self._at(test, self._parent.preprocessing.size)
        found = np.full(test.targets.shape, np.nan)
        known = {label.key: index for index, label in enumerate(self._parent.labels)}
        scores = judge.said_by(engine.score, self._parent, squares)
        for index, key in enumerate(self._recipe.keys):
            if key in known:
                found[:, index] = scores[:, known[key]]
        return found

    def _at(self, test: Data, size: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
        """The test images at the active model's size, from the files, as it would be shown them."""
        if test.images.shape[1] == size:
            return test.images
        calls = [(Path(str(path)), None, size, limits(self._settings)) for path in test.paths]
        squares = []
        for number, done in zip(test.numbers, self._pool.map(sample, calls), strict=True):
            if isinstance(done, Rejected):
                raise done
            squares.append(next(item.pixels for item in done if item.number == number))
        return np.stack(squares)

    def _decide(self, test: Data, before: Array, after: Array) -> Decision:
        how = self._settings.retrain
        active = registry.active_version(self._database, self._parent.name)
        against = [
            f"the active model says {label.key}, the recipe does not"
            for label in self._parent.labels
            if label.key not in self._recipe.keys
        ]
        if active != self._parent.version:
            against.append(f"version {active} is active, and not {self._parent.version}")
        return decide(
            self._recipe.keys,
            test.targets,
            before,
            # Both as precisely as the daemon says them, or one of them would have fewer ties.
            after.astype(np.float32).astype(np.float64),
            test.patients,
            subgroups(test, judge.GROUPS),
            Rule(how.min_gain, how.margin, self._recipe.judgement.resamples, self._recipe.seed),
            against,
        )

    def _publish(
        self,
        network: NetworkWithMaps,
        size: int,
        thresholds: dict[str, float],
        measured: Mapping[str, Any],
        data: Data,
        version: str,
    ) -> Model:
        mine = data.where(data.splits != "test")
        phases = ", ".join(
            f"{p.epochs} epochs from {p.fine_tune_from}" for p in self._recipe.phases
        )
        origin = Origin(
            training=f"run {self._run.id}, seed {self._recipe.seed}: at most {phases}",
            data_digest=data.digest(),
            parent=f"{self._parent.name} {self._parent.version}",
            ancestry=self._ancestry.with_more(
                queries.site_uid(self._database), mine.patients.tolist(), mine.fingerprints
            ),
        )
        return publish(
            network,
            self._recipe,
            size,
            self._parent.accepts,
            thresholds,
            measured,
            origin,
            self._parent.name,
            version,
            self._settings.data_dir / "models",
        )


def file_of(settings: Settings, item: Candidate) -> Path:
    """Where a labelled image lies."""
    return settings.data_dir / item.path if item.source == RECEIVED else Path(item.path)


def learnt_here(database: Database, ancestry: Ancestry) -> frozenset[str]:
    """The keys that patients of its ancestors have here; those of other sites mean nothing."""
    mine = ancestry.patients.get(queries.site_uid(database), frozenset())
    public = ancestry.patients.get(PUBLIC, frozenset())
    return mine | truth.patients_of(database, public)


def next_version(settings: Settings, database: Database, name: str) -> str:
    """One more than the highest number that a version of a model has, here or in the database."""
    here = [m.version for m in package.installed(model_folders(settings)) if m.name == name]
    known = [row["version"] for row in registry.models(database) if row["name"] == name]
    numbers = [int(version) for version in (*here, *known) if version.isdigit()]
    return str(max(numbers, default=0) + 1)


def counts(gathered: Gathered) -> str:
    """How many images and patients each split has, and what was left out."""
    data = gathered.data
    parts = [
        f"{split} {len(data.of(split))} images of {len(set(data.of(split).patients))} patients"
        for split in ("train", "val", "test")
    ]
    left = [f"{count} {why}" for why, count in gathered.left_out.items()]
    return ", ".join(parts) + (f"; left out: {', '.join(left)}" if left else "")
