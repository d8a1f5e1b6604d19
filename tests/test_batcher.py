"""One device, many callers."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from dicomai.infer.batcher import Batcher, Scored, _shares
from dicomai.study import Float32

SIZE = 4
pytestmark = pytest.mark.timeout(60)


class Device:
    """A forward pass that can be held up: each row's result is its own first pixel."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seen: list[list[float]] = []
        self.free = threading.Event()
        self.busy = threading.Event()
        self.free.set()

    def score(self, images: Float32) -> Scored:
        """images: (N, 1, 2, 2); a negative pixel is an error."""
        self.busy.set()
        assert self.free.wait(30)
        self.batches.append(len(images))
        self.seen.append(images[:, 0, 0, 0].tolist())
        if images.min() < 0:
            raise ValueError("out of memory")
        return images[:, 0, 0, :1], images[:, :1]


def images(*values: float) -> Float32:
    """One image for each value."""
    return np.array(values, np.float32)[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32)


@pytest.fixture
def device() -> Device:
    """A free device."""
    return Device()


@pytest.fixture
def batcher(device: Device) -> Iterator[Batcher]:
    """A batcher in front of the device."""
    made = Batcher(device.score, SIZE)
    yield made
    device.free.set()
    made.close()


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    """Threads to call from."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


def hold(device: Device, batcher: Batcher, callers: ThreadPoolExecutor) -> "Future[Scored]":
    """Keep the device busy with one image, so that what comes next must wait."""
    device.free.clear()
    first = callers.submit(batcher.predict, images(0))
    assert device.busy.wait(30)
    return first


def waiting(batcher: Batcher, count: int) -> None:
    """Return when so many requests wait for the device, beside the one that it is busy with."""
    tick = threading.Event()
    while len(batcher._waiting) < count + 1:
        tick.wait(0.005)


def test_concurrent_callers_get_their_own_rows_back(
    device: Device, batcher: Batcher, callers: ThreadPoolExecutor
) -> None:
    requests = [[100.0 * caller + row for row in range(caller % 11 + 1)] for caller in range(64)]
    answers = callers.map(lambda values: batcher.predict(images(*values)), requests)
    for values, (probabilities, maps) in zip(requests, answers, strict=True):
        assert probabilities[:, 0].tolist() == values
        assert maps.shape == (len(values), 1, 2, 2)
        assert maps[:, 0, 1, 1].tolist() == values
    assert sum(device.batches) == sum(map(len, requests))
    assert max(device.batches) <= SIZE


def test_what_waits_shares_a_batch(
    device: Device, batcher: Batcher, callers: ThreadPoolExecutor
) -> None:
    hold(device, batcher, callers)
    answers = [callers.submit(batcher.predict, images(n)) for n in (1, 2, 3)]
    waiting(batcher, 3)
    device.free.set()
    assert [float(a.result()[0][0, 0]) for a in answers] == [1, 2, 3]
    assert device.batches == [1, 3]


def test_a_batch_never_exceeds_the_size(
    device: Device, batcher: Batcher, callers: ThreadPoolExecutor
) -> None:
    hold(device, batcher, callers)
    answers = [callers.submit(batcher.predict, images(*[n] * 3)) for n in (1, 2, 3)]
    waiting(batcher, 3)
    device.free.set()
    assert [a.result()[0][:, 0].tolist() for a in answers] == [[1] * 3, [2] * 3, [3] * 3]
    assert device.batches == [1, 4, 4, 1]


def test_one_with_many_images_does_not_keep_the_others_waiting(
    device: Device, batcher: Batcher, callers: ThreadPoolExecutor
) -> None:
    hold(device, batcher, callers)
    many = callers.submit(batcher.predict, images(*range(1, 101)))
    waiting(batcher, 1)
    few = callers.submit(batcher.predict, images(201, 202, 203))
    waiting(batcher, 2)
    device.free.set()
    assert few.result()[0][:, 0].tolist() == [201, 202, 203]
    assert many.result()[0][:, 0].tolist() == list(range(1, 101))
    assert device.seen[:3] == [[0], [1, 2, 201, 202], [3, 4, 5, 203]]
    assert max(device.batches) == SIZE


def test_with_more_callers_than_room_everybody_has_a_turn(
    device: Device, callers: ThreadPoolExecutor
) -> None:
    batcher = Batcher(device.score, 1)
    hold(device, batcher, callers)
    many = callers.submit(batcher.predict, images(*range(1, 51)))
    waiting(batcher, 1)
    one = callers.submit(batcher.predict, images(201))
    waiting(batcher, 2)
    device.free.set()
    assert one.result()[0].tolist() == [[201]]
    assert many.result()[0][:, 0].tolist() == list(range(1, 51))
    assert device.seen[:4] == [[0], [1], [201], [2]]
    batcher.close()


def test_stat_images_go_before_all_others_which_share_what_is_left(
    device: Device, batcher: Batcher, callers: ThreadPoolExecutor
) -> None:
    hold(device, batcher, callers)
    many = callers.submit(batcher.predict, images(*range(1, 5)))
    waiting(batcher, 1)
    stat = callers.submit(batcher.predict_first, images(5, 6, 7, 8, 9, 10))
    waiting(batcher, 2)
    device.free.set()
    assert stat.result()[0][:, 0].tolist() == [5, 6, 7, 8, 9, 10]
    assert many.result()[0][:, 0].tolist() == [1, 2, 3, 4]
    assert device.seen == [[0], [5, 6, 7, 8], [9, 10, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("wanted", "room", "shares"),
    [
        ([5], 16, [5]),
        ([40], 16, [16]),
        ([40, 40], 16, [8, 8]),
        ([40, 3], 16, [13, 3]),
        ([2, 40, 40], 16, [2, 7, 7]),
        ([1, 1, 1, 1, 1], 4, [1, 1, 1, 1, 0]),
        ([9, 1, 1, 1, 1], 4, [1, 1, 1, 1, 0]),
    ],
)
def test_shares_are_equal_and_nothing_is_left_over(
    wanted: list[int], room: int, shares: list[int]
) -> None:
    assert _shares(wanted, room) == shares


def test_an_error_reaches_every_caller_of_its_batch_and_no_other(
    device: Device, batcher: Batcher, callers: ThreadPoolExecutor
) -> None:
    before = hold(device, batcher, callers)
    together = [callers.submit(batcher.predict, images(n)) for n in (1, -1, 2)]
    waiting(batcher, 3)
    device.free.set()
    for caller in together:
        with pytest.raises(ValueError, match="out of memory"):
            caller.result()
    assert before.result()[0].tolist() == [[0]]
    assert batcher.predict(images(5))[0].tolist() == [[5]]


def test_close_finishes_what_waits(device: Device, callers: ThreadPoolExecutor) -> None:
    batcher = Batcher(device.score, SIZE)
    hold(device, batcher, callers)
    answers = [callers.submit(batcher.predict, images(*[n] * 3)) for n in (1, 2, 3)]
    waiting(batcher, 3)
    closing = callers.submit(batcher.close)
    device.free.set()
    closing.result(30)
    assert [a.result(30)[0][:, 0].tolist() for a in answers] == [[1] * 3, [2] * 3, [3] * 3]
