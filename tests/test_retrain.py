"""dicomai retrain, from labelled images to another active model, and everything that stops it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import blobs
import killed
import make
import numpy as np
import pytest
import torch
from daemon import command, daemon
from peers import free_port, small_disk, storescu, wait_until
from safetensors.torch import save_file
from sqlalchemy import update
from studies import bench as new_bench

from dicomai import schedule
from dicomai.demo.radiographs import set_pixels
from dicomai.errors import Misuse
from dicomai.infer import package
from dicomai.infer.engine import Engine
from dicomai.settings import Retrain, Settings, load, shipped
from dicomai.store import queries, queue, registry, runs, truth
from dicomai.store.database import Database, open_database
from dicomai.store.tables import training_run
from dicomai.study import Float32
from dicomai.train import ancestry, recipe
from dicomai.train.ancestry import PUBLIC
from dicomai.train.start import begin, read_weights

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a site that has labelled images, and has not learnt yet."""
    folder = tmp_path_factory.mktemp("labelled")
    config = blobs.site(folder)
    blobs.add(config, blobs.folder_of(folder / "drawn", 240))
    return config


@pytest.fixture(scope="module")
def promoted(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a site where a training was done, and its candidate promoted."""
    folder = tmp_path_factory.mktemp("promoted")
    config = blobs.site(folder, like=labelled)
    done = blobs.retrain(config)
    (folder / "said").write_text(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "chest-starter 3 promoted" in done.stdout
    return config


def database_of(config: Path) -> Database:
    """The database of the settings."""
    return open_database(load(config).database.url)


def test_a_better_model_is_promoted_and_its_epochs_are_in_the_database(promoted: Path) -> None:
    database = database_of(promoted)
    (run,) = runs.runs(database, 9)
    assert (run["state"], run["decision"], run["version"]) == ("done", "promoted", "3")
    assert run["images"] == 240
    epochs = runs.epochs(database, run["id"])
    assert [row["number"] for row in epochs] == [1, 2]
    assert registry.active_version(database, "chest-starter") == "3"
    said = (promoted.parent / "said").read_text()
    assert re.search(r"train \d+ images of \d+ patients, val \d+ images", said)
    assert said.count("images/s") == 2


def test_the_package_says_where_it_comes_from_and_scores_what_was_measured(promoted: Path) -> None:
    settings = load(promoted)
    model = package.read(settings.data_dir / "models/chest-starter/3")
    package.verify(model)
    assert model.calibrated
    assert model.provenance["parent"] == "chest-starter 2"
    assert model.accepts == package.read(make.STARTER).accepts
    database = database_of(promoted)
    learnt, splits = ancestry.read(model.path), truth.splits(database)
    mine = learnt.patients[queries.site_uid(database)]
    assert mine == {patient for patient, split in splits.items() if split != "test"}
    assert len(learnt.fingerprints) >= len(mine)
    assert learnt.patients[PUBLIC]  # of the starter
    stated = json.loads((model.path / "evaluation.json").read_text())
    assert stated["thresholds"]["pneumonia"] == model.labels[0].threshold
    assert stated["figures"][0]["figures"]["auc"][0] > 0.9
    assert stated["gate"]["active"] == "2"
    assert stated["gate"]["gain"]["low"] > 0
    shown = command(promoted, "model", "show", "chest-starter", "3").stdout
    assert "test: pneumonia, all, " in shown
    probabilities, _ = Engine(model, "cpu").score(inputs([0, 1, 2, 3]))
    assert probabilities[0] > probabilities[1]
    assert probabilities[2] > probabilities[3]


def inputs(numbers: list[int]) -> Float32:
    """Drawn images as the network's input; even ones have a blob."""
    import cv2

    pictures = [cv2.resize(blobs.blob(n, n % 2 == 0), (64, 64)) for n in numbers]
    return ((np.stack(pictures)[:, None].astype(np.float32) / 255 - 0.5) / 0.25).astype("f4")


def test_the_report_is_one_file_without_network(promoted: Path) -> None:
    page = (load(promoted).data_dir / "training/1/report.html").read_text()
    assert "promoted and takes the place of version 2" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "<script" not in page
    for words in ("Reliability", "Precision and recall", "most confident mistakes", "channel "):
        assert words in page


def test_a_rollback_brings_back_the_same_bytes(promoted: Path) -> None:
    before = (make.STARTER / "weights.safetensors").read_bytes()
    done = command(promoted, "model", "rollback", "chest-starter")
    assert done.stdout == "chest-starter 2 is active again, 3 is withdrawn\n"
    settings = load(promoted)
    from dicomai.roles import choose_model

    chosen = choose_model(settings, database_of(promoted))
    assert (chosen.path / "weights.safetensors").read_bytes() == before
    again = command(promoted, "model", "activate", "chest-starter", "3")
    assert again.stdout == "chest-starter 3 is active, 2 was before\n"


def test_labels_that_mean_nothing_are_refused_by_the_gate(promoted: Path, tmp_path: Path) -> None:
    config = blobs.site(tmp_path)
    shutil.copytree(load(promoted).data_dir / "models", tmp_path / "data/models")
    settings = load(config)
    database = database_of(config)
    for version in ("2", "3"):
        folder = settings.data_dir / "models" if version == "3" else shipped("config/models")
        sha256 = package.read(folder / "chest-starter" / version).sha256
        registry.register(database, "chest-starter", version, sha256)
    registry.activate(database, "chest-starter", "3", "test")
    # Others than it has learnt from, which could not be tested on.
    blobs.add(config, blobs.folder_of(tmp_path / "shuffled", 240, shuffled=True, first=1000))
    done = blobs.retrain(config)
    assert done.returncode == 0, done.stderr
    assert "chest-starter 4 kept as a candidate" in done.stdout
    assert "not better by more than 0" in done.stdout
    assert registry.active_version(database, "chest-starter") == "3"


def test_a_search_goes_on_where_it_was_killed_and_the_best_recipe_is_judged(
    labelled: Path, tmp_path: Path
) -> None:
    config = blobs.site(tmp_path, blobs.RECIPE.replace("epochs = 2", "epochs = 1"), labelled)
    process = killed.start(
        "retrain", "an epoch is saved", ["--config", str(config), "--search", "2"], tmp_path / "log"
    )
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    database = database_of(config)
    with database.write() as connection:  # its lease runs out
        connection.execute(update(training_run).values(due_at=datetime.now(UTC)))
    done = blobs.retrain(config, "--search", "2")
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"trial \d: validation loss (\S+),", done.stderr)]
    assert len(losses) == 2 == len(set(losses))
    (run,) = runs.runs(database, 9)
    (epoch,) = runs.epochs(database, run["id"])
    assert abs(epoch["val_loss"] - min(losses)) < 1e-4
    folder = load(config).data_dir / "training/1"
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    assert "Recipes that were tried" in (folder / "report.html").read_text()


