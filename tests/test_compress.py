"""dicomai model compress: 8 bits where they say nearly the same, and nothing where they do not."""

import json
import shutil
import zipfile
from pathlib import Path

import blobs
import make
import numpy as np
import pytest
from daemon import command
from offline import run_silently
from safetensors.torch import load_file, save_file

from dicomai.compressing import MOST_AUC_LOST, MOST_CHANGED
from dicomai.errors import ModelDamaged
from dicomai.infer import engine, int8, package, vino
from dicomai.infer.engine import Engine, try_out
from dicomai.infer.network import build
from dicomai.packing import pack, unpack
from dicomai.roles import choose_model
from dicomai.scoring import open_engine
from dicomai.settings import load
from dicomai.store import registry
from dicomai.store.database import Database, open_database
from dicomai.study import Float32, Model

pytest.importorskip("nncf")
pytestmark = pytest.mark.timeout(280)
NAME = "chest-starter"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a site with a small model of its own, chest-starter 3, that is active."""
    folder = tmp_path_factory.mktemp("trained")
    config = blobs.site(folder)
    blobs.add(config, blobs.folder_of(folder / "drawn", 240))
    done = blobs.retrain(config)
    assert "chest-starter 3 promoted" in done.stdout, done.stderr
    return config


@pytest.fixture(scope="module")
def compressed(trained: Path) -> Path:
    """The same, where the active model was compressed; what was said is in the file said."""
    done = command(trained, "model", "compress", NAME)
    trained.with_name("said").write_text(done.stdout)
    assert done.returncode == 0, done.stderr
    return trained


def database_of(config: Path) -> Database:
    """The database of the settings."""
    return open_database(load(config).database.url)


def package_of(config: Path, version: str = "3-int8") -> Model:
    """An installed package of the site."""
    return package.read(load(config).data_dir / "models" / NAME / version)


def drawn(numbers: range) -> Float32:
    """Drawn images as the network's input; even ones have a blob."""
    import cv2

    pictures = [cv2.resize(blobs.blob(n, n % 2 == 0), (64, 64)) for n in numbers]
    return ((np.stack(pictures)[:, None].astype(np.float32) / 255 - 0.5) / 0.25).astype("f4")


def test_it_becomes_a_candidate_that_says_what_was_measured(compressed: Path) -> None:
    model = package_of(compressed)
    package.verify(model)
    assert registry.active_version(database_of(compressed), NAME) == "3"
    assert registry.sha256_of(database_of(compressed), NAME, "3-int8") == model.digest
    assert model.provenance["parent"] == "chest-starter 3"
    parent = package_of(compressed, "3")
    assert (model.labels, model.accepts, model.sha256) == (
        parent.labels,
        parent.accepts,
        parent.sha256,
    )
    assert (model.path / "learnt.json").read_bytes() == (parent.path / "learnt.json").read_bytes()
    (label,) = json.loads((model.path / "evaluation.json").read_text())["compressed"]["labels"]
    assert label["largest_change"] <= MOST_CHANGED
    assert label["auc_before"] - label["auc_after"] <= MOST_AUC_LOST
    assert "largest change of a probability" in compressed.with_name("said").read_text()
    assert "8 bits: pneumonia, " in command(compressed, "model", "show", NAME, "3-int8").stdout
    versions = [m.version for m in package.installed((model.path.parents[1],))]
    assert versions == ["3", "3-int8"]


def test_made_active_it_scores_in_8_bits_on_processors_and_else_in_full_precision(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command(compressed, "model", "activate", NAME, "3-int8")
    assert done.stdout == "chest-starter 3-int8 is active, 3 was before\n", done.stderr
    model = choose_model(load(compressed), database_of(compressed))
    images = drawn(range(9000, 9024))
    said = {}
    for device in ("cpu", "openvino"):
        monkeypatch.setenv("DICOMAI_INFER__DEVICE", device)
        opened = open_engine(load(compressed), model)
        said[opened.name] = opened.score(images)
    assert list(said) == ["torch-cpu-fp32", "openvino-cpu-int8"]
    (whole, maps), (small, others) = said.values()
    assert not np.array_equal(whole, small)
    np.testing.assert_allclose(small, whole, atol=2 * MOST_CHANGED)
    assert others.shape == maps.shape
    make.save(tmp_path / "in", [make.chest_radiograph()])
    out = ("--out", str(tmp_path / "out"), "--format", "json")
    tried = command(compressed, "try", str(tmp_path / "in"), *out)
    assert tried.returncode == 0, tried.stderr
    command(compressed, "model", "activate", NAME, "3")


def test_without_openvino_its_full_precision_scores(
    compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _name: None)
    try_out(package_of(compressed))
    monkeypatch.setenv("DICOMAI_INFER__DEVICE", "auto")
    assert open_engine(load(compressed), package_of(compressed)).name == "torch-cpu-fp32"


def test_a_damaged_file_is_refused(compressed: Path, tmp_path: Path) -> None:
    for name in package.INT8:
        copy = Path(shutil.copytree(package_of(compressed).path, tmp_path / name / "copy"))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        for device in ("cpu", "openvino"):
            with pytest.raises(ModelDamaged, match=f"{name} is damaged"):
                Engine(package.read(copy), device)
        (copy / name).unlink()
        with pytest.raises(ModelDamaged, match=f"cannot read .*{name}"):
            package.verify(package.read(copy))


def test_one_that_answers_otherwise_here_is_refused(compressed: Path, tmp_path: Path) -> None:
    model = package_of(compressed)
    copy = Path(shutil.copytree(model.path, tmp_path / "copy"))
    assert model.int8 is not None
    toml = copy / "model.toml"
    value = repr(model.int8.answer[0][0])
    toml.write_text(toml.read_text().replace(value, repr(model.int8.answer[0][0] + 9), 1))
    with pytest.raises(vino.Disagrees):
        Engine(package.read(copy), "openvino")
    with pytest.raises(ModelDamaged, match="compress it here"):
        try_out(package.read(copy))
    opened = engine.open_engine(package.read(copy), "cpu", tmp_path)
    assert opened.name == "torch-cpu-fp32"


def test_it_goes_from_site_to_site_and_never_becomes_active_by_itself(
    compressed: Path, tmp_path: Path
) -> None:
    file = tmp_path / "int8.zip"
    pack(package_of(compressed), file)
    with zipfile.ZipFile(file) as archive:
        assert set(package.INT8) <= set(archive.namelist())
    there = unpack(file, tmp_path / "models", lambda _name, _version: None)
    assert there.digest == package_of(compressed).digest
    config = blobs.site(tmp_path / "other")
    config.write_text(config.read_text() + '[infer]\nmodel = "another"\n')
    folder = Path(
        shutil.copytree(there.path, load(config).data_dir / "models" / "another" / "3-int8")
    )
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace(f'"{NAME}"', '"another"', 1))
    with pytest.raises(ModelDamaged, match="no version of another is active"):
        choose_model(load(config), database_of(config))
    assert command(config, "model", "activate", "another", "3-int8").returncode == 0
    assert choose_model(load(config), database_of(config)).version == "3-int8"


