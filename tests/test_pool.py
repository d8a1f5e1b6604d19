"""Decoding processes: what one image does to its decoder, no other image feels."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import make
import numpy as np
import pytest
from peers import wait_until

from dicomai.demo.radiographs import set_pixels
from dicomai.errors import NotDicom, Rejected
from dicomai.prepare import image
from dicomai.prepare.pool import Pool
from dicomai.study import Limits

LIMITS = Limits(64_000_000, 1 << 30, 10)

# Work for the child, which finds this module by the path that it inherits.


def echo(*values: object) -> Iterator[object]:
    """Give everything back."""
    yield from values


def crash() -> Iterator[int]:
    """What a decoder with a wild pointer does, after its first frame."""
    yield 1
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> Iterator[int]:
    """What a library does that thinks it owns the process."""
    os._exit(3)
    yield 0


def hang() -> Iterator[int]:
    """What a decoder does that has lost its way."""
    yield 1
    time.sleep(600)


def slowly(seconds: float, items: int) -> Iterator[int]:
    """Many frames, each in time."""
    for item in range(items):
        time.sleep(seconds)
        yield item


def flood(megabytes: int) -> Iterator[int]:
    """Take memory, every page of it."""
    yield len(bytearray(megabytes << 20))


class Unreadable:
    """What cannot be unpickled."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return int, ("no number",)


def unreadable() -> Iterator[object]:
    """Then more that nobody waits for."""
    yield Unreadable()
    yield "left over"


def stall(then: int) -> Iterator[object]:
    """The first half of a message, then silence or death."""
    descriptor = int(sys.argv[1])
    os.write(descriptor, (1_000_000).to_bytes(4, "big") + b"half")
    if then:
        os.kill(os.getpid(), then)
    time.sleep(600)
    yield 1


def refuse() -> Iterator[int]:
    """A reason with a code."""
    yield 1
    raise NotDicom("no good")


def fail_to_read() -> Iterator[int]:
    """The disk."""
    yield 1
    raise OSError(5, "Input/output error")


def blunder() -> Iterator[int]:
    """A mistake of ours, with a patient's name in its words."""
    yield 1
    raise KeyError("Doe^John")


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """One process, so that a second call meets what the first one left."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Pool(workers=1, timeout_seconds=5.0, memory_megabytes=512) as opened:
        yield opened


def only(pool: Pool, work: object, *call: object) -> list[object] | Rejected:
    """One call's answer."""
    (answer,) = pool.map(work, [call])  # type: ignore[arg-type]
    return answer


def reason(answer: list[object] | Rejected) -> tuple[str, str]:
    """The refusal's code and words."""
    assert isinstance(answer, Rejected)
    return answer.code, str(answer)


def test_answers_come_in_the_order_of_the_calls(pool: Pool) -> None:
    assert list(pool.map(echo, [(1, 2), (), (3,)])) == [[1, 2], [], [3]]


