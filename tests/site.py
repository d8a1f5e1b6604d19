"""A hospital's first months, on real images: `make site`.

1. The active model knows only the children of Kermany et al.; it has never seen an adult.
2. 500 labelled adults (NIH) arrive over C-STORE; their labels come as CSV by SOP Instance UID.
3. The scheduled retraining runs beside the daemon, and the gate decides.
4. A rollback brings back the same bytes.
5. The same labels, shuffled: another training, which the gate must refuse.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import torch
from daemon import Daemon, command, daemon
from learning import collection
from peers import free_port, shared, storescu, wait_until
from pydicom.uid import generate_uid

from dicomai.demo.radiographs import Radiograph, digital_xray
from dicomai.infer import package
from dicomai.infer.network import build
from dicomai.settings import load, shipped
from dicomai.store import registry, runs
from dicomai.train import judge
from dicomai.train.ancestry import PUBLIC, Ancestry
from dicomai.train.loop import Epoch, Step, train
from dicomai.train.publish import Origin, publish, rounded
from dicomai.train.recipe import Recipe
from dicomai.train.recipe import load as read_recipe

NAME = "site"
SEED = 20261121
IMAGES = 500
PHASE = """\
[[phases]]
fine_tune_from = "stem"
epochs = {epochs}
learning_rate = {rate}
warmup_epochs = 1
decay = "cosine"
"""


def recipe_of(epochs: int, rate: str, start: str, size: int, file: Path) -> Recipe:
    """The shipped recipe with one phase for the whole network, at another size."""
    text = shipped("config/recipe.toml").read_text()
    top = text[: text.index("[[phases]]")]
    top = top.replace("size = 224", f"size = {size}").replace(
        'start = "active"', f'start = "{start}"'
    )
    file.write_text(top + PHASE.format(epochs=epochs, rate=rate))
    return read_recipe(file)


def say(words: str) -> None:
    """With the time."""
    print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


def first_model(recipe: Recipe, models: Path) -> None:
    """A model that knows only the children."""
    data = collection(recipe, ["kermany2018"])
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    network = build(recipe.architecture, recipe.channels, len(recipe.labels))
    network = network.to(memory_format=torch.channels_last)

    def tell(what: Step | Epoch) -> None:
        if isinstance(what, Epoch):
            say(f"  epoch {what.number}: validation {what.val_loss:.3f}, AUC {what.auc:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        learn, check = data.of("train"), data.of("val")
        train(network, learn, check, recipe, Path(folder), tell, threading.Event())
    judge.calibrate(network, check, recipe)
    final = rounded(network, recipe)
    scores = judge.probabilities(judge.exact(final, check, recipe), recipe.kind)
    thresholds = judge.choose_thresholds(scores, check, recipe)
    starter = package.read(make.STARTER)
    mine = data.where(data.splits != "test")
    publish(
        final,
        recipe,
        recipe.size,
        replace(starter.accepts, min_size=32),
        thresholds,
        {},
        Origin(
            "tests/site.py",
            data.digest(),
            "",
            Ancestry().with_more(PUBLIC, mine.patients.tolist(), mine.fingerprints),
        ),
        NAME,
        "1",
        models,
    )


def adults() -> list[dict[str, str]]:
    """NIH rows, whole patients, until there are so many images."""
    file = shared() / "data/cxr/labels.csv"
    rows = [
        r for r in csv.DictReader(file.read_text().splitlines()) if r["source"] != "kermany2018"
    ]
    patients = sorted({row["patient_id"] for row in rows})
    random.Random(SEED).shuffle(patients)
    chosen: list[dict[str, str]] = []
    for patient in patients:
        if len(chosen) < IMAGES:
            chosen += [row for row in rows if row["patient_id"] == patient]
    return chosen[:IMAGES]


def objects(rows: Sequence[dict[str, str]], folder: Path) -> dict[str, str]:
    """A DX object of each image; SOP Instance UID -> label."""
    folder.mkdir(parents=True)
    found = {}
    for row in rows:
        radiograph = Radiograph(
            shared() / "data/cxr" / row["file"],
            row["label"],
            int(float(row["age_years"] or 50)),
            row["sex"] or "O",
            row["view"] or "PA",
            (0.4, 0.4),
        )
        study = generate_uid(entropy_srcs=["site", row["image_id"]])
        ds = digital_xray(radiograph, row["patient_id"], study)
        ds.save_as(folder / f"{row['image_id']}.dcm", enforce_file_format=True)
        found[str(ds.SOPInstanceUID)] = row["label"]
    return found


def write_labels(file: Path, labels: dict[str, str], shuffled: bool, day: str) -> None:
    """As a reader hands them in; shuffled: they mean nothing."""
    values = list(labels.values())
    if shuffled:
        random.Random(SEED).shuffle(values)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["sop_instance_uid", "label", "value", "reader", "date"])
        for uid, label in zip(labels, values, strict=True):
            value = "present" if label == "pneumonia" else "absent"
            writer.writerow([uid, "pneumonia", value, "reader A", day])
        if shuffled:  # one more than the schedule waits for
            writer.writerow([next(iter(labels)), "pneumonia", "unsure", "reader B", day])


def wait_for_training(running: Daemon, number: int) -> dict[str, Any]:
    """Until a training has ended; its row."""

    def ended() -> bool:
        rows = {row["id"]: row for row in runs.runs(running.database, 9)}
        return number in rows and rows[number]["state"] in {"done", "failed"}

    wait_until(ended, 4 * 3600, f"training {number} ends: {running.log[-2000:]}")
    return next(row for row in runs.runs(running.database, 9) if row["id"] == number)


def site(root: Path, first_epochs: int, epochs: int, size: int) -> list[str]:
    """The whole story; returns what went wrong."""
    models = root / "data/models"
    say("1. a model that knows only children")
    first = recipe_of(first_epochs, "1e-3", "none", size, root / "first.toml")
    first_model(first, models)
    recipe_of(epochs, "3e-4", "active", size, root / "recipe.toml")
    more = (
        f'[infer]\nmodel = "{NAME}"\n[retrain]\ncron = "* * * * *"\nmin_new_labels = {IMAGES + 1}\n'
        f'recipe = "{root}/recipe.toml"\n'
    )
    url = f"sqlite:///{root}/dicomai.db"
    faults: list[str] = []
    with daemon(root, url, free_port(), quiet=2.0, more=more) as running:
        say(f"2. {IMAGES} adults arrive over C-STORE")
        labels = objects(adults(), root / "sent")
        files = sorted((root / "sent").iterdir())
        for start in range(0, len(files), 50):
            storescu(running.port, files[start : start + 50])
        running.wait_idle(len(files), 1800)
        # The schedule looks every minute: only both together are labels enough.
        write_labels(root / "labels.csv", labels, False, "2026-11-20")
        _check(command(running.config, "labels", "import", str(root / "labels.csv")))
        kermany = shared() / "data/cxr"
        _check(command(running.config, "dataset", "add", str(kermany), "--labels",
                       str(_only_children(root)), "--name", "children"))  # fmt: skip
        say("3. the schedule retrains")
        row = wait_for_training(running, 1)
        say(f"   {row['state']}, {row['decision']}: {row['reason']}")
        faults += [] if row["decision"] == "promoted" else ["the first candidate was not promoted"]
        _figures(root)
        before = (models / NAME / "1/weights.safetensors").read_bytes()
        say("4. a rollback")
        _check(command(running.config, "model", "rollback", NAME))
        active = registry.active_version(running.database, NAME)
        same = (models / NAME / str(active) / "weights.safetensors").read_bytes() == before
        faults += [] if active == "1" and same else ["the rollback did not bring back version 1"]
        _check(command(running.config, "model", "activate", NAME, "2"))
        say("5. shuffled labels")
        write_labels(root / "shuffled.csv", labels, True, "2026-11-21")
        _check(command(running.config, "labels", "import", str(root / "shuffled.csv")))
        row = wait_for_training(running, 2)
        say(f"   {row['state']}, {row['decision']}: {row['reason']}")
        faults += [] if row["decision"] == "kept" else ["shuffled labels were not refused"]
        states = {row["state"] for row in running.studies()}
        faults += [] if states == {"analyzed"} else [f"studies are {states}"]
    return faults


def _check(done: Any) -> None:
    say(f"   {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr


def _only_children(root: Path) -> Path:
    file = shared() / "data/cxr/labels.csv"
    top, *lines = file.read_text().splitlines()
    found = root / "children.csv"
    found.write_text("\n".join([top, *(line for line in lines if ",kermany2018," in line)]) + "\n")
    return found


def _figures(root: Path) -> None:
    settings = load(root / "dicomai.toml")
    found = json.loads((settings.data_dir / f"models/{NAME}/2/evaluation.json").read_text())
    for item in found["gate"]["comparisons"]:
        if item["group"].startswith(("all", "source")):
            gain = item["gain"]
            say(
                f"   {item['group']}: AUC {item['before']:.3f} before, {item['after']:.3f} after, "
                f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
            )


def main() -> None:
    """`site.py [--out FOLDER]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="kept; default: a new folder")
    parser.add_argument("--first-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--size", type=int, default=112)
    given = parser.parse_args()
    root = given.out or Path(tempfile.mkdtemp(prefix="dicomai-site-"))
    root.mkdir(parents=True, exist_ok=True)
    say(str(root))
    faults = site(root, given.first_epochs, given.epochs, given.size)
    if faults:
        sys.exit("\n".join(faults))
    say("all as it should be")


if __name__ == "__main__":
    main()
