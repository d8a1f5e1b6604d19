"""A hospital's certificates, made with the openssl program."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from peers import lack


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Somebody who signs certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        if not shutil.which("openssl"):
            lack("missing: apt-get install --no-install-recommends openssl")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.certificate, self._key = folder / "ca.pem", folder / "ca.key"
        subject = ["-x509", "-days", "3650", "-subj", f"/CN={name}"]
        _openssl("req", *subject, *_new(self._key), "-out", self.certificate)

    def sign(
        self,
        name: str,
        names: str = "IP:127.0.0.1",
        days: int = 365,
        kind: tuple[str, ...] = ("rsa:2048",),
    ) -> Pair:
        """A certificate; names: what it is for; days: below zero, it has expired; kind: of key."""
        key, request, certificate = (
            self.folder / f"{name}{end}" for end in (".key", ".csr", ".pem")
        )
        _openssl("req", "-subj", f"/CN={name}", *_new(key, *kind), "-out", request)
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        signed = ["-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial"]
        valid = ["-days", str(days), "-extfile", extensions, "-out", certificate]
        _openssl("x509", "-req", *signed, *valid)
        return Pair(certificate, key)


def _new(key: Path, *kind: str) -> list[str | Path]:
    return ["-newkey", *(kind or ("rsa:2048",)), "-nodes", "-keyout", key]


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