def test_a_dry_run_of_several_classes_changes_nothing(tmp_path: Path) -> None:
    normal = '[[labels]]\nkey = "normal"\ncode = ["17621005", "SCT", "Normal"]\n'
    several = blobs.RECIPE.replace("multi-label", "multi-class").replace("epochs = 2", "epochs = 1")
    config = blobs.site(tmp_path, several.replace("[augmentation]", f"{normal}[augmentation]"))
    blobs.add(config, blobs.folder_of(tmp_path / "drawn", 200))
    done = blobs.retrain(config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "nothing was changed" in done.stdout
    assert not (tmp_path / "data/models").exists()
    assert registry.active_version(database_of(config), "chest-starter") == "2"
    assert (tmp_path / "data/training/1/report.html").is_file()


# What stops it


def test_too_little_is_one_line_with_counts(tmp_path: Path) -> None:
    config = blobs.site(tmp_path)
    for count, words in ((0, "too little to learn from"), (40, "of pneumonia there are ")):
        if count:
            blobs.add(config, blobs.folder_of(tmp_path / "drawn", count))
        refused = blobs.retrain(config)
        assert refused.returncode == 2
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr
    assert [run["state"] for run in runs.runs(database_of(config), 9)] == ["failed", "failed"]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("architecture =", "architektur =", "architektur: Extra inputs are not permitted"),
        ('"resnet18"', '"alexnet"', "architecture"),
        ('"stem"', '"layer9"', "fine_tune_from 'layer9' is none of stem, layer1"),
        ("rotation_degrees = 5.0", "rotation_degrees = 50.0", "augmentation.rotation_degrees"),
        ("seed = 1", "seed = -1", "seed: Input should be greater than or equal to 0"),
        ("learning_rate = 2e-3", "learning_rate = inf", "phases.0.learning_rate"),
        ('"SCT"', '"a scheme that is too long"', "labels.0.code.1"),
        ('start = "none"', 'start = "active"', "the active model's is resnet50"),
        ('start = "none"', 'start = "imagenet"', "no ImageNet weights in"),
        ('start = "none"', 'start = "gone.pt"', "there is no file gone.pt"),
    ],
)
def test_a_recipe_at_fault_is_named(
    tmp_path: Path, before: str, after: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert before in blobs.RECIPE
    file = tmp_path / "recipe.toml"
    file.write_text(blobs.RECIPE.replace(before, after, 1))
    with pytest.raises(Misuse, match=re.escape(words)):
        begin(recipe.load(file), package.read(make.STARTER))


@pytest.mark.parametrize("kind", ["new.pth", "old.pth", "a.safetensors"])
def test_damaged_weights_are_said(tmp_path: Path, kind: str) -> None:
    file = tmp_path / kind
    weights = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30)).state_dict()
    if file.suffix == ".pth":
        torch.save(weights, file, _use_new_zipfile_serialization=kind.startswith("new"))
    else:
        save_file(weights, file)
    whole, random, refused = file.read_bytes(), np.random.default_rng(1), 0
    for turn in range(300):
        damaged = np.frombuffer(whole, np.uint8).copy()
        start = 400 if turn % 2 else len(whole)  # the structure is at the front, or anywhere
        damaged[random.integers(0, start, 3)] = random.integers(0, 256, 3)
        file.write_bytes(damaged[: None if turn % 3 else random.integers(len(whole))].tobytes())
        try:
            read_weights(file)
        except Misuse:
            refused += 1
    assert refused > 150


