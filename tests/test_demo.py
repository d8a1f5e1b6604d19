"""The demonstration ends by itself, names its studies and leaves pictures to look at."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pydicom
import pytest
from peers import complaints, storescu, wait_until

from dicomai.demo.archive import Archive
from dicomai.demo.radiographs import digital_xray, radiographs

pytestmark = pytest.mark.timeout(250)


def test_demo_names_at_least_six_studies_and_shows_their_overlays(tmp_path: Path) -> None:
    # A daemon in production is not touched: its settings in the environment do not reach the demo.
    environment = {**os.environ, "DICOMAI_DATABASE__URL": "postgresql+psycopg://nobody@127.0.0.1/x"}
    done = subprocess.run(
        [sys.executable, "-m", "dicomai", "demo", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) studies with findings", done.stdout)
    assert found is not None
    assert int(found[1]) >= 6
    (folder,) = tmp_path.glob("demo-*")
    assert len(list(folder.glob("nih_*.png"))) == int(found[1])
    sheet = cv2.imread(str(folder / "overlays.png"))
    assert sheet is not None
    assert (sheet[..., 2].astype(int) - sheet[..., 0]).max() > 60  # it is in colour
    captures = sorted(folder.glob("archive/*/*.dcm"))
    # A summary and a report for each study, and overlays of those that are positive.
    assert 2 * int(found[1]) < len(captures) < 3 * int(found[1])
    assert complaints(captures[:4]) == []


def test_demo_keep_stays_up_takes_studies_and_ends_on_a_signal(tmp_path: Path) -> None:
    log = tmp_path / "out"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dicomai", "demo", "--keep", "--out", str(tmp_path)],
            stdout=file,
            stderr=file,
        )
    try:
        wait_until(lambda: "Ctrl-C stops it" in log.read_text(), 120, "the demo stays up")
        found = re.search(r"storescu -R -aec DICOMAI 127.0.0.1 (\d+)", log.read_text())
        assert found is not None
        sent = next(tmp_path.glob("demo-*/sent/*.dcm"))
        storescu(int(found[1]), [sent])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_radiograph_of_the_demo_is_a_valid_dx_object(tmp_path: Path) -> None:
    files = []
    for number, radiograph in enumerate(radiographs()):
        file = tmp_path / f"{number}.dcm"
        ds = digital_xray(radiograph, f"DEMO{number}", f"1.2.3.{number + 1}")
        ds.save_as(file, enforce_file_format=True)
        files.append(file)
    assert len(files) >= 8
    assert [line for file in files for line in complaints([file])] == []
    assert pydicom.dcmread(files[0]).pixel_array.shape == (512, 512)


def test_the_archive_keeps_the_bytes_that_it_gets(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive")
    ds = digital_xray(radiographs()[0], "DEMO", "1.2.3")
    file = tmp_path / "sent.dcm"
    ds.save_as(file, enforce_file_format=True)
    try:
        storescu(archive.port, [file], called_ae_title="ARCHIVE")
        (kept,) = archive.files()
    finally:
        archive.close()
    assert pydicom.dcmread(kept) == pydicom.dcmread(file)
