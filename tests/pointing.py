"""Pointing game: does a map's highest place lie in the radiologist's box? `make pointing`.

Boxes of the test split of data/cxr (NIH, finding Pneumonia); beside it the share of boxes that hold
the image's centre, which looks at nothing. Zhang et al., Top-down Neural Attention, ECCV 2016.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import make
import numpy as np
from peers import shared

from dicomai.analyze import local
from dicomai.demo.radiographs import set_pixels
from dicomai.infer import package
from dicomai.infer.engine import Engine
from dicomai.prepare import geometry, image
from dicomai.receive.inbox import read_file
from dicomai.scoring import limits
from dicomai.settings import Settings
from dicomai.study import Float32, Frame


@dataclass(frozen=True)
class Box:
    """Pixels of the file."""

    file: Path
    left: float
    top: float
    width: float
    height: float

    def holds(self, row: float, column: float) -> bool:
        """Whether a pixel lies inside."""
        return self.top <= row <= self.top + self.height and (
            self.left <= column <= self.left + self.width
        )


def boxes(folder: Path, split: str) -> list[Box]:
    """Boxes of one split."""
    with (folder / "labels.csv").open() as file:
        files = {row["image_id"]: row for row in csv.DictReader(file)}
    with (folder / "boxes.csv").open() as file:
        return [
            Box(folder / found["file"], *(float(row[key]) for key in "xywh"))
            for row in csv.DictReader(file)
            if (found := files[row["image_id"]])["split"] == split
        ]


def highest(heat: Float32) -> tuple[int, int]:
    """Row and column of the highest place."""
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    return int(row), int(column)


def heat_of(file: Path, engine: Engine, model: package.Model, work: Path) -> Float32:
    """What the daemon would draw of a picture file: (rows, columns)."""
    ds = make.chest_radiograph()
    picture = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
    assert picture is not None
    set_pixels(ds, picture.astype(np.uint8), bits_stored=8)
    (saved,) = make.save(work, [ds])
    _, frame = image.prepare(read_file(saved)[1], model, limits(Settings()))
    assert isinstance(frame, Frame)
    _, maps = engine.score(frame.pixels[None])
    return geometry.spread(local(maps[0], engine.biases, engine.activation)[0], frame.letterbox)


def play(found: Sequence[Box], work: Path) -> tuple[float, float]:
    """Share of boxes that hold the map's highest place, and that hold the centre."""
    model = package.read(make.STARTER)
    engine = Engine(model, "cpu")
    hits, central = [], []
    for index, box in enumerate(found):
        heat = heat_of(box.file, engine, model, work / str(index))
        hits.append(box.holds(*highest(heat)))
        central.append(box.holds(heat.shape[0] / 2, heat.shape[1] / 2))
    return float(np.mean(hits)), float(np.mean(central))


def main() -> None:
    """Print both shares for each split."""
    import tempfile

    for split in ("test", "val", "train"):
        found = boxes(shared() / "data/cxr", split)
        with tempfile.TemporaryDirectory() as work:
            hits, central = play(found, Path(work)) if found else (0.0, 0.0)
        print(f"{split}: {len(found)} boxes, map {hits:.2f}, centre {central:.2f}")


if __name__ == "__main__":
    main()
