"""Pictures that explain: lines at fixed levels, every label's map, what channels respond to."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import cv2
import make
import numpy as np
import pytest
import torch
from daemon import command
from studies import model

from dicomai.infer import features, package
from dicomai.infer.engine import load_network
from dicomai.infer.network import NetworkWithMaps
from dicomai.report.overlay import CONTOURS, legend, outline
from dicomai.study import (
    Algorithm,
    Code,
    Finding,
    Frame,
    Instance,
    Label,
    Letterbox,
    Presence,
    Reporting,
)

BLACK = np.zeros((200, 300, 3), np.uint8)


def test_lines_stand_where_the_map_reaches_their_level() -> None:
    heat = np.tile(np.linspace(0, 1, 300, dtype=np.float32), (200, 1))
    picture = outline(BLACK, heat)
    for level, colour in CONTOURS.items():
        column = int(np.argmax(heat[0] >= level))
        np.testing.assert_allclose(picture[100, column], colour, atol=40)  # drawn smoothly
    assert not picture[:, 90:140].any()  # 0.30 to 0.47
    assert not picture[:, [0, -1]].any()  # the image's own border is no line


def test_a_map_below_every_level_has_no_line() -> None:
    assert not outline(BLACK, np.full((200, 300), 0.2, np.float32)).any()


@pytest.fixture(scope="module")
def network() -> NetworkWithMaps:
    """The shipped model on the processor."""
    return load_network(package.read(make.STARTER))


def test_the_channels_are_those_with_the_largest_weights(network: NetworkWithMaps) -> None:
    chosen = features.strongest_channels(network, 0, 4)
    weights = network.head.weight.detach()[0]
    assert [number for number, _ in chosen[:2]] == weights.topk(2).indices.tolist()
    assert {number for number, _ in chosen[2:]} == set((-weights).topk(2).indices.tolist())
    assert [value for _, value in chosen] == sorted((v for _, v in chosen), reverse=True)


def test_a_picture_makes_its_channel_respond_more_than_noise_does(network: NetworkWithMaps) -> None:
    channels = [number for number, _ in features.strongest_channels(network, 0, 2)]
    pictures = features.respond_to(network, channels, 1, steps=6)
    assert pictures.shape == (2, features.SIZE, features.SIZE)
    assert 0 <= pictures.min() < pictures.max() <= 1
    torch.manual_seed(5)
    noise = torch.randn((2, 1, features.SIZE, features.SIZE)) * 0.1
    found = torch.atanh(torch.from_numpy(pictures)[:, None] * 2 - 1)
    with torch.no_grad():
        before = features.responses(network, noise, channels)
        after = features.responses(network, found, channels)
    assert (after > before).all()


def test_try_explain_writes_a_map_for_each_label_and_one_sheet_of_channels(tmp_path: Path) -> None:
    ds = make.chest_radiograph()
    (file,) = make.save(tmp_path / "in", [ds])
    config = tmp_path / "dicomai.toml"
    url = f"sqlite:///{tmp_path}/db/dicomai.db"
    config.write_text(f'data_dir = "{tmp_path}/data"\n[database]\nurl = "{url}"\n')
    done = command(config, "try", str(file), "--out", str(tmp_path / "out"), "--explain")
    assert done.returncode == 0, done.stderr
    name = f"{ds.SOPInstanceUID}.1.pneumonia.png"
    picture = cv2.imread(str(tmp_path / "out" / str(ds.StudyInstanceUID) / name))
    assert picture is not None
    assert picture.shape[1] == 512
    sheet = cv2.imread(str(tmp_path / "out" / "chest-starter.2.pneumonia.channels.png"))
    assert sheet is not None
    assert sheet.std() > 20


def test_try_scores_as_the_daemon_would(tmp_path: Path) -> None:
    """By the newest that ships, not a candidate in the site's folder; by the active one if any."""
    make.save(tmp_path / "in", [make.chest_radiograph()])
    config = tmp_path / "dicomai.toml"
    url = f"sqlite:///{tmp_path}/db/dicomai.db"
    config.write_text(f'data_dir = "{tmp_path}/data"\n[database]\nurl = "{url}"\n')
    folder = shutil.copytree(make.STARTER, tmp_path / "data/models/chest-starter/5")
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace('version = "2"', 'version = "5"', 1))

    def version() -> str:
        out = str(tmp_path / "out")
        done = command(config, "try", str(tmp_path / "in"), "--out", out, "--format", "json")
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)[0]["model_version"])

    assert version() == "2"
    assert list((tmp_path / "data").iterdir()) == [tmp_path / "data/models"]
    assert command(config, "db", "upgrade").returncode == 0
    assert version() == "2"
    done = command(config, "model", "activate", "chest-starter", "5")
    assert done.returncode == 0, done.stderr
    assert version() == "5"


def test_the_legend_keeps_its_text_inside_whatever_the_width() -> None:
    label = Label("long", 0.5, Code("1", "99X", "Consolidation of the right upper lobe"))
    source = Instance("1.2.1", "1.2", "1.2.2", "1.2.840.10008.1.2.1", Path("x.dcm"), "0")
    nothing = np.zeros((1, 2, 2), np.float32)
    frame = Frame(source, 1, nothing, np.zeros((2, 2), np.uint8), Letterbox(2, 2, 2, 0, 0, 2, 2))
    finding = Finding(
        frame, label, 0.999, Presence.PRESENT, nothing[0], datetime(2026, 3, 29, tzinfo=UTC)
    )
    algorithm = Algorithm(model(), "test", Reporting("overlay", 0.0, 1536, frozenset({"sc"})))
    for width in (256, 300, 512, 1000, 2048, 3000):
        strip = legend(width, width, finding, algorithm)
        assert strip.any()
        assert not strip[:, -max(2, width // 100) :].any(), width
