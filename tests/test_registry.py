"""Versions of a model and trainings: one at a time, and what was before comes back."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import make
import pytest
from sqlalchemy import delete
from studies import Bench
from studies import bench as new_bench

from dicomai.errors import LeaseLost, Misuse, ModelDamaged
from dicomai.infer import package
from dicomai.roles import choose_model
from dicomai.settings import Settings, shipped
from dicomai.store import registry, runs, truth
from dicomai.store.database import Database
from dicomai.store.tables import model

SHA = "0" * 64


@pytest.fixture
def bench(database: Database) -> Iterator[Bench]:
    """Each kind of database, with three versions of a model."""
    found = new_bench(database)
    for version in ("1", "2", "3"):
        registry.register(database, "tiny", version, SHA)
        found.clock.wait(1)
    yield found


def states(bench: Bench) -> dict[str, str]:
    """Version -> state."""
    return {row["version"]: row["state"] for row in registry.models(bench.database)}


def test_the_first_version_is_active_and_later_ones_are_candidates(bench: Bench) -> None:
    assert states(bench) == {"1": "active", "2": "candidate", "3": "candidate"}
    assert registry.active_version(bench.database, "tiny") == "1"


def test_another_version_takes_its_place_and_is_told_once(bench: Bench) -> None:
    assert registry.activate(bench.database, "tiny", "3", "better") == "1"
    assert states(bench) == {"1": "retired", "2": "candidate", "3": "active"}
    assert registry.activate(bench.database, "tiny", "3", "better") is None


def test_a_rollback_goes_further_back_each_time(bench: Bench) -> None:
    for version in ("2", "3"):
        bench.clock.wait(1)
        registry.activate(bench.database, "tiny", version, "better")
    assert registry.rollback(bench.database, "tiny") == ("3", "2")
    assert registry.rollback(bench.database, "tiny") == ("2", "1")
    assert states(bench) == {"1": "active", "2": "withdrawn", "3": "withdrawn"}
    with pytest.raises(Misuse, match="no version of tiny to go back to"):
        registry.rollback(bench.database, "tiny")


def test_what_was_withdrawn_may_be_activated_again(bench: Bench) -> None:
    registry.activate(bench.database, "tiny", "2", "better")
    registry.rollback(bench.database, "tiny")
    assert registry.activate(bench.database, "tiny", "2", "by a person") == "1"
    assert registry.rollback(bench.database, "tiny") == ("2", "1")


def test_a_version_that_nobody_knows_is_refused(bench: Bench) -> None:
    with pytest.raises(Misuse, match="tiny 9 is not registered"):
        registry.activate(bench.database, "tiny", "9", "better")


# What a daemon scores with


def test_a_version_that_is_active_elsewhere_leaves_a_daemon_on_the_last_one_it_has(
    database: Database, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path)
    assert choose_model(settings, database).version == "2"
    registry.register(database, "chest-starter", "3", SHA)
    registry.activate(database, "chest-starter", "3", "by another daemon")
    assert choose_model(settings, database).version == "2"
    registry.rollback(database, "chest-starter")
    assert registry.active_version(database, "chest-starter") == "2"


def test_the_newest_that_ships_is_active_first_and_what_is_active_stays(
    database: Database, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path)
    old = shipped("config/models/chest-starter/1")
    registry.register(database, "chest-starter", "1", package.read(old).sha256)
    assert choose_model(settings, database).path == old
    with database.write() as connection:
        connection.execute(delete(model))
    shutil.copytree(old, tmp_path / "models/chest-starter/5")  # which nobody has proven
    toml = tmp_path / "models/chest-starter/5/model.toml"
    toml.write_text(toml.read_text().replace('version = "1"', 'version = "5"', 1))
    assert choose_model(settings, database).version == "2"


def test_versions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    words = (make.STARTER / "model.toml").read_text()
    for version in ("9", "10", "1"):
        folder = tmp_path / "chest-starter" / version
        folder.mkdir(parents=True)
        toml = words.replace('version = "2"', f'version = "{version}"', 1)
        (folder / "model.toml").write_text(toml)
        (folder / "weights.safetensors").write_bytes(b"")
    assert [found.version for found in package.installed((tmp_path,))] == ["1", "9", "10"]


def test_a_damaged_candidate_does_not_stop_a_daemon_but_a_damaged_active_one_does(
    database: Database, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path)
    assert choose_model(settings, database).version == "2"
    folder = tmp_path / "models/chest-starter/5"
    shutil.copytree(make.STARTER, folder)
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace('version = "2"', 'version = "5"', 1))
    assert registry.active_version(database, "chest-starter") == "2"
    assert choose_model(settings, database).version == "2"
    (folder / "weights.safetensors").write_bytes(b"damaged")
    assert choose_model(settings, database).version == "2"
    registry.activate(database, "chest-starter", "5", "by a person")
    with pytest.raises(ModelDamaged, match="is damaged"):
        choose_model(settings, database)


# Trainings


def begin(bench: Bench, recipe: str = "{}", dry_run: bool = False) -> runs.Run:
    """A training of the active version."""
    return runs.begin(bench.database, "tiny", "1", recipe, dry_run)


def test_a_second_training_is_refused_while_one_is_running(bench: Bench) -> None:
    first = begin(bench)
    with pytest.raises(Misuse, match=f"training {first.id} is running since"):
        begin(bench)
    bench.clock.wait(runs.LEASE_SECONDS - 1)
    runs.renew(bench.database, first)
    bench.clock.wait(runs.LEASE_SECONDS - 1)
    with pytest.raises(Misuse, match="is running since"):
        begin(bench, "another recipe")


def test_a_training_whose_process_died_goes_on_when_its_lease_has_run_out(bench: Bench) -> None:
    first = begin(bench)
    bench.clock.wait(runs.LEASE_SECONDS + 1)
    again = begin(bench)
    assert (again.id, again.resumed) == (first.id, True)
    with pytest.raises(LeaseLost):
        runs.renew(bench.database, first)
    with pytest.raises(LeaseLost):
        runs.end(bench.database, first, "done", "late")


def test_another_recipe_gives_up_what_was_stopped(bench: Bench) -> None:
    first = begin(bench)
    assert runs.stop(bench.database) == first.id
    assert runs.is_unfinished(bench.database, "{}")
    second = begin(bench, "another recipe")
    assert second.id != first.id
    states = {row["id"]: row["state"] for row in runs.runs(bench.database, 9)}
    assert states == {first.id: "failed", second.id: "running"}


def test_a_training_that_a_person_stops_notices_and_may_go_on(bench: Bench) -> None:
    first = begin(bench)
    runs.stop(bench.database)
    with pytest.raises(LeaseLost):
        runs.renew(bench.database, first)
    assert runs.stop(bench.database) is None
    again = begin(bench)
    assert (again.id, again.resumed) == (first.id, True)


def test_a_candidate_takes_only_the_place_of_the_version_it_was_compared_with(
    bench: Bench,
) -> None:
    run = begin(bench)
    registry.activate(bench.database, "tiny", "3", "by a person")
    assert not runs.conclude(bench.database, run, "4", SHA, True, "better")
    assert states(bench)["3"] == "active"
    assert states(bench)["4"] == "candidate"
    (row,) = runs.runs(bench.database, 9)
    assert (row["state"], row["decision"], row["version"]) == ("done", "kept", "4")
    assert row["reason"].startswith("1, which it was compared with, is not active any more")


def test_a_candidate_that_is_better_is_active_with_the_end_of_its_training(bench: Bench) -> None:
    assert runs.conclude(bench.database, begin(bench), "4", SHA, True, "better")
    assert states(bench) == {"1": "retired", "2": "candidate", "3": "candidate", "4": "active"}
    assert not runs.conclude(bench.database, begin(bench), "5", SHA, False, "not better")
    assert registry.active_version(bench.database, "tiny") == "4"


def test_a_training_that_was_stopped_while_it_was_judged_promotes_nothing(bench: Bench) -> None:
    run = begin(bench)
    runs.stop(bench.database)
    with pytest.raises(LeaseLost):
        runs.conclude(bench.database, run, "4", SHA, True, "better")
    assert registry.active_version(bench.database, "tiny") == "1"


def test_a_dry_run_is_nobodys_training(bench: Bench) -> None:
    run = begin(bench, dry_run=True)
    assert not runs.is_unfinished(bench.database, "{}")
    said = truth.Said(("study", "1.2.3"), "pneumonia", "present", "A", None, "file", "0")
    truth.say(bench.database, [said])
    bench.clock.wait(1)
    runs.end(bench.database, run, "done", "better", "would-promote")
    assert runs.new_labels(bench.database, ("pneumonia",)) == 1


def test_an_epoch_that_is_done_again_counts_once(bench: Bench) -> None:
    run = begin(bench)
    epoch = dict.fromkeys(
        ("loss", "val_loss", "accuracy", "auc", "images_per_second", "seconds"), 0.5
    )
    for loss in (0.7, 0.6):
        runs.note_epoch(bench.database, run, {**epoch, "phase": 0, "number": 1, "loss": loss})
    assert [row["loss"] for row in runs.epochs(bench.database, run.id)] == [0.6]
    runs.end(bench.database, run, "done", "better", "promoted", "2")
    (row,) = runs.runs(bench.database, 9)
    assert (row["state"], row["decision"], row["version"]) == ("done", "promoted", "2")
    assert not runs.is_unfinished(bench.database, "{}")
