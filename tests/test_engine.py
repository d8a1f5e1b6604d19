"""The engines say the same, and which one is used is measured once."""

import json
from pathlib import Path

import make
import numpy as np
import pytest
import torch
from daemon import command
from offline import run_silently
from structlog.testing import capture_logs

from dicomai.errors import Misuse
from dicomai.infer import engine, package, vino
from dicomai.infer.engine import Engine, choose
from dicomai.infer.network import ARCHITECTURES, NetworkWithMaps, build
from dicomai.study import Float32, Model


@pytest.fixture
def model() -> Model:
    """The starter's package."""
    return package.read(make.STARTER)


def images(model: Model, count: int) -> Float32:
    """Noise of the right shape."""
    size = model.preprocessing.size
    noise = np.random.default_rng(1).normal(size=(count, model.channels, size, size))
    return noise.astype(np.float32)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_openvino_gives_torchs_logits_and_maps(name: str) -> None:
    torch.manual_seed(3)
    network = build(name, 1, 3).eval()
    random = np.random.default_rng(2)
    run = vino.compiled(network, 1, 64)
    for count in (1, 5, 2):
        pixels = random.normal(size=(count, 1, 64, 64)).astype(np.float32)
        with torch.inference_mode():
            logits, maps = network(torch.from_numpy(pixels))
        found = run(pixels)
        np.testing.assert_allclose(found[0], logits, atol=2e-4)
        np.testing.assert_allclose(found[1], maps, atol=2e-4)


def test_the_starters_probabilities_are_the_same_on_both(model: Model) -> None:
    both = Engine(model, "cpu"), Engine(model, "openvino")
    assert [item.name for item in both] == ["torch-cpu-fp32", "openvino-cpu-fp32"]
    (first, maps), (second, others) = (item.score(images(model, 3)) for item in both)
    np.testing.assert_allclose(first, second, atol=1e-5)
    np.testing.assert_allclose(maps, others, atol=1e-3)
    np.testing.assert_array_equal(both[0].biases, both[1].biases)


def test_the_fastest_is_measured_once_for_a_model(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, asked = {"cpu": 2.0, "openvino": 1.0}, []

    def measured(_model: Model, device: engine.Device, _folder: Path) -> float:
        asked.append(device)
        return rates[device]

    monkeypatch.setattr(engine, "_images_per_second", measured)
    folder = tmp_path / "data/engines"
    file = folder / engine.FASTEST
    assert choose(model, "openvino", folder) == "openvino"
    assert choose(model, "cpu", folder) == "cpu"
    assert not file.exists()
    assert choose(model, "auto", folder) == "cpu"
    assert asked == ["cpu", "openvino"]
    rates["openvino"] = 3.0
    assert choose(model, "auto", folder) == "cpu"
    assert len(asked) == 2
    for damaged in ("{", "[]", '{"something": "else"}'):
        file.write_text(damaged)
        assert choose(model, "auto", folder) == "openvino"
    assert set(json.loads(file.read_text()).values()) == {"else", "openvino"}


@pytest.fixture
def network() -> NetworkWithMaps:
    """A small one, with random weights."""
    torch.manual_seed(4)
    return build("resnet18", 1, 2).eval()


def test_a_converted_network_is_kept_and_a_damaged_one_made_again(
    network: NetworkWithMaps, tmp_path: Path
) -> None:
    folder, pixels = tmp_path / "engines/network", np.ones((1, 1, 64, 64), np.float32)
    before, _ = vino.compiled(network, 1, 64, folder)(pixels)
    weights = folder / "network.bin"
    whole, moment = weights.read_bytes(), weights.stat().st_mtime_ns
    vino.compiled(network, 1, 64, folder)
    assert weights.stat().st_mtime_ns == moment
    for damaged in (whole[:-1000], bytes(len(whole))):
        weights.write_bytes(damaged)
        with capture_logs() as lines:
            found, _ = vino.compiled(network, 1, 64, folder)(pixels)
        assert [line["event"] for line in lines] == ["converted_again"]
        np.testing.assert_array_equal(found, before)
    assert sorted(item.name for item in folder.iterdir()) == ["network.bin", "network.xml"]
    assert list(folder.parent.iterdir()) == [folder]


def test_one_that_says_something_else_is_not_used(
    network: NetworkWithMaps, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vino, "TOLERANCE", 0.0)
    with pytest.raises(vino.Disagrees):
        vino.compiled(network, 1, 64, tmp_path)
    rate = engine._images_per_second

    def measured(model: Model, device: engine.Device, folder: Path) -> float:
        if device == "openvino":
            raise vino.Disagrees
        return rate(model, device, folder)

    monkeypatch.setattr(engine, "_images_per_second", measured)
    assert choose(model, "auto", tmp_path) == "cpu"
    monkeypatch.setattr(engine, "choose", lambda *_: "openvino")
    assert engine.open_engine(model, "auto", tmp_path).name == "torch-cpu-fp32"
    with pytest.raises(vino.Disagrees):
        engine.open_engine(model, "openvino", tmp_path)


def test_where_openvino_is_missing_it_is_said_and_torch_is_used(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _name: None)
    assert choose(model, "auto", tmp_path) == "cpu"
    with pytest.raises(Misuse, match=r"install dicomai\[openvino\]"):
        choose(model, "openvino", tmp_path)


def test_try_scores_by_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DICOMAI_INFER__DEVICE")
    make.save(tmp_path / "in", [make.chest_radiograph()])
    config, scores = tmp_path / "dicomai.toml", []
    url = f"sqlite:///{tmp_path}/db/dicomai.db"
    config.write_text(f'data_dir = "{tmp_path}/data"\n[database]\nurl = "{url}"\n')
    for _ in range(2):
        out = str(tmp_path / "out")
        done = command(config, "try", str(tmp_path / "in"), "--out", out, "--format", "json")
        assert done.returncode == 0, done.stderr
        assert ("measured" in done.stderr) == (not scores)
        scores.append(json.loads(done.stdout)[0]["probability"])
    assert len(json.loads((tmp_path / "data/engines" / engine.FASTEST).read_text())) == 1
    np.testing.assert_allclose(scores, scores[0], atol=1e-5)


CONVERT = """
from dicomai.infer import vino
from dicomai.infer.network import build
vino.compiled(build("resnet18", 1, 1).eval(), 1, 64)
"""


def test_openvino_tells_nobody_of_it() -> None:
    done = run_silently(CONVERT)
    assert done.returncode == 0, done.stderr
