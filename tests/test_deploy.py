"""The systemd units: well-formed, locked up, and the daemon works inside of what they forbid."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import make
import pytest
import sandbox
from daemon import Daemon, answers, command
from peers import free_port, lack, storescu, wait_until

from dicomai.demo.archive import Archive
from dicomai.store.database import open_database

DEPLOY = Path(__file__).parents[1] / "deploy"
# What "systemd-analyze security" may say at most, in tenths. What is left of it: sockets to the
# network and to Postgres; for scoring also a GPU, machine code made by torch, and priorities.
EXPOSURE = {
    "dicomai-listen": 11,
    "dicomai-deliver": 11,
    "dicomai-schedule": 11,
    "dicomai-infer": 14,
    "dicomai": 14,
}
ROLES = ("listen", "infer", "deliver", "schedule")

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, for a dicomai that is installed here."""
    if shutil.which("systemd-analyze") is None:
        lack("missing: apt-get install --no-install-recommends systemd")
    folder = tmp_path / "units"
    shutil.copytree(DEPLOY, folder, symlinks=True)
    program = Path(sys.executable).with_name("dicomai")
    for unit in folder.glob("*.service"):
        text = unit.read_text()
        assert text.count("/opt/dicomai/.venv/bin/dicomai") == 1
        unit.write_text(text.replace("/opt/dicomai/.venv/bin/dicomai", str(program)))
    return folder


