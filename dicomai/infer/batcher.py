"""One thread owns the device; callers block while their images share its batches."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import structlog

from dicomai.errors import OutOfMemory
from dicomai.study import Float32

log = structlog.get_logger()

Scored = tuple[Float32, Float32]
_Item = tuple[Float32, "Future[Scored]"]


class Batcher:
    """Gathers what waits, up to size images, without ever waiting for more."""

    def __init__(self, score: Callable[[Float32], Scored], size: int) -> None:
        self._score = score
        self._size = size
        self._waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def predict(self, images: Float32) -> Scored:
        """Score (N, C, size, size); blocks. Errors of the forward pass are raised here."""
        parts = [
            self._submit(images[start : start + self._size])
            for start in range(0, len(images), self._size)
        ]
        scored = [part.result() for part in parts]
        return np.concatenate([p for p, _ in scored]), np.concatenate([m for _, m in scored])

    def _submit(self, images: Float32) -> "Future[Scored]":
        future: Future[Scored] = Future()
        self._waiting.put((images, future))
        return future

    def close(self) -> None:
        """Finish what waits and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        held: _Item | None = None
        while True:
            first = held if held is not None else self._waiting.get()
            held = None
            if first is None:
                return
            batch, count = [first], len(first[0])
            ended = False
            while count < self._size:
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    ended = True
                    break
                if count + len(item[0]) > self._size:
                    held = item
                    break
                batch.append(item)
                count += len(item[0])
            self._forward(batch)
            if ended:
                return

    def _forward(self, batch: list[_Item]) -> None:
        try:
            probabilities, maps = self._halving(np.concatenate([images for images, _ in batch]))
        except Exception as error:  # noqa: BLE001 - belongs to the callers, who wait for it
            for _, future in batch:
                future.set_exception(error)
            return
        start = 0
        for images, future in batch:
            end = start + len(images)
            future.set_result((probabilities[start:end], maps[start:end]))
            start = end

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
