"""The peers of the tests: Orthanc as PACS, DCMTK as modality, Postgres, and the referees."""

import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from pydicom import dcmread
from pydicom.uid import UID

PACKAGES = {
    "Orthanc": "orthanc",
    "/usr/bin/storescu": "dcmtk",
    "dciodvfy": "dicom3tools",
    "DicomSRValidator": "pixelmed-apps",
    "java": "default-jre-headless",
    "/usr/lib/postgresql": "postgresql",
    "/usr/share/orthanc/plugins/libOrthancDicomWeb.so": "orthanc-dicomweb",
    "chromium": "chromium",
    "node": "nodejs",
    "npm": "npm",
    "systemd-analyze": "systemd",
    "openssl": "openssl",
}

# TID 2010 asks for a modifier where the document's title is 113001. PixelMed looks for a content
# item of that name instead, finds none, and holds the modifier to be superfluous.
MODIFIER_REFUSED = re.compile(
    r"Error: Template 2010 .*\[Row [34]\] CODE CID 701[12]: within 1: /CONTAINER "
    r'\(113001,DCM,"Rejected for Quality Reasons"\): Conditional content item present when '
    r"condition not satisfied"
)


def need(*programs: str) -> None:
    """Skip where a peer is missing; with CI=true that is a failure."""
    missing = [p for p in programs if not shutil.which(p) and not Path(p).exists()]
    if not missing:
        return
    packages = " ".join(sorted({PACKAGES[program] for program in missing}))
    lack(f"missing: apt-get install --no-install-recommends {packages}")


def lack(words: str) -> NoReturn:
    """Skip; with CI=true that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(words)
    pytest.skip(words)


FOLDER = Path(os.environ.get("DICOMAI_SHARED", Path(__file__).parents[1] / "../shared"))


def shared() -> Path:
    """The folder of real data; the test is skipped where it is absent."""
    if not FOLDER.is_dir():
        pytest.skip(f"no shared data in {FOLDER}: set DICOMAI_SHARED")
    return FOLDER


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Any, seconds: float, what: str) -> Any:
    """Poll until condition() is true and return it; fail with what was waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s: {what}")