def test_a_recipe_at_fault_is_one_line(tmp_path: Path) -> None:
    config = blobs.site(tmp_path)
    (tmp_path / "recipe.toml").write_text(blobs.RECIPE.replace("seed", "sead"))
    refused = blobs.retrain(config)
    assert refused.returncode == 2
    assert "recipe.toml: sead: Extra inputs are not permitted" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_training_that_is_killed_five_times_goes_on_and_the_active_model_is_as_it_was(
    labelled: Path, promoted: Path, tmp_path: Path
) -> None:
    config = blobs.site(tmp_path, like=labelled)
    settings, database = load(config), database_of(config)
    for point in (
        "an epoch is in the middle",
        "the first epoch is saved",
        "an epoch is in the middle",
        "a model's weights are written",
        "a model is about to be renamed",
    ):
        process = killed.start("retrain", point, ["--config", str(config)], tmp_path / "log")
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert package.installed((settings.data_dir / "models",)) == []
        assert registry.active_version(database, "chest-starter") == "2"
        with database.write() as connection:  # its lease runs out
            connection.execute(update(training_run).values(due_at=datetime.now(UTC)))
    done = blobs.retrain(config)
    assert done.returncode == 0, done.stderr
    (run,) = runs.runs(database, 9)
    assert run["state"] == "done"
    losses = [[e["val_loss"] for e in runs.epochs(d, 1)] for d in (database, database_of(promoted))]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-6)
    installed = package.installed((settings.data_dir / "models",))
    assert [(model.name, model.version) for model in installed] == [("chest-starter", "3")]
    assert sorted(p.name for p in (settings.data_dir / "models/chest-starter").iterdir()) == ["3"]


def test_on_a_full_disk_it_stops_and_goes_on_when_there_is_room(
    labelled: Path, tmp_path: Path
) -> None:
    config = blobs.site(tmp_path, like=labelled)
    with small_disk(tmp_path / "data/training", 60):
        stopped = blobs.retrain(config)
        assert stopped.returncode == 1
        assert stopped.stdout.splitlines()[-1].startswith("dicomai: no space is left in ")
    database = database_of(config)
    assert runs.runs(database, 9)[0]["state"] == "stopped"
    assert not (tmp_path / "data/models").exists()
    assert registry.active_version(database, "chest-starter") == "2"
    done = blobs.retrain(config)
    assert done.returncode == 0, done.stderr
    assert [run["state"] for run in runs.runs(database, 9)] == ["done"]


