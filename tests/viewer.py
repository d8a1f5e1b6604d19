"""A radiologist's viewer in the tests: OHIF in headless Chromium, on Orthanc's DICOMweb."""

import hashlib
import http.client
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from peers import lack, need

DICOMWEB = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
CACHE = Path(__file__).parents[1] / ".venv/viewer"
# npm package -> SHA-256 of what `npm pack` brings.
OHIF = (
    "@ohif/app@3.13.2",
    "b189d3963bfc58e9394a9db8c7be75d07beb029ec211dbb126d47b62969dd3f1",
)
PLAYWRIGHT = (
    "playwright-core@1.64.1",
    "3af03703c967c95037454f2283f709d53ce804a4776d4219d319f5bbcc2a0185",
)
# Of OHIF: networks for segmenting by hand, whole slide images; 150 of 200 MB.
UNUSED = ("package/dist/ort", "package/dist/dicom-microscopy-viewer")
APP_CONFIG = """\
window.config = {
  routerBasename: '/', extensions: [], modes: [], showStudyList: true,
  customizationService: [{ 'ohif.tours': { $set: [] } }],
  investigationalUseDialog: { option: 'never' },
  defaultDataSourceName: 'orthanc',
  dataSources: [{
    namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
    sourceName: 'orthanc',
    configuration: {
      friendlyName: 'Orthanc', name: 'orthanc',
      qidoRoot: '/dicom-web', wadoRoot: '/dicom-web', wadoUriRoot: '/dicom-web',
      imageRendering: 'wadors', thumbnailRendering: 'wadors',
      bulkDataURI: { enabled: true },
    },
  }],
};
"""


@dataclass(frozen=True, slots=True)
class Look:
    """One series to open; what to wait for, for half a minute at most.

    words: in annotations on the image; coloured: pixels of the image
    """

    name: str
    series: str
    words: tuple[str, ...] = ()
    coloured: int = 0


def fetch(package: str, sha256: str) -> Path:
    """The folder of an npm package; the registry is asked once a cache."""
    folder = CACHE / package.replace("/", "-")
    if folder.is_dir():
        return folder / "package"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        done = subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", name, package],
            capture_output=True, text=True, check=False, cwd=name,
        )  # fmt: skip
        archives = list(Path(name).glob("*.tgz"))
        if not archives:
            lack(f"npm pack {package}: {done.stderr}")
        assert hashlib.sha256(archives[0].read_bytes()).hexdigest() == sha256, package
        # Debian's Python 3.11.2 has no filter for what tarfile extracts; later ones demand one.
        unused = [f"--exclude={folder}" for folder in UNUSED]
        Path(name, "new").mkdir()
        subprocess.run(["tar", "-xzf", archives[0], "-C", Path(name, "new"), *unused], check=True)
        Path(name, "new").rename(folder)
    return folder / "package"


class Site(SimpleHTTPRequestHandler):
    """OHIF and Orthanc's DICOMweb from one origin."""

    protocol_version = "HTTP/1.1"
    orthanc: int  # its port

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/dicom-web/"):
            self._forward()
        elif path == "/app-config.js":
            self._answer(200, "text/javascript", APP_CONFIG.encode())
        else:
            if not Path(self.translate_path(path)).is_file():
                self.path = "/index.html"
            super().do_GET()

    def end_headers(self) -> None:
        # Cornerstone's workers share memory: only a page isolated from other origins may.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def _forward(self) -> None:
        peer = http.client.HTTPConnection("127.0.0.1", self.orthanc, timeout=30)
        try:
            # Orthanc writes the host that it was asked by into the addresses that it answers.
            asked = {name: self.headers[name] for name in ("Accept", "Host") if self.headers[name]}
            peer.request("GET", self.path, headers=asked)
            answer = peer.getresponse()
            kind = answer.getheader("Content-Type", "application/octet-stream")
            self._answer(answer.status, kind, answer.read())
        finally:
            peer.close()

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def site(orthanc: int) -> Iterator[str]:
    """The URL of a viewer of what Orthanc, at this HTTP port, holds."""
    dist = fetch(*OHIF) / "dist"

    class Handler(Site):
        def __init__(self, *arguments: Any) -> None:
            self.orthanc = orthanc
            super().__init__(*arguments, directory=str(dist))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def look(url: str, study_instance_uid: str, looks: Sequence[Look], folder: Path) -> dict[str, Any]:
    """What there is to see: {"elsewhere": addresses asked of others, "looks": {name: ...}}.

    Of each look: text of the page, series listed, errors, and of its canvas the annotations that
    can be read and the number of pixels, of bright and of coloured ones; see viewer.mjs. Its
    picture is NAME.png in the folder.
    """
    need("chromium", "node", "npm")
    folder.mkdir(parents=True, exist_ok=True)
    task = {
        "playwright": str(fetch(*PLAYWRIGHT) / "index.js"),
        "chromium": shutil.which("chromium"),
        "page": f"{url}/viewer?StudyInstanceUIDs={study_instance_uid}",
        "folder": str(folder),
        "looks": [asdict(item) for item in looks],
    }
    done = subprocess.run(
        ["node", Path(__file__).with_suffix(".mjs"), json.dumps(task)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen
