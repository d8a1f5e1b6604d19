"""From a trained network to a model package, all or nothing."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from dicomai import durable
from dicomai.errors import Misuse
from dicomai.infer import package
from dicomai.infer.network import NetworkWithMaps, build
from dicomai.study import Accepts, Model
from dicomai.train.ancestry import FILE, Ancestry
from dicomai.train.loop import MEAN, STD
from dicomai.train.recipe import Recipe

MODEL_TOML = """\
name = {name}
version = {version}
architecture = {architecture}
channels = {channels}
activation = {activation}
sha256 = {sha256}
calibrated = true

# An empty list accepts everything; an empty string accepts images that do not say.
[accepts]
{accepts}

[preprocessing]
size = {size}
resize = "letterbox"
value_range = [0.0, 1.0]
mean = {mean}
std = {std}

{labels}
[provenance]
{provenance}
"""
LABEL_TOML = """\
[[labels]]
key = {key}
threshold = {threshold}
code = {code}
"""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model comes from."""

    training: str
    data_digest: str
    parent: str
    ancestry: Ancestry


def publish(
    network: NetworkWithMaps,
    recipe: Recipe,
    size: int,
    accepts: Accepts,
    thresholds: Mapping[str, float],
    evaluation: Mapping[str, Any],
    origin: Origin,
    name: str,
    version: str,
    out: Path,
) -> Model:
    """Write out/name/version with half-precision weights; size: of the network's input, pixels."""
    folder = refuse_existing(out, name, version)
    with new_package(folder) as work:
        weights = {
            key: value.cpu().half().contiguous() if value.is_floating_point() else value.cpu()
            for key, value in network.state_dict().items()
        }
        data = save(weights)
        (work / "weights.safetensors").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        described = describe(recipe, size, accepts, thresholds, origin, name, version, sha256)
        (work / "model.toml").write_text(described)
        (work / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
        (work / FILE).write_text(origin.ancestry.as_json())
    return package.read(folder)


def describe(
    recipe: Recipe,
    size: int,
    accepts: Accepts,
    thresholds: Mapping[str, float],
    origin: Origin,
    name: str,
    version: str,
    sha256: str,
) -> str:
    """model.toml; JSON's strings, numbers, booleans and lists are TOML's."""
    labels = [
        {"key": label.key, "threshold": thresholds[label.key], "code": list(label.code)}
        for label in recipe.labels
    ]
    provenance = {
        "data_digest": origin.data_digest,
        "training": origin.training,
        "parent": origin.parent,
    }
    values: dict[str, Any] = {
        "name": name,
        "version": version,
        "architecture": recipe.architecture,
        "channels": recipe.channels,
        "activation": recipe.activation,
        "sha256": sha256,
        "size": size,
        "mean": [MEAN] * recipe.channels,
        "std": [STD] * recipe.channels,
    }
    return MODEL_TOML.format(
        **{key: json.dumps(value) for key, value in values.items()},
        accepts=_lines(dataclasses.asdict(accepts)),
        labels="\n".join(
            LABEL_TOML.format(**{k: json.dumps(v) for k, v in x.items()}) for x in labels
        ),
        provenance=_lines(provenance),
    )


def _lines(values: Mapping[str, Any]) -> str:
    # JSON and TOML spell alike, but for what has no end.
    lines = (f"{key} = {json.dumps(value)}" for key, value in values.items())
    return "\n".join(line.replace("Infinity", "inf") for line in lines)


def rounded(network: NetworkWithMaps, recipe: Recipe) -> NetworkWithMaps:
    """The network as it will be loaded: on the processor, its weights through half precision."""
    copy = build(recipe.architecture, recipe.channels, len(recipe.labels))
    copy.load_state_dict({key: value.cpu() for key, value in network.state_dict().items()})
    half: NetworkWithMaps = copy.half().float().eval()
    return half


@contextmanager
def new_package(folder: Path) -> Iterator[Path]:
    """An empty folder; what is written into it becomes the package, verified, all or nothing.

    It lies one level deeper than packages are looked for: a training that is killed leaves none.
    """
    around = folder.with_name(f"{folder.name}{durable.TEMPORARY}")
    shutil.rmtree(around, ignore_errors=True)  # of one that was killed
    work = around / folder.name
    work.mkdir(parents=True)
    try:
        yield work
        package.verify(package.read(work))
        for file in work.iterdir():
            durable.sync_file(file)
        durable.sync_folder(work)
        work.rename(folder)
        durable.sync_folder(folder.parent)
    finally:
        shutil.rmtree(around)


def refuse_existing(out: Path, name: str, version: str) -> Path:
    """The folder of a new package. Raises Misuse where there is one already."""
    folder = out / name / version
    if folder.exists():
        raise Misuse(f"{folder} exists already: choose another version")
    return folder
