"""The weights that a training begins with."""

import pickle
import struct
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dicomai.errors import Misuse
from dicomai.infer.network import NetworkWithMaps, build
from dicomai.study import Model
from dicomai.train.recipe import Recipe

# What torch and safetensors raise for a damaged or foreign file.
READER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
# Where torch.hub keeps what torchvision has fetched, by architecture.
HUB_FILES = {
    "resnet18": "resnet18-*.pth",
    "resnet50": "resnet50-*.pth",
    "densenet121": "densenet121-*.pth",
    "vgg16": "vgg16-*.pth",
}


def begin(recipe: Recipe, active: Model) -> NetworkWithMaps:
    """A network with the recipe's start weights: of the active model, ImageNet, a file, or none.

    Raises Misuse where they are not there, or are another architecture's.
    """
    torch.manual_seed(recipe.seed)
    network = build(recipe.architecture, recipe.channels, len(recipe.labels))
    if recipe.start == "active":
        _from_active(network, recipe, active)
    elif recipe.start != "none":
        take(network, read_weights(_file(recipe)), recipe.start)
    return network.to(memory_format=torch.channels_last)


def _from_active(network: NetworkWithMaps, recipe: Recipe, active: Model) -> None:
    if active.architecture != recipe.architecture:
        raise Misuse(
            f"the recipe's architecture is {recipe.architecture}, but the active model's is "
            f"{active.architecture}: set start to imagenet, a file, or none"
        )
    weights = {
        key.removeprefix(f"{network.architecture.prefix}."): value.float()
        for key, value in load_file(active.path / "weights.safetensors").items()
    }
    take(network, weights, f"{active.name} {active.version}")
    _take_rows(network, weights, [label.key for label in active.labels], recipe)


def _take_rows(
    network: NetworkWithMaps, weights: dict[str, Tensor], known: list[str], recipe: Recipe
) -> None:
    """What the active model knows of a label it goes on with; a new label begins with nothing."""
    last = network.architecture.last
    with torch.no_grad():
        for row, key in enumerate(recipe.keys):
            if key in known:
                network.head.weight[row] = weights[f"{last}.weight"][known.index(key)]
                network.head.bias[row] = weights[f"{last}.bias"][known.index(key)]


def _file(recipe: Recipe) -> Path:
    if recipe.start != "imagenet":
        path = Path(recipe.start)
        if not path.is_file():
            raise Misuse(f"the recipe's start: there is no file {path}")
        return path
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = sorted(folder.glob(HUB_FILES[recipe.architecture]))
    if not found:
        raise Misuse(
            f"the recipe's start: there are no ImageNet weights in {folder}: put torchvision's "
            f"{HUB_FILES[recipe.architecture]} there, or set start to a file, active or none"
        )
    return found[-1]


def read_weights(file: Path) -> dict[str, Tensor]:
    """A state_dict of safetensors, or of torch.save, of which nothing but tensors is read."""
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with warnings.catch_warnings(action="ignore"):  # about pickles; what fails says so
            found = torch.load(file, map_location="cpu", weights_only=True)
    except READER_ERRORS as error:
        words = " ".join(str(error).split())[:200]
        raise Misuse(f"{file} holds no weights that can be read safely: {words}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise Misuse(f"{file} holds no state_dict")
    return {str(key): value.float() for key, value in found.items()}


def take(network: NetworkWithMaps, weights: dict[str, Tensor], what: str) -> None:
    """Load all but the classifier. Of three input channels one is made by adding them up: a grey
    image is the same in each. Raises Misuse where anything else does not fit.
    """
    how, net = network.architecture, network.net
    first = f"{how.first}.weight"
    mine = net.state_dict()
    found = {key: value for key, value in weights.items() if not key.startswith(f"{how.last}.")}
    if first in found and found[first].shape[1] == 3 and mine[first].shape[1] == 1:
        found[first] = found[first].sum(1, keepdim=True)
    wanted = {key for key in mine if not key.startswith(f"{how.last}.")}
    missing = sorted(wanted - found.keys())
    wrong = sorted(k for k in wanted & found.keys() if found[k].shape != mine[k].shape)
    if missing or wrong:
        raise Misuse(
            f"{what} does not fit: {len(missing)} weights are missing and {len(wrong)} have "
            f"another shape, first {(missing + wrong)[0]}"
        )
    net.load_state_dict({key: found[key] for key in wanted}, strict=False)
