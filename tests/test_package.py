"""Model packages: what is damaged is named in one line, and reading one needs no torch."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import make
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dicomai.errors import ModelDamaged
from dicomai.infer import package
from dicomai.infer.engine import Engine

SHIPPED = make.STARTER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped package that a test may damage."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "models" / "chest-starter" / "2"))


def edit(folder: Path, old: str, new: str) -> None:
    """Change model.toml."""
    file = folder / "model.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def truncate(folder: Path) -> None:
    """Cut the weights and let model.toml name what is left."""
    weights = folder / "weights.safetensors"
    with weights.open("r+b") as file:
        file.truncate(100_000)
    name_weights(folder)


def name_weights(folder: Path) -> None:
    """Write the weights' own SHA-256 into model.toml."""
    found = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    edit(folder, package.read(folder).sha256, found)


def lose_a_layer(folder: Path) -> None:
    """Weights without the first convolution, rightly named."""
    weights = folder / "weights.safetensors"
    state = load_file(weights)
    del state["resnet.conv1.weight"]
    weights.unlink()
    save_file(state, weights)
    name_weights(folder)


def test_the_shipped_model_reads_and_verifies() -> None:
    model = package.read(SHIPPED)
    package.verify(model)
    assert (model.name, model.version) == ("chest-starter", "2")
    assert [label.code.meaning for label in model.labels] == ["Pneumonia"]
    assert all(0 < label.threshold < 1 for label in model.labels)
    assert len(model.preprocessing.mean) == len(model.preprocessing.std) == model.channels


def other_sha256(folder: Path) -> None:
    """model.toml names other weights."""
    edit(folder, package.read(folder).sha256, "0" * 64)


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("model.toml", lambda f: edit(f, "channels =", "chanels =")),
    ("model.toml", lambda f: edit(f, "threshold = 0.", "threshold = 7.")),
    ("model.toml", lambda f: edit(f, "channels = ", "channels ")),
    ("model.toml", lambda f: edit(f, 'name = "', 'name = "../')),
    ("model.toml", lambda f: (f / "model.toml").write_bytes(b"\xff\xfe")),
    ("model.toml", lambda f: (f / "model.toml").unlink()),
    ("weights.safetensors", other_sha256),
    ("weights.safetensors", lambda f: (f / "weights.safetensors").unlink()),
    ("weights.safetensors", truncate),
    ("weights.safetensors", lose_a_layer),
]
NAMES = [
    "unknown key", "out of bounds", "no TOML", "path as name", "no text", "no model.toml",
    "wrong sha256", "no weights", "truncated weights", "missing layer",
]  # fmt: skip


@pytest.mark.parametrize(("file", "damage"), DAMAGES, ids=NAMES)
def test_a_damaged_package_is_one_line_that_names_the_file(
    folder: Path, file: str, damage: Callable[[Path], object]
) -> None:
    damage(folder)
    with pytest.raises(ModelDamaged) as caught:
        Engine(package.read(folder), "cpu")
    words = str(caught.value)
    assert str(folder) in words
    assert file in words
    assert len(words.splitlines()) == 1


def test_weights_that_do_not_fit_say_what_does_not_fit(folder: Path) -> None:
    lose_a_layer(folder)
    with pytest.raises(ModelDamaged, match=r"conv1\.weight"):
        Engine(package.read(folder), "cpu")


@pytest.mark.parametrize("what", ["mean = [0.5, 0.5]", "std = [0.0]"])
def test_preprocessing_that_cannot_work_is_refused(folder: Path, what: str) -> None:
    key = what.split()[0]
    (old,) = [x for x in (folder / "model.toml").read_text().splitlines() if x.startswith(key)]
    edit(folder, old, what)
    with pytest.raises(ModelDamaged, match=key):
        package.read(folder)


def test_every_version_is_found_and_the_sites_own_folder_wins(folder: Path) -> None:
    other = Path(shutil.copytree(folder, folder.parent / "9"))
    edit(other, 'version = "2"', 'version = "9"')
    found = package.installed((folder.parents[1], SHIPPED.parents[1]))
    before = SHIPPED.with_name("1")
    assert [(m.version, m.path) for m in found] == [("1", before), ("2", folder), ("9", other)]


def test_the_engine_scores_what_its_maps_add_up_to() -> None:
    model = package.read(SHIPPED)
    engine = Engine(model, "cpu")
    size = model.preprocessing.size
    images = np.random.default_rng(0).normal(size=(2, model.channels, size, size)).astype("f4")
    probabilities, maps = engine.score(images)
    logits = maps.mean((2, 3)) + engine.biases
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-5)


LOADED = """
import sys
sys.argv = ["dicomai", *sys.argv[1:]]
from dicomai.cli import main
try:
    if sys.argv[1:]:
        main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "torchvision", "cv2", "highdicom", "pynetdicom", "alembic"}
loaded = heavy & set(sys.modules)
print(sorted(loaded), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["results", "--help"],
        ["try", "--help"],
        ["model", "list"],
        ["model", "show", "chest-starter"],
        ["model", "verify", "chest-starter"],
        ["config", "check"],
    ],
    ids=" ".join,
)
def test_the_command_line_imports_nothing_heavy_that_it_does_not_use(
    tmp_path: Path, arguments: list[str]
) -> None:
    settings = f'data_dir = "{tmp_path}"\n[database]\nurl = "sqlite:///{tmp_path}/dicomai.db"\n'
    (tmp_path / "dicomai.toml").write_text(settings)
    config = ["--config", str(tmp_path / "dicomai.toml")]
    more = config if arguments and "--help" not in arguments else []
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments, *more],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
