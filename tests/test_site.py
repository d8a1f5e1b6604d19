"""A site whose daemon learns by itself, from drawn images; `make site` is the same with real ones.

Images arrive over C-STORE, labels by CSV, a radiologist corrects one by a Structured Report, the
schedule retrains, the gate promotes, and a rollback brings back the same bytes.
"""

import csv
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import blobs
import make
import pytest
from daemon import Daemon, command, daemon
from peers import free_port, need, storescu, wait_until
from pydicom.dataset import Dataset
from test_documents import report

from dicomai.demo.radiographs import set_pixels
from dicomai.store import queries, registry, runs, truth

pytestmark = pytest.mark.timeout(290)

IMAGES = 160
CORRECTED = 7  # has no blob: its label is absent
MORE = """
[retrain]
cron = "* * * * *"
min_new_labels = {images}
recipe = "{folder}/recipe.toml"
[schedule]
labels = "* * * * *"
"""


def drawn(number: int, patient: str) -> Dataset:
    """An image of its own study; even ones have a blob."""
    ds = make.chest_radiograph(0, PatientID=patient)
    set_pixels(ds, blobs.blob(number, number % 2 == 0).repeat(4, 0).repeat(4, 1), 8)
    return ds


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, list[Dataset]]]:
    """A daemon that has received everything, and whose training has ended."""
    folder = tmp_path_factory.mktemp("site")
    # Studies come in another order each time: what two epochs reach is not always enough.
    recipe = blobs.RECIPE.replace("epochs = 2", "epochs = 5")
    (folder / "recipe.toml").write_text(recipe)
    more = MORE.format(images=IMAGES, folder=folder)
    with daemon(folder, f"sqlite:///{folder}/dicomai.db", free_port(), more=more) as running:
        images = [drawn(n, blobs.patient_of(running.database, n)) for n in range(IMAGES)]
        storescu(running.port, make.save(folder / "sent", images))
        file = folder / "labels.csv"
        with file.open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["study_instance_uid", "label", "value", "reader", "date"])
            for number, ds in enumerate(images):
                value = "present" if number % 2 == 0 else "absent"
                writer.writerow([ds.StudyInstanceUID, "pneumonia", value, "A", "2026-11-20"])
        done = command(running.config, "labels", "import", str(file))
        assert done.returncode == 0, done.stderr
        correction = report(images[CORRECTED], "unsure")
        storescu(running.port, make.save(folder / "correction", [correction]))
        running.wait_idle(IMAGES)

        def ended() -> bool:
            rows = runs.runs(running.database, 9)
            return bool(rows) and rows[-1]["state"] in {"done", "failed"}

        wait_until(ended, 200, "the schedule has retrained")
        yield running, images


def test_the_schedule_retrains_and_the_gate_promotes(site: tuple[Daemon, list[Dataset]]) -> None:
    running, _ = site
    run = runs.runs(running.database, 9)[-1]
    how = (run["state"], run["decision"], run["version"])
    assert how == ("done", "promoted", "3"), run["reason"]
    assert run["images"] >= IMAGES - 1
    assert registry.active_version(running.database, "chest-starter") == "3"


def test_a_radiologists_report_becomes_a_label(site: tuple[Daemon, list[Dataset]]) -> None:
    running, images = site
    study = str(images[CORRECTED].StudyInstanceUID)

    def read() -> bool:
        found = truth.labels(running.database, study, None, 9)
        return {row["source"] for row in found} == {"file", "document"}

    wait_until(read, 90, "the document is read")
    (label,) = [
        row for row in truth.labels(running.database, study, None, 9) if row["source"] == "document"
    ]
    assert (label["subject"], label["value"]) == ("image", "unsure")
    assert "Doe" not in label["reader"]


def test_the_next_study_is_scored_by_the_new_version_and_a_rollback_undoes_it(
    site: tuple[Daemon, list[Dataset]],
) -> None:
    running, _ = site
    wait_until(lambda: running.log.count('"scoring"') > 1, 30, "the worker has taken it")
    later = drawn(1000, "later")
    storescu(running.port, make.save(running.folder / "later", [later]))
    running.wait_idle(IMAGES + 1)
    found = queries.findings(
        running.database, queries.FindingFilter(study_instance_uid=str(later.StudyInstanceUID))
    )
    assert {row["model_version"] for row in found} == {"3"}
    done = command(running.config, "model", "rollback", "chest-starter")
    assert done.returncode == 0, done.stderr
    assert registry.active_version(running.database, "chest-starter") == "2"
    assert {row["state"] for row in running.studies()} == {"analyzed"}


COUNT = """<script>addEventListener("load", () => {
  const images = [...document.images], charts = [...document.querySelectorAll("svg")];
  document.body.dataset.seen = [images.length, images.filter(i => i.naturalWidth).length,
    charts.length, charts.filter(c => c.getBoundingClientRect().width > 100).length,
    document.documentElement.scrollWidth].join(" ");
})</script></body>"""


def test_the_report_opens_in_a_browser_without_network(
    site: tuple[Daemon, list[Dataset]], tmp_path: Path
) -> None:
    need("chromium")
    running, _ = site
    page = tmp_path / "report.html"
    written = (running.folder / "data/training/1/report.html").read_text()
    page.write_text(written.replace("</body>", COUNT))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,900", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    seen = re.search(r'data-seen="([\d ]+)"', done.stdout)
    assert seen is not None, done.stderr[-2000:]
    images, shown, charts, drawn_charts, width = map(int, seen[1].split())
    assert images == shown > 10
    assert charts == drawn_charts >= 5
    assert width <= 1000