class Postgres:
    """An own cluster in a temporary folder, run by a non-root user, on 127.0.0.1.

    fsync: whether what is committed survives a power cut; a crash of the server it survives anyway
    """

    def __init__(self, fsync: bool = True) -> None:
        need("/usr/lib/postgresql")
        self.fsync = fsync
        self.bin = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self.port = free_port()
        self.count = 0
        # Not below pytest's own folder, which only root may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="dicomai-postgres-"))
        self.data = self.folder / "cluster"
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self._run("initdb", "-A", "trust", "-U", "dicomai", "-E", "UTF8", "-D", str(self.data))
        self.start()

    def start(self) -> None:
        """Serve, for the first time or after halt()."""
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.folder}"
        options += "" if self.fsync else " -c fsync=off"
        log = str(self.folder / "postgres.log")
        self._run("pg_ctl", "-w", "-D", str(self.data), "-o", options, "-l", log, "start")

    def halt(self) -> None:
        """Crash: no connection is ended in order, what was committed stays."""
        self._run("pg_ctl", "-D", str(self.data), "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.bin / program), *arguments]
        if os.geteuid() == 0:
            command = [
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                *command,
            ]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, done.stderr

    def new_database(self, like: str = "template1") -> str:
        """The URL of a database that is a copy of another one, by its name; the usual is empty."""
        self.count += 1
        name = f"test{self.count}"
        place = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "dicomai")
        self._run("createdb", *place, "-T", like, name)
        return f"postgresql+psycopg://dicomai@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        """End the cluster; its many files go while nobody waits."""
        self.halt()
        os.spawnlp(os.P_NOWAIT, "rm", "rm", "-rf", str(self.folder))


class Orthanc:
    """A PACS on free ports of 127.0.0.1 that knows the daemon as a modality."""

    def __init__(
        self, folder: Path, daemon_port: int, forward: bool = False, plugins: Sequence[str] = ()
    ) -> None:
        need("Orthanc")
        self.http, self.dicom = free_port(), free_port()
        self.folder = folder
        folder.mkdir(parents=True)
        scripts = []
        if forward:
            script = folder / "forward.lua"
            script.write_text(
                "function OnStoredInstance(id, tags, metadata, origin)\n"
                "  SendToModality(id, 'dicomai')\nend\n"
            )
            scripts.append(str(script))
        config = folder / "orthanc.json"
        config.write_text(
            json.dumps(
                {
                    "Name": "test",
                    "StorageDirectory": str(folder / "storage"),
                    "IndexDirectory": str(folder / "storage"),
                    "HttpPort": self.http,
                    "DicomPort": self.dicom,
                    "DicomAet": "ORTHANC",
                    "DicomCheckCalledAet": True,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "OverwriteInstances": False,
                    "DicomModalities": {"dicomai": ["DICOMAI", "127.0.0.1", daemon_port]},
                    "LuaScripts": scripts,
                    "Plugins": list(plugins),
                }
            )
        )
        environment = {**os.environ, "TCP_NODELAY": "1"}
        with (folder / "orthanc.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["Orthanc", str(config)], stdout=log, stderr=log, env=environment
            )
        wait_until(self._answers, 30, "Orthanc answers")

    def _answers(self) -> bool:
        try:
            return bool(self.get("/system"))
        except OSError:
            return False

    def get(self, path: str) -> Any:
        """GET a path of the REST API, JSON decoded."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=30) as answer:
            return json.load(answer)

    def get_bytes(self, path: str) -> bytes:
        """GET a path of the REST API, as it is."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=30) as answer:
            data: bytes = answer.read()
            return data

    def post(self, path: str, body: bytes | str | dict[str, Any]) -> Any:
        """POST to a path of the REST API."""
        if isinstance(body, dict):
            body = json.dumps(body)
        data = body.encode() if isinstance(body, str) else body
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", data=data)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def instances(self, study_instance_uid: str) -> list[dict[str, Any]]:
        """The instances of a study, each with its main tags."""
        found = self.post(
            "/tools/find", {"Level": "Study", "Query": {"StudyInstanceUID": study_instance_uid}}
        )
        if not found:
            return []
        listed: list[dict[str, Any]] = self.get(f"/studies/{found[0]}/instances")
        return listed

    def sop_instance_uids(self, study_instance_uid: str) -> list[str]:
        """What the PACS holds of a study."""
        return [
            item["MainDicomTags"]["SOPInstanceUID"] for item in self.instances(study_instance_uid)
        ]

    def stop(self) -> None:
        """End the PACS."""
        self.process.terminate()
        self.process.wait(20)


def storescu(port: int, files: Sequence[Path], called_ae_title: str = "DICOMAI") -> None:
    """Send files as a modality does (DCMTK)."""
    need("/usr/bin/storescu")
    command = ["/usr/bin/storescu", "-R", "-aet", "MODALITY", "-aec", called_ae_title]
    done = subprocess.run(
        [*command, "127.0.0.1", str(port), *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TCP_NODELAY": "1"},
    )
    assert done.returncode == 0, done.stderr


def complaints(files: Sequence[Path], pixelmed: bool = False) -> list[str]:
    """What dciodvfy, dcentvfy, DCMTK and PixelMed have to say against result objects.

    dciodvfy and PixelMed end with 0 even where they report an error: their words count.
    """
    need("dciodvfy", "/usr/bin/storescu")
    with ThreadPoolExecutor(2) as threads:
        found = [x for lines in threads.map(lambda f: _of_file(f, pixelmed), files) for x in lines]
    # All at once: most of its time it reads its dictionary.
    if _failed("dcmdump", "-q", *map(str, files)):
        for file in files:
            lines = _failed("dcmdump", "-q", str(file))
            found += [f"{file.name}: dcmdump {line}" for line in lines]
    if len(files) > 1:
        found += [f"dcentvfy {line}" for line in _errors("dcentvfy", *map(str, files))]
    return found


def _of_file(file: Path, pixelmed: bool) -> list[str]:
    found = [f"dciodvfy {line}" for line in _errors("dciodvfy", str(file))]
    ds = dcmread(file, force=True, specific_tags=["SOPClassUID"])
    kind = UID(ds.get("SOPClassUID", "")).keyword
    if "SRStorage" in kind or "KeyObject" in kind:
        found += [f"dsrdump {line}" for line in _failed("dsrdump", str(file))]
        if pixelmed:
            found += [f"PixelMed {line}" for line in _pixelmed(file)]
    if "SoftcopyPresentationState" in kind:
        found += [f"dcmpschk {line}" for line in _presentation_state(file)]
    if "SecondaryCapture" in kind:
        picture = str(file.with_suffix(".referee.ppm"))  # to compress it took most of the time
        found += [f"dcmj2pnm {line}" for line in _failed("dcmj2pnm", "+op", str(file), picture)]
    return [f"{file.name}: {line}" for line in found]


def _output(*command: str, **extra: str) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        env={**os.environ, **extra},
    )
    return done.stdout.decode(errors="replace")


def _errors(*command: str) -> list[str]:
    return [line for line in _output(*command).splitlines() if line.startswith("Error")]


def _failed(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, check=False)
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("E:")]
    return errors or ([f"exit code {done.returncode}"] if done.returncode else [])


def _presentation_state(file: Path) -> list[str]:
    """Why dcmpschk fails it, one line a reason."""
    text = _output("dcmpschk", str(file)).replace("\nE:  ", ",")
    if "Test passed" in text:
        return []
    lines = [line for line in text.splitlines() if line[:3].strip() in {"E:", "W:"}]
    beside = "(E|W): *(Testing|Test failed|Warning: Dubious date|$)"
    return [line for line in lines if not re.match(beside, line)]


def _pixelmed(file: Path) -> list[str]:
    need("DicomSRValidator", "java")
    limits = ("xpathTotalOpLimit", "xpathExprOpLimit", "xpathExprGrpLimit")
    options = " ".join(f"-Djdk.xml.{limit}=0" for limit in limits)
    options += " -Djava.awt.headless=true"
    options += " -XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # it runs once: a third of the time
    text = _output("DicomSRValidator", str(file), JDK_JAVA_OPTIONS=options)
    errors = [line for line in text.splitlines() if line.startswith("Error")]
    errors = [line for line in errors if not MODIFIER_REFUSED.fullmatch(line)]
    if text.lower().count("complete") < 2:
        errors.append(f"did not finish: {text[-200:]}")
    return errors


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of its own in memory."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        lack("needs root, to mount a small disk")
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        lack("this machine mounts no tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