def test_a_training_that_is_stopped_goes_on_another_time(labelled: Path, tmp_path: Path) -> None:
    patient = blobs.RECIPE.replace("epochs = 2", "epochs = 40")
    config = blobs.site(tmp_path, patient.replace("patience = 10", "patience = 1"), labelled)
    log = tmp_path / "log"
    process = killed.start("retrain", None, ["--config", str(config)], log)
    wait_until(lambda: log.exists() and "epoch 1" in log.read_text(), 90, "it trains")
    second = blobs.retrain(config)
    assert second.returncode == 2
    assert "training 1 is running since" in second.stderr
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 1
    (run,) = runs.runs(database_of(config), 9)
    assert run["state"] == "stopped"
    done = blobs.retrain(config)
    assert done.returncode == 0, done.stderr
    assert "phase 1, epoch 1:" not in done.stderr  # it went on


def test_a_training_lets_everything_else_go_first() -> None:
    words = (
        "import os; from dicomai.cli.retrain import yield_to_others; yield_to_others(); "
        "print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0) == os.SCHED_IDLE)"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout == "19 True\n"


# By the clock


@pytest.mark.parametrize(
    ("hours", "hour", "is_within"),
    [("", 3, True), ("20-6", 23, True), ("20-6", 5, True), ("20-6", 6, False), ("8-12", 12, False)],
)
def test_hours_may_go_over_midnight(hours: str, hour: int, is_within: bool) -> None:
    assert schedule.within(hours, hour) is is_within


def test_a_time_that_was_missed_is_caught_up_once(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, retrain=Retrain(cron="0 2 * * *"))
    schedule.catch_up(settings, database)
    assert queries.last_task(database, "retrain") is None  # it was never due
    queue.add_task(database, "retrain", datetime.now(UTC) - timedelta(days=9), "")
    schedule.catch_up(settings, database)
    first = queries.last_task(database, "retrain")
    assert first is not None
    assert datetime.now(UTC) - first < timedelta(minutes=2)
    schedule.catch_up(settings, database)
    assert queries.last_task(database, "retrain") == first


def test_too_few_new_labels_train_nothing(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, retrain=Retrain(min_new_labels=3))
    trainer = schedule.Trainer(settings, None)
    said = trainer.begin(settings, database)
    assert said == "0 new labels, 3 are needed (retrain.min_new_labels)"
    bench = new_bench(database)
    bench.arrive(1, "1.1")
    truth.say(
        database, [truth.Said(("study", "1.1"), "pneumonia", "present", "A", None, "file", "0")]
    )
    assert trainer.begin(settings, database).startswith("1 new labels")


# Beside a working daemon


def test_a_running_daemon_takes_the_new_version_and_loses_no_study(
    promoted: Path, tmp_path: Path
) -> None:
    shutil.copytree(load(promoted).data_dir / "models", tmp_path / "data/models")
    url = f"sqlite:///{tmp_path}/dicomai.db"
    with daemon(tmp_path, url, free_port(), quiet=1.0, release_quiet=0.2) as running:
        wait_until(lambda: '"scoring"' in running.log, 60, "a model is loaded")
        images = []
        for number in range(12):
            ds = make.chest_radiograph(number % 4)
            set_pixels(ds, blobs.blob(number, True).repeat(4, 0).repeat(4, 1), 8)
            images.append(ds)
        storescu(running.port, make.save(tmp_path / "first", images[:6]))
        registry.activate(running.database, "chest-starter", "3", "test")
        deadline = time.monotonic() + 60
        while running.log.count('"scoring"') < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        storescu(running.port, make.save(tmp_path / "second", images[6:]))
        rows = {row["study_instance_uid"]: row for row in running.wait_idle(12)}
        assert {row["state"] for row in rows.values()} == {"analyzed"}
        versions = [rows[ds.StudyInstanceUID]["model_version"] for ds in images]
        assert versions[0] == "2"
        assert versions[6:] == ["3"] * 6
        assert '"died"' not in running.log
