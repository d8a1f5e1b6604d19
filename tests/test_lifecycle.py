"""Starting, stopping, dying: what the daemon holds it finishes or gives back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import make
import pytest
from daemon import command, daemon
from peers import free_port, storescu, wait_until

from dicomai.demo.archive import Archive
from dicomai.store import queries

pytestmark = pytest.mark.timeout(200)


def named(pids: list[int], role: str) -> int:
    """The process of a role."""
    for pid in pids:
        if f"\0{role}\0" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    pytest.fail(f"no process runs {role}")


def test_sigterm_in_the_middle_of_work_ends_all_within_ten_seconds_and_loses_nothing(
    tmp_path: Path,
) -> None:
    url, port = f"sqlite:///{tmp_path}/dicomai.db", free_port()
    files = make.save(tmp_path / "sent", [make.large_radiograph() for _ in range(6)])
    archive = Archive(tmp_path / "archive")
    peer = [("archive", "ARCHIVE", archive.port)]
    try:
        with daemon(tmp_path, url, port, peer) as running:
            storescu(port, files)
            wait_until(
                lambda: any(row["state"] == "analyzed" for row in running.studies()),
                60,
                "a first study is analyzed",
            )
            pids = running.processes()
            started = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(10) == 0
            assert time.monotonic() - started < 10
            assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
            states = {row["state"] for row in running.studies()}
        assert states <= {"receiving", "analyzed"}
        assert "analyzing" not in states
        with daemon(tmp_path, url, port, peer) as running:
            rows = running.wait_idle(6)
            assert {(row["state"], row["revision"]) for row in rows} == {("analyzed", 1)}
            assert len(archive.files()) == 18  # overlay, summary, report
            trail = queries.events(running.database, "study", rows[0]["study_instance_uid"])
            assert trail[-1]["to_state"] == "analyzed"
    finally:
        archive.close()


def test_a_role_that_is_killed_is_started_again_and_its_study_is_finished(tmp_path: Path) -> None:
    url, port = f"sqlite:///{tmp_path}/dicomai.db", free_port()
    with daemon(tmp_path, url, port) as running:
        pids = running.processes()
        for role in ("listen", "infer", "deliver", "schedule"):
            os.kill(named(pids, role), signal.SIGKILL)
        wait_until(lambda: len(set(running.processes()) - set(pids)) == 4, 20, "four new processes")
        wait_until(lambda: running.log.count('"event": "listening"') == 2, 20, "a new listener")
        storescu(port, make.save(tmp_path / "sent", [make.chest_radiograph()]))
        (row,) = running.wait_idle(1)
        assert row["state"] == "analyzed"


def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with daemon(tmp_path, f"sqlite:///{tmp_path}/dicomai.db", free_port()) as running:
        children = running.processes()[1:]
        assert len(children) == 4
        running.process.kill()
        running.process.wait()
        wait_until(lambda: not [p for p in children if alive(p)], 15, "the children have ended")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_results_wait_for_a_destination_that_is_down_and_say_why(tmp_path: Path) -> None:
    url, port, peer_port = f"sqlite:///{tmp_path}/dicomai.db", free_port(), free_port()
    ds = make.chest_radiograph()
    with daemon(tmp_path, url, port, [("pacs", "ARCHIVE", peer_port)]) as running:
        storescu(port, make.save(tmp_path / "sent", [ds]))

        def waiting() -> list[dict[str, object]]:
            rows = queries.deliveries(running.database, state="pending")
            return [row for row in rows if row["last_error"]]

        (first, *_) = wait_until(waiting, 60, "a first attempt has failed")
        assert "does not answer" in str(first["last_error"])
        assert first["next_attempt_at"] is not None
        archive = Archive(tmp_path / "archive", port=peer_port)
        try:
            assert command(running.config, "delivery", "retry").returncode == 0
            running.wait_idle(1)
            assert len(archive.files()) == 3  # overlay, summary, report
        finally:
            archive.close()


def test_the_sweep_adopts_a_whole_file_without_a_row_and_removes_what_is_broken(
    tmp_path: Path,
) -> None:
    from dicomai import settings, upkeep
    from dicomai.receive import inbox
    from dicomai.store.database import open_database, upgrade

    ds = make.chest_radiograph()
    data = make.save(tmp_path / "sent", [ds])[0].read_bytes()
    header, instance, _ = inbox.read_file(tmp_path / "sent" / f"{ds.SOPInstanceUID}.dcm")
    folder = tmp_path / "var/inbox" / header.study_instance_uid
    folder.mkdir(parents=True)
    whole = folder / f"{header.sop_instance_uid}.{instance.digest[:12]}.dcm"
    broken = folder / f"{header.sop_instance_uid}.{'0' * 12}.dcm"
    young = folder / "young.part"
    for file, content in (
        (whole, data),
        (broken, data[:-9]),
        (young, b""),
        (folder / "x.part", b""),
    ):
        file.write_bytes(content)
        if file is not young:
            os.utime(file, (0, 0))
    database = open_database(f"sqlite:///{tmp_path}/dicomai.db")
    upgrade(database, settings.shipped("migrations"))
    done = upkeep.sweep(settings.Settings(data_dir=tmp_path / "var"), database)

    assert done == "1 adopted, 2 removed"
    assert sorted(folder.iterdir()) == sorted([whole, young])
    row = queries.one_study(database, header.study_instance_uid)
    assert row is not None
    assert (row["state"], row["revision"]) == ("receiving", 1)


def test_the_light_roles_do_not_import_torch() -> None:
    program = (
        "import sys, dicomai.cli, dicomai.receiving, dicomai.schedule, dicomai.sending;"
        "sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