@pytest.mark.parametrize(
    ("work", "code", "words"),
    [(crash, "decoder-crashed", "SIGSEGV"), (leave, "decoder-crashed", "exit code 3")],
)
def test_a_crash_costs_one_image(pool: Pool, work: object, code: str, words: str) -> None:
    found, said = reason(only(pool, work))
    assert found == code
    assert words in said
    assert only(pool, echo, "still here") == ["still here"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_ends_no_image(pool: Pool, number: signal.Signals) -> None:
    # systemd sends SIGTERM to every process of a unit; the parent still has seconds to finish.
    only(pool, echo)
    (pid,) = pool.process_ids()
    os.kill(pid, number)
    assert only(pool, slowly, 0.2, 2) == [0, 1]
    assert pool.process_ids() == [pid]


def test_a_process_that_died_between_two_images_costs_neither(pool: Pool) -> None:
    only(pool, echo)
    (pid,) = pool.process_ids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z", 5, "it is dead")
    assert only(pool, echo, 1) == [1]


def test_a_process_that_does_not_start_is_no_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Pool(1, timeout_seconds=5.0, memory_megabytes=512) as pool:
        with pytest.raises(OSError, match="does not start"):
            only(pool, echo, 1)


def test_a_decoder_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    # Within this time a new process also imports this module.
    with Pool(1, timeout_seconds=3.0, memory_megabytes=512) as pool:
        only(pool, echo)
        started = time.monotonic()
        code, words = reason(only(pool, hang))
        assert code == "decoder-hung"
        assert "3 seconds (prepare.timeout_seconds)" in words
        assert time.monotonic() - started < 5
        assert only(pool, echo, 1) == [1]


def test_a_message_that_stops_in_its_middle_is_a_decoder_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Pool(1, timeout_seconds=3.0, memory_megabytes=512) as pool:
        only(pool, echo)
        started = time.monotonic()
        assert reason(only(pool, stall, 0))[0] == "decoder-hung"
        assert time.monotonic() - started < 6


def test_a_process_killed_in_the_middle_of_a_message_is_a_crash(pool: Pool) -> None:
    code, words = reason(only(pool, stall, int(signal.SIGKILL)))
    assert code == "decoder-crashed"
    assert "SIGKILL" in words
    assert only(pool, echo, 1) == [1]


def test_what_is_left_over_of_one_image_never_answers_for_the_next(pool: Pool) -> None:
    with pytest.raises(ValueError, match="no number"):
        only(pool, unreadable)
    assert only(pool, echo, "innocent") == ["innocent"]


def test_closing_while_a_process_starts_does_not_wait_for_its_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    for pause in (0.0, 0.05, 0.3):
        pool = Pool(1, timeout_seconds=30.0, memory_megabytes=512)
        work = threading.Thread(target=swallow, args=(pool,))
        work.start()
        time.sleep(pause)
        started = time.monotonic()
        pool.close()
        assert time.monotonic() - started < 3
        work.join(5)


def swallow(pool: Pool) -> None:
    """Whatever comes of work in a pool that is closed."""
    with contextlib.suppress(OSError, CancelledError, RuntimeError):
        only(pool, hang)


def test_no_more_is_begun_than_the_processes_can_do(pool: Pool) -> None:
    begun = []

    def calls() -> Iterator[tuple[int]]:
        for number in range(10):
            begun.append(number)
            yield (number,)

    answers = pool.map(echo, calls())
    next(answers)
    assert len(begun) == 2  # one in hand, one ahead


def test_the_time_limit_is_for_each_frame_not_for_the_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Pool(1, timeout_seconds=3.0, memory_megabytes=512) as pool:
        assert only(pool, slowly, 0.8, 5) == [0, 1, 2, 3, 4]


def test_memory_beyond_the_limit_is_refused_and_the_process_lives_on(pool: Pool) -> None:
    assert only(pool, flood, 100) == [100 << 20]
    (before,) = pool.process_ids()
    code, words = reason(only(pool, flood, 2000))
    assert code == "too-large"
    assert "prepare.memory_megabytes" in words
    assert only(pool, flood, 100) == [100 << 20]
    assert pool.process_ids() == [before]


def test_an_image_that_needs_more_memory_than_allowed_says_so(tmp_path: Path) -> None:
    ds = make.chest_radiograph()
    set_pixels(ds, np.zeros((7000, 9000), np.uint8), bits_stored=8)  # 252 MB as float32
    (file,) = make.save(tmp_path / "in", [ds])
    with Pool(workers=1, timeout_seconds=20.0, memory_megabytes=320) as pool:
        code, words = reason(only(pool, image.render, file, tmp_path / "out", LIMITS))
    assert code == "too-large"
    assert "prepare.memory_megabytes" in words


def test_a_refusal_keeps_its_code_and_words(pool: Pool) -> None:
    assert reason(only(pool, refuse)) == ("not-dicom", "no good")


def test_an_error_of_ours_costs_the_image_and_says_nothing_of_the_patient(pool: Pool) -> None:
    code, words = reason(only(pool, blunder))
    assert code == "undecodable"
    assert "KeyError" in words
    assert "Doe" not in words


def test_a_failing_disk_is_no_refusal(pool: Pool) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        only(pool, fail_to_read)
    assert only(pool, echo, 1) == [1]


def test_other_images_go_on_beside_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Pool(2, timeout_seconds=4.0, memory_megabytes=512) as pool:
        stuck = threading.Thread(target=only, args=(pool, hang))
        stuck.start()
        started = time.monotonic()
        assert list(pool.map(echo, [(i,) for i in range(20)])) == [[i] for i in range(20)]
        assert time.monotonic() - started < 3.5
        stuck.join()


def test_closing_ends_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pool = Pool(1, timeout_seconds=60.0, memory_megabytes=512)
    answers: list[list[object] | Rejected] = []
    stuck = threading.Thread(target=lambda: answers.append(only(pool, hang)))
    stuck.start()
    wait_until(pool.process_ids, 10, "the process runs")
    (pid,) = pool.process_ids()
    time.sleep(1)
    started = time.monotonic()
    pool.close()
    stuck.join(5)
    assert time.monotonic() - started < 3
    assert not Path(f"/proc/{pid}").exists()
    assert isinstance(answers[0], Rejected)


def test_the_processes_know_nothing_of_torch(pool: Pool) -> None:
    (modules,) = only(pool, loaded)  # type: ignore[misc]
    assert not {"torch", "sqlalchemy", "highdicom"} & set(modules)  # type: ignore[call-overload]


def loaded() -> Iterator[list[str]]:
    """What the child has imported, once it can prepare images."""
    assert image
    yield sorted({name.partition(".")[0] for name in sys.modules})


def test_a_real_image_comes_through_whole(pool: Pool, tmp_path: Path) -> None:
    (file,) = make.save(tmp_path / "in", [make.large_radiograph()])
    (frame,) = only(pool, image.render, file, tmp_path / "out" / "a", LIMITS)  # type: ignore[misc]
    assert frame.path == tmp_path / "out" / "a.1.png"  # type: ignore[attr-defined]
    assert frame.path.stat().st_size > 100_000  # type: ignore[attr-defined]
