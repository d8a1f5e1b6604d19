"""Weights of other programs: the same probabilities as their own code, which is never run."""

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import blobs
import numpy as np
import pytest
import torch
import torchvision
from daemon import command

from dicomai import importing
from dicomai.errors import Misuse
from dicomai.infer.engine import Engine
from dicomai.settings import shipped
from dicomai.study import Model

DESCRIPTION = """\
name = "imported"
version = "3"
architecture = "{architecture}"
channels = {channels}
activation = "sigmoid"
[accepts]
modalities = []
sop_classes = []
body_parts = []
views = []
photometric = []
presentation_intents = []
localizers = true
age_years = [0, 130]
min_size = 1
frames = "all"
[preprocessing]
size = 64
resize = "letterbox"
value_range = [0.0, 1.0]
mean = {mean}
std = {std}
[[labels]]
key = "second"
output = 1
threshold = 0.5
code = ["1", "99TEST", "Second"]
[[labels]]
key = "first"
output = 0
threshold = 0.5
code = ["2", "99TEST", "First"]
[provenance]
"""


def described(folder: Path, **changes: Any) -> Path:
    """A description of three channels, two outputs in another order."""
    usual = {"architecture": "resnet50", "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    file = folder / "described.toml"
    file.write_text(DESCRIPTION.format(**{**usual, **changes}))
    return file


def scored(model: Model, images: torch.Tensor) -> np.ndarray[Any, Any]:
    """What the daemon's engine says."""
    return Engine(model, "cpu").score(images.numpy())[0]


@pytest.mark.parametrize("architecture", ["resnet50", "resnet18", "densenet121"])
def test_torchvisions_weights_say_what_torchvision_says(tmp_path: Path, architecture: str) -> None:
    torch.manual_seed(5)
    theirs = getattr(torchvision.models, architecture)(num_classes=2).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    about = described(tmp_path, architecture=architecture)
    model = importing.take(tmp_path / "weights.pth", about, tmp_path / "models")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = torch.sigmoid(theirs(images)).numpy()[:, [1, 0]]
    assert np.abs(scored(model, images) - expected).max() < 1e-5
    assert [label.key for label in model.labels] == ["second", "first"]


@pytest.fixture
def torchxrayvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its own code, with random weights where its own would be fetched to."""
    for name in (
        "skimage",
        "skimage.io",
        "skimage.transform",
        "imageio",
        "pandas",
        "tqdm",
        "requests",
    ):
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except ImportError:  # which its networks do not use
                monkeypatch.setitem(sys.modules, name, MagicMock())
    return pytest.importorskip("torchxrayvision")


def test_torchxrayvisions_weights_say_what_torchxrayvision_says(
    tmp_path: Path, torchxrayvision: Any
) -> None:
    torch.manual_seed(6)
    net = torchvision.models.resnet50(num_classes=18)
    net.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    for module in net.modules():  # so that the outputs differ, and lie on both sides of 0.5
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    urls = torchxrayvision.models.model_urls["resnet50-res512-all"]
    file = tmp_path / Path(urls["weights_url"]).name
    torch.save(net.state_dict(), file)
    theirs = torchxrayvision.models.ResNet("resnet50-res512-all", cache_dir=f"{tmp_path}/")
    model = importing.take(file, importing.description("torchxrayvision"), tmp_path / "models")
    images = (torch.rand(3, 1, 512, 512) * 2 - 1) * 1024
    with torch.inference_mode():
        expected = theirs(images).numpy()
    known = [number for number, point in enumerate(urls["op_threshs"]) if not np.isnan(point)]
    found = scored(model, images)
    assert found.shape == (3, 16)
    assert np.abs(found - expected[:, known]).max() < 1e-5
    names = [urls["labels"][number].lower().replace(" ", "_") for number in known]
    assert [label.key for label in model.labels] == names
    points = [urls["op_threshs"][number] for number in known]
    assert [label.operating_point for label in model.labels] == points


def test_a_file_that_would_run_something_runs_nothing(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps({"fc.weight": Bomb()}))
    with pytest.raises(Misuse, match="no weights that can be read safely"):
        importing.take(file, described(tmp_path), tmp_path / "models")
    torch.save({"fc.weight": Bomb()}, file)
    with pytest.raises(Misuse, match="no weights that can be read safely"):
        importing.take(file, described(tmp_path), tmp_path / "models")
    assert not (tmp_path / "exploded").exists()
    assert list((tmp_path / "models").glob("*/*/*")) == []


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), file)
    with pytest.raises(Misuse, match="is no resnet50"):
        importing.take(file, described(tmp_path), tmp_path / "models")
    torch.save(torchvision.models.resnet50(num_classes=1).state_dict(), file)
    with pytest.raises(Misuse, match="has no output 1"):
        importing.take(file, described(tmp_path), tmp_path / "models")
    with pytest.raises(Misuse, match="architecture or channels"):
        importing.take(file, described(tmp_path, architecture="alexnet"), tmp_path / "models")


def test_the_command_installs_a_candidate(tmp_path: Path) -> None:
    config = blobs.site(tmp_path, f"sqlite:///{tmp_path}/dicomai.db")
    torch.save(torchvision.models.resnet50(num_classes=2).state_dict(), tmp_path / "weights.pth")
    about = described(tmp_path)
    done = command(
        config, "model", "import", str(tmp_path / "weights.pth"), "--describe", str(about)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported 3 is installed")
    assert "imported" in command(config, "model", "list").stdout
    gone = command(config, "model", "import", "gone.pth", "--describe", str(about))
    assert (gone.returncode, gone.stderr.count("\n")) == (2, 1)
    assert shipped("config/torchxrayvision.toml").is_file()
