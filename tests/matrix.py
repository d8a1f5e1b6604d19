"""Every kind of result, of every kind of image, in every character set, before the referees.

python tests/matrix.py  runs the whole product, PixelMed on each kind of image; `make matrix`.
"""

import copy
import dataclasses
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import make
from peers import complaints
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid
from rich.progress import track
from sources import CHARACTER_SETS, PRESENCE, SOURCES, source

from dicomai.analyze import Context, Scorer, analyze
from dicomai.infer import package
from dicomai.infer.engine import Engine
from dicomai.receive.inbox import read_file
from dicomai.scoring import decoding_pool, header_reader, preparer
from dicomai.settings import Settings
from dicomai.study import KINDS, WITHDRAWAL, Algorithm, Analysis, Model, Reporting, Sent, Study

NOW = datetime(2026, 3, 29, 0, 30, tzinfo=UTC)
PACS = {"pacs": frozenset({*KINDS, WITHDRAWAL})}
Cell = tuple[str, str, str]  # kind of image, character set, presence
WHOLE = list(itertools.product(SOURCES, CHARACTER_SETS, PRESENCE))
# Each kind of image with each character set, and each presence in turn.
PAIRS = [
    (kind, characters, PRESENCE[(i + j) % len(PRESENCE)])
    for i, kind in enumerate(SOURCES)
    for j, characters in enumerate(CHARACTER_SETS)
]

# What referees say that is not so, and why.
MISTAKEN = {
    # Patient's Name is Type 2, which may be empty (PS3.3 C.7.1.1); the source has none.
    r"dcmpschk W: patientName absent or empty in presentation state": {"empty", "missing"},
    # dcmpschk takes the bytes 80 to 9F for control characters; UTF-8 has them in letters.
    r"dcmpschk E: Error: Attribute value does not conform to data type definition\., *"
    r"Affected attribute: \w+ \(\w{4},\w{4}\), Type (LO|PN), *Attribute value .*": {"UTF-8"},
}


def is_mistaken(line: str, cell: Cell) -> bool:
    """Whether a referee's line is one of MISTAKEN, in a cell where that happens."""
    words = line.partition(": ")[2]
    return any(re.fullmatch(said, words) and where & {*cell} for said, where in MISTAKEN.items())


def permissive() -> Model:
    """The shipped model, as one that accepts every image and finds something in it."""
    model = package.read(make.STARTER)
    (label,) = model.labels
    accepts = make.accepts(
        modalities=(), body_parts=(), views=(), photometric=(), presentation_intents=(), min_size=1
    )
    labels = (dataclasses.replace(label, threshold=0.0),)
    return dataclasses.replace(model, accepts=accepts, labels=labels)


@contextmanager
def permissive_scorer(model: Model | None = None) -> Iterator[Scorer]:
    """It makes every kind of result."""
    model = model or permissive()
    engine, settings = Engine(model, "cpu"), Settings()
    with decoding_pool(settings) as pool:
        yield Scorer(
            Algorithm(model, engine.name, Reporting("overlay", 0.0, 1536, frozenset(KINDS))),
            preparer(settings, pool, model),
            header_reader(settings, pool),
            engine.biases,
            engine.score,
        )


def results_of(scorer: Scorer, folder: Path, good: Dataset) -> tuple[Analysis, Path]:
    """All results of a study of one good image and a damaged one, and the good one's file."""
    bad = copy.deepcopy(good)
    bad.SOPInstanceUID, bad.PixelData = generate_uid(), bytes(10)
    bad.file_meta.MediaStorageSOPInstanceUID = bad.SOPInstanceUID
    files = make.save(folder / "in", [good, bad])
    instances = tuple(read_file(file)[1] for file in files)
    study = Study(str(good.StudyInstanceUID), 1, NOW, instances)
    gone = Sent(
        generate_uid(), SecondaryCaptureImageStorage, generate_uid(), "sc", None, frozenset(PACS)
    )
    done = analyze(study, scorer, Context({}, (gone,), PACS, NOW, folder))
    return done, files[0]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How many objects the referees saw, and what they had to say."""

    objects: int
    lines: list[str]


def judge(scorer: Scorer, folder: Path, cell: Cell, pixelmed: bool = False) -> Verdict:
    """What the referees have to say of the results of one cell, and what is not there."""
    done, file = results_of(scorer, folder, source(*cell))
    missing = {*KINDS, WITHDRAWAL} - {result.kind for result in done.results}
    found = complaints([file, *(result.path for result in done.results)], pixelmed)
    if cell[2] != "full":  # the source lacks what it must have; its results do not
        found = [line for line in found if not line.startswith(file.name)]
    lines = [line for line in found if not is_mistaken(line, cell)]
    said = [f"{' / '.join(cell)}: {line}" for line in [*map("no {}".format, missing), *lines]]
    return Verdict(len(done.results), said)


def judge_all(scorer: Scorer, folder: Path, cells: Sequence[Cell], pixelmed: bool) -> Verdict:
    """Two at a time: most of it is waiting for the referees."""
    with ThreadPoolExecutor(2) as threads:
        jobs = [
            threads.submit(judge, scorer, folder / str(number), cell, pixelmed)
            for number, cell in enumerate(cells)
        ]
        bar = track(jobs, "judging", disable=not sys.stdout.isatty())
        verdicts = [job.result() for job in bar]
    return Verdict(
        sum(verdict.objects for verdict in verdicts),
        [line for verdict in verdicts for line in verdict.lines],
    )


def main() -> None:
    """The whole product; PixelMed, which is slow, on each kind of image, whole and bare."""
    started = time.monotonic()
    slow = [(kind, "Japanese", presence) for kind in SOURCES for presence in ("full", "missing")]
    with tempfile.TemporaryDirectory() as folder, permissive_scorer() as scorer:
        verdicts = [
            judge_all(scorer, Path(folder, "all"), WHOLE, pixelmed=False),
            judge_all(scorer, Path(folder, "pixelmed"), slow, pixelmed=True),
        ]
    lines = [line for verdict in verdicts for line in verdict.lines]
    print("\n".join(lines))
    objects = sum(verdict.objects for verdict in verdicts)
    print(
        f"{objects} objects of {len(WHOLE) + len(slow)} studies in "
        f"{time.monotonic() - started:.0f} s, PixelMed on the documents of {len(slow)}: "
        f"{len(lines)} complaints"
    )
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
