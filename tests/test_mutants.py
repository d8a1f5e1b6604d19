"""A few of the damaged files of mutants.py, each time the same."""

from pathlib import Path

import mutants
import pytest
from peers import shared

pytestmark = pytest.mark.timeout(600)


def test_damaged_files_are_rendered_or_refused_and_no_decoder_hangs() -> None:
    outcomes = mutants.render_all(shared() / "data/dicom", 400, print)
    assert sum(outcomes.values()) == 400
    assert outcomes["rendered"] > 100
    assert outcomes["decoder-hung"] == 0
    assert outcomes["too-large"] < 8  # lengths that lie are no large objects
    assert outcomes["undecodable"] + outcomes["not-dicom"] > 10


def test_a_daemon_deals_with_damaged_files(tmp_path: Path) -> None:
    fate = mutants.send_all(shared() / "data/dicom", 120, tmp_path)
    assert fate.answers["stored"] > 50
    assert fate.unexplained == []
    assert fate.died == 0
    assert fate.reasons["finding"] > 20
    assert fate.peak_bytes < 4e9
