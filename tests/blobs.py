"""A site that learns to see bright blobs: drawn images, a small recipe, settings."""

import csv
import shutil
import subprocess
from pathlib import Path

import cv2
import killed
import numpy as np
from daemon import command
from numpy.typing import NDArray

from dicomai.store.database import Database
from dicomai.store.queue import patient_key
from dicomai.train.split import assign

RECIPE = """\
architecture = "resnet18"
channels = 1
size = 64
kind = "multi-label"
start = "none"
seed = 1
batch_size = 16
half_precision = false
gradient_clip = 5.0
average_decay = 0.8
patience = 10
[[labels]]
key = "pneumonia"
code = ["233604007", "SCT", "Pneumonia"]
[augmentation]
rotation_degrees = 5.0
shift = 0.05
horizontal_flip = true
[loss]
label_smoothing = 0.05
l2 = 0.01
[judgement]
resamples = 200
[[phases]]
fine_tune_from = "stem"
epochs = 2
learning_rate = 2e-3
decay = "cosine"
"""
COLUMNS = ("file", "label", "patient_id", "split", "source", "sex", "age")


def blob(number: int, is_there: bool) -> NDArray[np.uint8]:
    """An image of noise, with a bright blob where it is to be found."""
    rng = np.random.default_rng(number)
    picture = cv2.GaussianBlur(rng.normal(70, 30, (80, 72)), (0, 0), 1.5)
    if is_there:
        x, y = (int(value) for value in rng.integers(16, 56, 2))
        cv2.circle(picture, (x, y), 8, 190, -1)
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


def split_of(number: int) -> str:
    """As many of each kind in each split every time: by chance there may be too few."""
    place = number // 2 % 25
    return "val" if place < 4 else "test" if place < 10 else "train"


def patient_of(database: Database, number: int) -> str:
    """A Patient ID that chance, which is keyed with the site's own salt, brings into that split."""
    with database.read() as connection:
        for attempt in range(1000):
            name = f"P{number}.{attempt}"
            key = patient_key(database, connection, name) or ""
            if assign({key: ()}, {}, ())[key][0] == split_of(number):
                return name
    raise AssertionError("no name of a thousand")


def folder_of(folder: Path, count: int, shuffled: bool = False, first: int = 0) -> Path:
    """Images with labels.csv, half of them with a blob; shuffled: labels that mean nothing."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number in range(first, first + count):
            is_there = number % 2 == 0
            cv2.imwrite(str(folder / f"{number}.png"), blob(number, is_there))
            said = bool(rng.random() < 0.5) if shuffled else is_there
            label = "pneumonia" if said else "normal"
            age, sex = 20 + number % 60, "MF"[number % 3 == 0]
            split = split_of(number)
            writer.writerow([f"{number}.png", label, f"P{number}", split, "drawn", sex, age])
    return folder


def site(folder: Path, recipe: str = RECIPE, like: Path | None = None) -> Path:
    """Settings with a migrated database and a small recipe; like: the settings of another site,
    whose labels and splits this one has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "dicomai.toml"
    (folder / "recipe.toml").write_text(recipe)
    config.write_text(
        f'data_dir = "{folder}/data"\n[database]\nurl = "sqlite:///{folder}/dicomai.db"\n'
        f'[retrain]\nrecipe = "{folder}/recipe.toml"\n'
    )
    if like is not None:
        shutil.copy(like.with_name("dicomai.db"), folder)
    done = command(config, "db", "upgrade")
    assert done.returncode == 0, done.stderr
    return config


def add(config: Path, folder: Path) -> None:
    """Bring a folder as a dataset."""
    done = command(config, "dataset", "add", str(folder), "--labels", str(folder / "labels.csv"))
    assert done.returncode == 0, done.stderr


def retrain(config: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`dicomai retrain`; stdout and stderr are the same here."""
    log = config.with_name("retrain.log")
    log.unlink(missing_ok=True)
    process = killed.start("retrain", None, ["--config", str(config), *arguments], log)
    process.join(250)
    said = log.read_text()
    return subprocess.CompletedProcess(arguments, process.exitcode, said, said)