def test_what_is_compressed_is_not_compressed_again(compressed: Path) -> None:
    twice = command(compressed, "model", "compress", NAME, "3-int8")
    assert (twice.returncode, twice.stderr) == (
        2,
        "dicomai: chest-starter 3-int8 is compressed already\n",
    )
    again = command(compressed, "model", "compress", NAME, "3")
    assert again.returncode == 2
    assert "chest-starter 3-int8 was made before" in again.stderr


def test_without_labels_it_says_so(tmp_path: Path) -> None:
    config = blobs.site(tmp_path)
    done = command(config, "model", "compress", NAME)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there are no labelled images to calibrate with" in done.stderr


def spoil(model: Model, folder: Path) -> None:
    """A copy, version 4, that says the same, but of which 8 bits leave nothing.

    In the last two stages one channel between the two convolutions of a block is made ten thousand
    times as large, and what it is weighed with as much smaller: the range of all is that channel's.
    """
    shutil.copytree(model.path, folder)
    weights = {k: v.float() for k, v in load_file(folder / package.WEIGHTS).items()}
    for stage in (3, 4):
        for block in (0, 1):
            at = f"resnet.layer{stage}.{block}"
            for key in ("weight", "bias"):
                weights[f"{at}.bn1.{key}"][0] *= 1e4
            weights[f"{at}.conv2.weight"][:, 0] /= 1e4
    save_file(weights, folder / package.WEIGHTS)
    toml = folder / "model.toml"
    found = package.sha256_of(folder / package.WEIGHTS)
    text = toml.read_text().replace(model.sha256, found)
    toml.write_text(text.replace('version = "3"', 'version = "4"', 1))


def test_one_that_would_say_too_much_else_is_not_installed(trained: Path) -> None:
    models = load(trained).data_dir / "models" / NAME
    spoil(package_of(trained, "3"), models / "4")
    done = command(trained, "model", "compress", NAME, "4", seconds=260)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "dicomai: not installed, for in 8 bits it says too much else: pneumonia:"
    )
    assert "AUC" in last
    assert "largest change of a probability" in last
    assert not (models / "4-int8").exists()
    assert not list(models.glob("*.part*"))
    assert registry.sha256_of(database_of(trained), NAME, "4-int8") is None


def test_a_training_goes_on_from_its_full_precision(compressed: Path, tmp_path: Path) -> None:
    config = blobs.site(tmp_path, like=compressed)
    shutil.copytree(load(compressed).data_dir / "models", tmp_path / "data/models")
    text = (tmp_path / "recipe.toml").read_text().replace('start = "none"', 'start = "active"')
    (tmp_path / "recipe.toml").write_text(text)
    assert command(config, "model", "activate", NAME, "3-int8").returncode == 0
    done = blobs.retrain(config, "--dry-run")
    assert done.returncode == 0, done.stdout
    assert "nothing was changed" in done.stdout


def test_8_bits_use_all_their_values_in_every_layer(tmp_path: Path) -> None:
    """NNCF's default gives the first ones 7 bits, and what they lose is lost for all others."""
    import openvino  # after vino has kept its telemetry out

    images = list(np.random.default_rng(1).normal(size=(4, 1, 64, 64)).astype(np.float32))
    int8.make(build("resnet18", 1, 1).eval(), 1, 64, images, 1, tmp_path)
    made = openvino.Core().read_model(tmp_path / package.INT8[0]).get_ordered_ops()
    constants = [node for node in made if node.get_type_name() == "Constant"]
    weights = [node.get_data() for node in constants if node.get_element_type() == openvino.Type.i8]
    assert len(weights) == 19  # of 20 convolutions
    assert {int(np.abs(each.astype(int)).max()) for each in weights} == {127}


QUANTIZE = """
import tempfile
from pathlib import Path
import numpy as np
from dicomai.infer import int8
from dicomai.infer.network import build
images = list(np.random.default_rng(1).normal(size=(4, 1, 64, 64)).astype(np.float32))
with tempfile.TemporaryDirectory() as folder:
    int8.make(build("resnet18", 1, 1).eval(), 1, 64, images, 1, Path(folder))
"""


def test_nncf_tells_nobody_of_it() -> None:
    done = run_silently(QUANTIZE)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "telemetry" not in done.stderr.lower()
