"""One thread owns the device; callers block while their images share its batches."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import structlog

from dicomai.errors import OutOfMemory
from dicomai.study import Float32

log = structlog.get_logger()

Scored = tuple[Float32, Float32]


@dataclass(eq=False, slots=True)
class _Call:
    """Somebody's images, how many of them have been taken, and what was said of those."""

    images: Float32
    stat: bool = False
    taken: int = 0
    parts: list[Scored] = field(default_factory=list)
    answer: "Future[Scored]" = field(default_factory=Future)

    @property
    def left(self) -> int:
        """Images that wait."""
        return len(self.images) - self.taken


class Batcher:
    """Gathers what waits, up to size images, without ever waiting for more.

    Callers have equal shares of a batch: one with many images does not keep the others waiting.
    Stat callers are served first, the others with what they leave of each batch.
    """

    def __init__(self, score: Callable[[Float32], Scored], size: int) -> None:
        self._score = score
        self._size = size
        self._waiting: list[_Call] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def predict(self, images: Float32) -> Scored:
        """Score (N, C, size, size), N > 0; blocks. Errors of the forward pass are raised here."""
        return self._predict(_Call(images))

    def predict_first(self, images: Float32) -> Scored:
        """predict(), before all who do not call this."""
        return self._predict(_Call(images, stat=True))

    def _predict(self, call: _Call) -> Scored:
        with self._changed:
            self._waiting.append(call)
            self._changed.notify()
        return call.answer.result()

    def close(self) -> None:
        """Finish what waits and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch = self._batch()
            self._forward(batch)
            served = {call for call, _ in batch}
            with self._changed:
                left = [c for c in self._waiting if c.left and not c.answer.done()]
                # Those that were served go to the end.
                self._waiting = sorted(left, key=served.__contains__)

    def _batch(self) -> list[tuple[_Call, int]]:
        """Who is served next, with how many images."""
        chosen, room = [], self._size
        for stat in (True, False):
            calls = [call for call in self._waiting if call.stat is stat]
            shares = _shares([call.left for call in calls], room)
            chosen += [(call, share) for call, share in zip(calls, shares, strict=True) if share]
            room -= sum(shares)
        return chosen

    def _forward(self, batch: Sequence[tuple[_Call, int]]) -> None:
        try:
            images = [call.images[call.taken : call.taken + share] for call, share in batch]
            self._hand_out(batch, *self._halving(np.concatenate(images)))
        except Exception as error:  # noqa: BLE001 - belongs to the callers, who wait for it
            for call, _ in batch:
                if not call.answer.done():
                    call.answer.set_exception(error)

    def _hand_out(
        self, batch: Sequence[tuple[_Call, int]], probabilities: Float32, maps: Float32
    ) -> None:
        start = 0
        for call, share in batch:
            end = start + share
            call.parts.append((probabilities[start:end], maps[start:end]))
            call.taken += share
            start = end
            if not call.left:
                found = zip(*call.parts, strict=True)
                call.answer.set_result(tuple(np.concatenate(part) for part in found))  # type: ignore[arg-type]

    def _halving(self, images: Float32) -> Scored:
        """Score a batch; where the device has no memory for it, in halves, down to one image."""
        try:
            return self._score(images)
        except OutOfMemory as error:
            if len(images) == 1:
                raise
            log.warning("batch_halved", images=len(images), reason=str(error))
        middle = len(images) // 2
        parts = [self._halving(half) for half in (images[:middle], images[middle:])]
        return np.concatenate([p for p, _ in parts]), np.concatenate([m for _, m in parts])


def _shares(wanted: Sequence[int], room: int) -> list[int]:
    """How much each gets of what there is: equal parts, and what some do not need to the others.

    With too little for all, those at the front get one each: they have waited longest.
    """
    shares = [0] * len(wanted)
    smallest_first = sorted(range(len(wanted)), key=wanted.__getitem__)
    if room < len(wanted):
        smallest_first = list(range(room))
    for place, index in enumerate(smallest_first):
        shares[index] = min(wanted[index], room // (len(smallest_first) - place))
        room -= shares[index]
    return shares
