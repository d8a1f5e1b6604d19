"""`make bench`: how fast we are, beside the peers, in one run on one machine.

Every figure is measured in turn, several times: the table has medians with the smallest and the
largest, and the ratio to the first row of its column. Writes bench.md and bench.png.
"""

import argparse
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import bench_growth
import bench_labels
import bench_line
import bench_receiving
import bench_scoring
import cv2
import numpy as np
from peers import need
from rich.console import Console
from rich.progress import track

IMAGES = {"CT": 240, "CR": 40}  # of a run, all associations together
STUDIES, SOME_STUDIES = 200, 80  # of the whole line, and at half load
ASSOCIATIONS = (1, 2, 4, 8)
BATCHES = (1, 4, 16, 32)
COLOURS = (
    (90, 90, 90), (60, 140, 230), (70, 170, 70), (200, 120, 40), (160, 80, 180), (40, 40, 190)
)  # fmt: skip

console = Console()


@dataclass
class Contest:
    """A table: rates by row and column; base: the row that the others are compared with."""

    title: str
    unit: str
    base: str = ""
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def note(self, row: str, column: str, rate: float) -> None:
        """One more measurement."""
        self.rates.setdefault(row, {}).setdefault(column, []).append(rate)

    @property
    def columns(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(column for row in self.rates.values() for column in row))

    def markdown(self) -> str:
        """A table."""
        first = self.rates.get(self.base) or next(iter(self.rates.values()))
        lines = [f"### {self.title}, {self.unit}", "", "| | " + " | ".join(self.columns) + " |"]
        lines.append("|---" * (len(self.columns) + 1) + "|")
        for name, row in self.rates.items():
            cells = [_cell(row.get(column, []), first.get(column, [])) for column in self.columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def _cell(rates: Sequence[float], others: Sequence[float]) -> str:
    if not rates:
        return ""
    words = f"{median(rates):.4g} ({min(rates):.4g} to {max(rates):.4g})"
    return words + (
        f", {median(rates) / median(others):.2f}" if others and rates is not others else ""
    )


def receiving(root: Path, rounds: int) -> Iterable[Contest]:
    """Images/s of each receiver, by kind of image and number of associations."""
    need("/usr/bin/storescp", "Orthanc")
    receivers = list(bench_receiving.RECEIVERS)
    for kind, images in IMAGES.items():
        contest = Contest(f"Receiving {kind}", "images/s")
        for associations in ASSOCIATIONS:
            folder = root / f"{kind}{associations}"
            each = max(1, images // associations)
            sent = bench_receiving.folders(folder, kind, associations, each)
            column = f"{associations} association" + ("s" if associations > 1 else "")
            for turn in track(range(rounds), f"{kind}, {column}", console=console, transient=True):
                for name in receivers:
                    place = folder / f"{turn} {name}"
                    place.mkdir()
                    contest.note(name, column, bench_receiving.rate(name, sent, place))
                place = folder / f"{turn} bare"
                place.mkdir()
                contest.note(
                    "bare loop, one thread", column, bench_receiving.bare_loop(sent, place)
                )
            shutil.rmtree(folder)  # only now: a file system is slow after a removal
        yield contest


def scoring(root: Path, rounds: int) -> Iterable[Contest]:
    """Images/s of each engine, by batch size."""
    contest = Contest("Scoring, ResNet50, 224 pixels, with class maps", "images/s")
    engines = bench_scoring.engines(root)
    for _ in track(range(rounds), "scoring", console=console, transient=True):
        for batch in BATCHES:
            for name, score in engines.items():
                contest.note(name, f"batch {batch}", bench_scoring.rate(score, batch))
    yield contest


def line(root: Path, rounds: int) -> Iterable[Contest]:
    """The whole line beside its stages alone, and how long a study takes at half of its rate."""
    rates = Contest("Studies of two 2500 x 2048 images", "studies/s")
    waits = Contest("From a study's last Success to its results in Orthanc, at half load", "s")
    idle = Contest("With nothing to do", "% of a core")
    folders = bench_line.studies(root / "studies", STUDIES)
    for turn in track(range(rounds), "line", console=console, transient=True):
        alone = bench_line.stages(_made(root / f"{turn} stages"), folders)
        together = bench_line.end_to_end(_made(root / f"{turn} together"), folders)
        for name, rate in {"the whole line": together, **alone}.items():
            rates.note(name, "rate", rate)
        place = _made(root / f"{turn} half load")
        found = bench_line.latencies(place, folders[:SOME_STUDIES], together / 2)
        for share in (50, 95):
            waits.note(f"{share} % within", "seconds", found[len(found) * share // 100])
        idle.note("all processes together", "share", bench_line.idle(_made(root / f"{turn} idle")))
        for name in ("stages", "together", "half load", "idle"):
            shutil.rmtree(root / f"{turn} {name}")
    yield rates
    yield waits
    yield idle


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def labels(root: Path, rounds: int) -> Iterable[Contest]:
    """Milliseconds of an image by its model's labels."""
    contest = Contest("From a 2500 x 2048 image to its results on disk", "ms")
    for found, count, cost in bench_labels.milliseconds(root, rounds):
        contest.note(found, f"{count} label" + ("s" if count > 1 else ""), cost)
    yield contest


def growth(root: Path, rounds: int) -> Iterable[Contest]:
    """Microseconds of what is done all day, by how much was done before."""
    for kind in bench_growth.HISTORIES:
        contest = Contest(f"With so many studies in {kind.name}", "microseconds", "1,000 studies")
        place = root / kind.name
        place.mkdir()
        with bench_growth.measured(kind, place) as costs:
            for _ in track(range(rounds), kind.name, console=console, transient=True):
                for size, operation, cost in costs():
                    contest.note(f"{size:,} studies", operation, cost)
        shutil.rmtree(place)
        yield contest


PARTS: dict[str, Callable[[Path, int], Iterable[Contest]]] = {
    "receiving": receiving,
    "scoring": scoring,
    "line": line,
    "labels": labels,
    "growth": growth,
}


def drawn(contest: Contest) -> np.ndarray:
    """Bars: a group for each column, a bar for each row, with the spread."""
    high, left, step = 360, 70, 26
    groups, rows = contest.columns, list(contest.rates)
    wide = left + len(groups) * (len(rows) * step + 40) + 20
    picture = np.full((high + 90 + 22 * len(rows), wide, 3), 255, np.uint8)
    top = max(max(rates) for row in contest.rates.values() for rates in row.values())

    def y(rate: float) -> int:
        return int(high - rate / top * (high - 60))

    _text(picture, f"{contest.title}, {contest.unit}", (10, 26), 0.6)
    x = left
    for column in groups:
        for index, row in enumerate(rows):
            rates, colour = contest.rates[row].get(column, []), COLOURS[index % len(COLOURS)]
            if rates:
                cv2.rectangle(picture, (x, y(median(rates))), (x + step - 6, high), colour, -1)
                middle = x + step // 2 - 3
                cv2.line(picture, (middle, y(min(rates))), (middle, y(max(rates))), (0, 0, 0), 1)
                _text(picture, f"{median(rates):.3g}", (x - 4, y(max(rates)) - 6), 0.36)
            x += step
        _text(picture, column, (x - len(rows) * step, high + 20), 0.45)
        x += 40
    cv2.line(picture, (left - 6, high), (wide - 10, high), (0, 0, 0), 1)
    for index, row in enumerate(rows):
        at = high + 50 + 22 * index
        colour = COLOURS[index % len(COLOURS)]
        cv2.rectangle(picture, (left, at), (left + 14, at + 14), colour, -1)
        _text(picture, row, (left + 22, at + 12), 0.45)
    return picture


def _text(picture: np.ndarray, words: str, at: tuple[int, int], size: float) -> None:
    cv2.putText(picture, words, at, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA)


def _stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    wide = max(picture.shape[1] for picture in pictures)
    return np.vstack(
        [
            cv2.copyMakeBorder(
                picture, 0, 10, 0, wide - picture.shape[1], cv2.BORDER_CONSTANT, value=(255,) * 3
            )
            for picture in pictures
        ]
    )


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{len(names)} x {names[0] if names else platform.machine()}, {time.strftime('%Y-%m-%d')}"
    )


def main() -> None:
    """`bench.py [--only receiving] [--rounds 5] [--out FOLDER]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("var/bench"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    contests: list[Contest] = []
    for name in given.only or PARTS:
        with tempfile.TemporaryDirectory(prefix="dicomai-bench-", dir=given.out) as folder:
            for contest in PARTS[name](Path(folder), given.rounds):
                contests.append(contest)
                console.print(contest.markdown(), highlight=False)
                head = f"# dicomai bench, {_machine()}, median of {given.rounds}\n\n"
                words = head + "\n".join(item.markdown() for item in contests)
                (given.out / "bench.md").write_text(words)
                cv2.imwrite(str(given.out / "bench.png"), _stacked([drawn(c) for c in contests]))
    console.print(f"{given.out}/bench.md, {given.out}/bench.png")


if __name__ == "__main__":
    main()
