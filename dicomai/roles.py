"""What all processes share: database and folder, models, signals, and how they wait.

Trouble with disk or database waits; whatever else goes wrong fails the one piece of work (worker,
sending, upkeep), and there, as in the C-STORE handler, exceptions are caught broadly. What slips
through even so waits like trouble: a role goes on (work_until).
"""

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dicomai import node
from dicomai.errors import ModelDamaged
from dicomai.infer import package
from dicomai.settings import Destination, Settings, shipped
from dicomai.store import queries, registry
from dicomai.store.changes import Changes
from dicomai.store.database import Database, open_database, require_current
from dicomai.study import WITHDRAWAL, Code, Model, Reporting
from dicomai.train import recipe

log = structlog.get_logger()

LOOK_UP_SECONDS = 1.0
TROUBLE_SECONDS = 5.0
FINISH_SECONDS = 7.0  # of the ten that a stop may take


def stop_on_signal() -> threading.Event:
    """Set by SIGTERM and SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def wait_for(stop: threading.Event) -> None:
    """Until it is set.

    Not one long wait: a signal that the kernel gives to another thread wakes nobody, and its
    handler runs only when the main thread looks up.
    """
    while not stop.wait(LOOK_UP_SECONDS):
        pass


def connect(settings: Settings) -> Database:
    """The database, refused unless its schema is this code's."""
    database = open_database(settings.database.url)
    require_current(database, shipped("migrations"))
    return database


def join(settings: Settings) -> Database:
    """The database for a role: it works on the studies whose files lie in its own data folder."""
    database = connect(settings)
    database.node = node.join(settings.data_dir, queries.site_uid(database))
    return database


def model_folders(settings: Settings) -> tuple[Path, ...]:
    """Where model packages lie: the site's own first, then those that the program ships."""
    return settings.data_dir / "models", shipped("config/models")


def label_codes(settings: Settings) -> dict[str, Code]:
    """The labels that there are, with their codes: of the recipe and of all installed models."""
    labels = {label.key: label.as_code() for label in recipe.load(recipe_file(settings)).labels}
    models = package.installed(model_folders(settings))
    return labels | {label.key: label.code for model in models for label in model.labels}


def recipe_file(settings: Settings) -> Path:
    """The recipe of the settings, or the one that the program ships."""
    return settings.retrain.recipe or shipped("config/recipe.toml")


def outputs(settings: Settings) -> dict[str, frozenset[str]]:
    """Destination -> the kinds of results that it gets."""
    return {
        item.name: frozenset(item.outputs)
        | ({WITHDRAWAL} if item.withdraw == "key-object" else frozenset())
        for item in settings.destinations
    }


def reporting(settings: Settings) -> Reporting:
    """What is made: all that any destination gets, and without one what a new one would get."""
    chosen = [item.outputs for item in settings.destinations]
    kinds = chosen or [Destination.model_fields["outputs"].default]
    how = settings.report
    return Reporting(
        how.layout,
        how.undetermined_margin,
        how.largest_side,
        frozenset(kind for one in kinds for kind in one),
    )


def choose_model(settings: Settings, database: Database) -> Model:
    """The active version, verified; where none is, register_installed() has made one active.

    Where the active one is not in this folder, as after a training of another daemon of the
    database, the last one before it that is: the work goes on, and every result names its version.
    """
    name = settings.infer.model
    found = register_installed(settings, database)
    if not found:
        folders = " or ".join(str(folder) for folder in model_folders(settings))
        raise ModelDamaged(f"there is no model '{name}' in {folders}: correct infer.model")
    active = registry.active_version(database, name)
    if active is None:
        raise ModelDamaged(f"no version of {name} is active: see 'dicomai model activate'")
    here = [v for v in (active, *registry.earlier_versions(database, name)) if v in found]
    if not here:
        raise ModelDamaged(f"the active version {active} of {name} is not installed: install it")
    chosen = found[here[0]]
    package.verify(chosen)
    if chosen.version != active:
        log.error("active_version_not_here", name=name, active=active, instead=chosen.version)
    return chosen


def installed_versions(settings: Settings) -> list[Model]:
    """The packages of infer.model, unverified; first the one to use where none is active.

    That is the newest that ships, else the first of the site's own: the newest of those may be a
    candidate that the gate has refused.
    """
    name = settings.infer.model
    ships = [m.version for m in package.installed((shipped("config/models"),)) if m.name == name]
    mine = [model for model in package.installed(model_folders(settings)) if model.name == name]
    return sorted(mine, key=lambda m: (m.version not in ships[-1:], m.int8 is not None))


def register_installed(settings: Settings, database: Database) -> dict[str, Model]:
    """Note the installed versions of infer.model: version -> package, unverified.

    Where none is active, the first of them that is not compressed becomes it.
    One that is not what the database knows by its version is left out, unless it is the active one.
    """
    name, found = settings.infer.model, {}
    for model in installed_versions(settings):
        if note(database, model) == model.digest:
            found[model.version] = model
            continue
        words = (
            f"{model.path} is not the {name} {model.version} that the database knows: "
            "give it another version"
        )
        if model.version == registry.active_version(database, name):
            raise ModelDamaged(words)
        log.error("package_left_out", reason=words)
    return found


def note(database: Database, model: Model) -> str:
    """Register a package; a compressed one never becomes active by itself.

    Returns the SHA-256 on record.
    """
    register = registry.register if model.int8 is None else registry.register_candidate
    return register(database, model.name, model.version, model.digest)


def work_until(
    stop: threading.Event,
    database: Database,
    step: Callable[[], bool],
    seconds_to_due: Callable[[], float],
    pause_seconds: float = 0.0,
) -> None:
    """Call step again and again: at once while it finds work, else when there may be some.

    That is when somebody has changed the database, or when something becomes due; but not sooner
    than after pause_seconds.
    """
    changes = Changes(database)
    while not stop.is_set():
        try:
            changes.begin()
            if not step():
                stop.wait(pause_seconds)
                changes.wait(stop, seconds_to_due())
        except (SQLAlchemyError, OSError) as error:
            log.error("trouble", error=type(error).__name__, detail=first_line(error))
            stop.wait(TROUBLE_SECONDS)
        except Exception:  # one step fails: without its thread nothing would be done any more
            log.exception("trouble")
            stop.wait(TROUBLE_SECONDS)
    changes.close()


def first_line(error: BaseException) -> str:
    """An error in one line; of a database error only the driver's words, never the values."""
    inner = getattr(error, "orig", None) or error
    lines = str(inner).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