def analyze(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """systemd-analyze, which needs no systemd that runs."""
    command = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_there_is_a_unit_for_each_role_and_one_for_all() -> None:
    starts = {
        unit.stem: sandbox.last(sandbox.read(unit), "ExecStart")
        for unit in DEPLOY.glob("*.service")
    }

    assert starts == {
        name: f"/opt/dicomai/.venv/bin/dicomai {name.removeprefix('dicomai-')} "
        "--config /etc/dicomai/dicomai.toml".replace("dicomai dicomai ", "dicomai run ")
        for name in EXPOSURE
    }


@pytest.mark.parametrize("name", EXPOSURE)
def test_systemd_finds_nothing_wrong_with_a_unit(units: Path, name: str) -> None:
    done = analyze("verify", str(units / f"{name}.service"))

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_would_find_a_misspelt_setting_in_what_the_units_share(units: Path) -> None:
    shared = units / "dicomai-.service.d/10-common.conf"
    shared.write_text(shared.read_text().replace("NoNewPrivileges", "NoNewPriviledges"))

    for name in EXPOSURE:
        assert "NoNewPriviledges" in analyze("verify", str(units / f"{name}.service")).stderr


@pytest.mark.parametrize(("name", "most"), EXPOSURE.items())
def test_a_unit_is_exposed_no_more_than_it_must_be(units: Path, name: str, most: int) -> None:
    unit = str(units / f"{name}.service")
    done = analyze("security", "--offline=true", f"--threshold={most}", unit)
    lower = analyze("security", "--offline=true", f"--threshold={most - 1}", unit)

    assert done.returncode == 0, done.stdout
    assert lower.returncode != 0  # the figure above is the one that is so


def test_all_roles_together_may_what_scoring_may() -> None:
    everything, scoring = (
        sandbox.read(DEPLOY / f"{name}.service") for name in ("dicomai", "dicomai-infer")
    )

    assert {**everything, "ExecStart": []} == {**scoring, "ExecStart": []}
    assert all(file.resolve().is_relative_to(DEPLOY) for file in DEPLOY.rglob("*"))


def confined(name: str, folder: Path, *program: str) -> list[str]:
    """A command line that runs a program as the unit would."""
    unit = str(DEPLOY / f"{name}.service")
    return [sys.executable, str(Path(sandbox.__file__)), unit, str(folder), *program]


PROBE = """
import ctypes, json, mmap, os, resource, socket, sys
def tried(act):
    try:
        act()
    except OSError as error:
        return error.errno
    return 0
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "capabilities": sum(int(status[f"Cap{kind}"], 16) for kind in ("Eff", "Prm", "Bnd", "Amb")),
    "no_new_privileges": int(status["NoNewPrivs"]),
    "umask": status["Umask"].strip(),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    "machine_code": tried(lambda: mmap.mmap(-1, 4096, prot=7)),
    "packets": tried(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    "tcp": tried(lambda: socket.socket().close()),
    "nice": tried(lambda: os.nice(1)),
    "chroot": tried(lambda: os.chroot("/")),
    "outside": tried(lambda: open(sys.argv[1], "w")),
    "inside": tried(lambda: open(sys.argv[2], "w").close()),
}))
"""


@pytest.mark.parametrize("name", EXPOSURE)
def test_what_the_sandbox_of_these_tests_forbids(tmp_path: Path, name: str, units: Path) -> None:
    """Without this, the test below would prove nothing."""
    inside, outside = tmp_path / "data", tmp_path / "other"
    inside.mkdir()
    program = (sys.executable, "-c", PROBE, str(outside), str(inside / "file"))
    done = subprocess.run(confined(name, inside, *program), capture_output=True, check=True)

    scores = name in {"dicomai", "dicomai-infer"}
    assert json.loads(done.stdout) == {
        "capabilities": 0,
        "no_new_privileges": 1,
        "umask": "0077",
        "files": 16384,
        "core": 0,
        "machine_code": 0 if scores else 1,
        "packets": 97,
        "tcp": 0,
        "nice": 0 if scores else 1,
        "chroot": 1,
        "outside": 13,
        "inside": 0,
    }
    assert not outside.exists()


@contextmanager
def role(name: str, folder: Path, config: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A role, or all of them, in its sandbox; it ends well when it is told to."""
    program = (sys.executable, "-m", "dicomai", name, "--config", str(config))
    unit = "dicomai" if name == "run" else f"dicomai-{name}"
    with (folder / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(confined(unit, folder, *program), stdout=log, stderr=log)
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        code = started.wait(15)
    assert code == 0, (folder / f"{name}.log").read_text()


@contextmanager
def confined_roles(tmp_path: Path, *names: str) -> Iterator[tuple[Daemon, Archive]]:
    """Roles in their sandboxes, on a migrated database, with an archive to send to."""
    folder, archive, port = tmp_path / "state", Archive(tmp_path / "archive"), free_port()
    folder.mkdir()
    config, url = tmp_path / "dicomai.toml", f"sqlite:///{folder}/var/dicomai.db"
    config.write_text(
        f'data_dir = "{folder}/var"\n[database]\nurl = "{url}"\n'
        f'[receive]\nhost = "127.0.0.1"\nport = {port}\nrelease_quiet_seconds = 0.5\n'
        '[[destinations]]\nname = "archive"\nae_title = "ARCHIVE"\nhost = "127.0.0.1"\n'
        f'port = {archive.port}\noutputs = ["sc", "sr"]\n'
    )
    assert command(config, "db", "upgrade").returncode == 0
    with ExitStack() as stack:
        stack.callback(archive.close)
        started = [stack.enter_context(role(name, folder, config)) for name in names]
        running = Daemon(port, folder, config, open_database(url), started[0])
        stack.callback(running.database.engine.dispose)
        wait_until(lambda: said(folder).count('"scoring"'), 90, "scoring has begun")
        wait_until(lambda: answers(running), 60, "the listener answers")
        yield running, archive
        assert all(process.poll() is None for process in started)
    words = said(folder)
    assert not re.search(r"denied|not permitted|Traceback|died", words), words


def said(folder: Path) -> str:
    """What all roles have written."""
    return "".join(log.read_text() for log in sorted(folder.glob("*.log")))


def test_each_role_does_its_work_under_what_its_unit_forbids(tmp_path: Path, units: Path) -> None:
    with confined_roles(tmp_path, *ROLES) as (running, archive):
        storescu(running.port, make.save(tmp_path / "sent", [make.chest_radiograph()]))
        (study,) = running.wait_idle(1)
        delivered = len(archive.files())

    assert study["state"] == "analyzed"
    assert delivered >= 2


def test_all_roles_together_start_under_what_their_unit_forbids(
    tmp_path: Path, units: Path
) -> None:
    with confined_roles(tmp_path, "run") as (running, _):
        assert len(running.processes()) >= 5
