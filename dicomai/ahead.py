"""What is made of the images of studies that are still arriving, so that it is there in time.

The study's claim stays the only job: what is made here means nothing before that claim takes it,
may be lost at any time, and is then made again.
"""

import threading
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dicomai import durable
from dicomai.analyze import Context, Part, Scorer, analyze_images
from dicomai.errors import Rejected
from dicomai.store import queries, queue
from dicomai.store.database import Database
from dicomai.study import Instance

MOST_IMAGES = 48  # that are kept: each takes up to 1.5 MB, and its result files
AT_ONCE = 4
LONGEST_SECONDS = 500.0  # that one is kept: the sweep removes files after 600

Made = Part | Rejected


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image that is made, or will be."""

    made: "Future[Made]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Ahead:
    """Prepares, scores and draws images before their study is due."""

    def __init__(
        self,
        database: Database,
        scorer: Scorer,
        data_dir: Path,
        outputs: Mapping[str, Collection[str]],
    ) -> None:
        self._database = database
        self._scorer = scorer
        self._data_dir = data_dir
        self._outputs = outputs
        self._entries: dict[Instance, _Entry] = {}
        self._lock = threading.Lock()

    def step(self) -> bool:
        """Make some images of one study that is arriving; False where there are none.

        Whoever dies over them has tried that study once.
        """
        uid, chosen = self._choose()
        if not chosen:
            return False
        try:
            if queue.begin_ahead(self._database, uid):
                self._make(uid, chosen)
                queue.end_ahead(self._database, uid)
        finally:
            self._let_go(chosen)
        return True

    def _choose(self) -> tuple[str, dict[Instance, _Entry]]:
        """The first study, a stat one before all others, with images of which nothing is known."""
        with self._lock:
            self._forget_old()
            room = min(AT_ONCE, MOST_IMAGES - len(self._entries))
            if room > 0:
                for uid, instances in queries.arriving(self._database, self._data_dir).items():
                    new = [item for item in instances if item not in self._entries][:room]
                    if new:
                        chosen = {item: _Entry() for item in new}
                        self._entries |= chosen
                        return uid, chosen
        return "", {}

    def _forget_old(self) -> None:
        """What nobody has taken: its study was removed, or is of two patients, or changed."""
        before = time.monotonic() - LONGEST_SECONDS
        old = [item for item, entry in self._entries.items() if entry.since < before]
        remove(self._entries.pop(item) for item in old)

    def _make(self, uid: str, chosen: Mapping[Instance, _Entry]) -> None:
        model, engine = self._scorer.algorithm.model, self._scorer.algorithm.engine
        instances = tuple(chosen)
        context = Context(
            queries.scores(self._database, instances, model.name, model.version, engine),
            (),
            self._outputs,
            datetime.now(UTC),
            self._data_dir / "results" / uid,
            f".{uuid.uuid4()}{durable.TEMPORARY}",
        )
        made = analyze_images(instances, self._scorer, context)
        for entry, part in zip(chosen.values(), made, strict=True):
            entry.made.set_result(part)

    def _let_go(self, chosen: Mapping[Instance, _Entry]) -> None:
        """Nobody is to wait for what was not made."""
        for item, entry in chosen.items():
            if not entry.made.done():
                entry.made.cancel()
                with self._lock:
                    self._entries.pop(item, None)

    def take(self, instances: Sequence[Instance]) -> dict[Instance, Made]:
        """What there is of these images, for their study's claim alone; what is begun is awaited.

        Its files are the taker's now, see discard().
        """
        with self._lock:
            taken = {x: self._entries.pop(x) for x in instances if x in self._entries}
        found = {}
        for item, entry in taken.items():
            try:
                made = entry.made.result()
            except CancelledError:
                continue
            if all(file.exists() for file in files(made)):
                found[item] = made
        return found

    def close(self) -> None:
        """Nobody takes anything any more."""
        with self._lock:
            entries, self._entries = self._entries, {}
        remove(entries.values())


def files(made: Made) -> list[Path]:
    """The files of what was made of an image."""
    return [] if isinstance(made, Rejected) else [item.path for item in made.results]


def discard(taken: Iterable[Made]) -> None:
    """Remove what was not published."""
    for made in taken:
        for file in files(made):
            file.unlink(missing_ok=True)


def remove(entries: Iterable[_Entry]) -> None:
    """Remove the files of what is, or will be, made."""
    for entry in entries:
        entry.made.add_done_callback(
            lambda future: None if future.cancelled() else discard([future.result()])
        )
