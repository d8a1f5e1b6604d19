"""Weights that other programs trained, made into packages: torchvision, torchxrayvision."""

import hashlib
import tomllib
from pathlib import Path

from safetensors.torch import save

from dicomai.errors import Misuse
from dicomai.infer import package
from dicomai.infer.network import build
from dicomai.settings import shipped
from dicomai.study import Model
from dicomai.train.publish import new_package, refuse_existing
from dicomai.train.start import read_weights

# Whose weights have a description of their own in config/.
KNOWN = {"torchxrayvision": "torchxrayvision.toml"}


def description(name: str) -> Path:
    """The file that describes weights: one of those that are shipped, or a path."""
    return shipped(f"config/{KNOWN[name]}") if name in KNOWN else Path(name)


def take(weights: Path, described: Path, models: Path) -> Model:
    """Write a package below models from a state_dict and a model.toml without its sha256.

    Of outputs that the description does not name (output = N of a label) nothing is taken over.
    Raises Misuse where either cannot be read, or one does not fit the other.
    """
    try:
        text = described.read_text()
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Misuse(f"cannot read {described}: {error}") from error
    if "sha256" in table:
        raise Misuse(f"{described}: leave out sha256: it is what the import finds")
    name, version = str(table.get("name", "")), str(table.get("version", ""))
    folder = refuse_existing(models, name, version)
    with new_package(folder) as work:
        sha256 = _convert(weights, table, described, work)
        top, _, rest = text.partition("\n[")
        lines = [line for line in rest.splitlines() if not line.startswith("output = ")]
        whole = f'{top}\nsha256 = "{sha256}"\n\n[' + "\n".join(lines) + "\n"
        (work / "model.toml").write_text(whole)
    return package.read(folder)


def _convert(weights: Path, table: dict[str, object], described: Path, work: Path) -> str:
    """weights.safetensors in full precision; returns its SHA-256."""
    labels = table.get("labels")
    if not isinstance(labels, list) or not labels:
        raise Misuse(f"{described} names no [[labels]]")
    try:
        network = build(str(table["architecture"]), int(str(table["channels"])), len(labels))
    except (KeyError, ValueError) as error:
        raise Misuse(f"{described}: architecture or channels: {error}") from error
    prefix, last = network.architecture.prefix, network.architecture.last
    found = {key.removeprefix("model."): value for key, value in read_weights(weights).items()}
    outputs = [int(label.get("output", number)) for number, label in enumerate(labels)]
    for key in (f"{last}.weight", f"{last}.bias"):
        if key not in found or max(outputs) >= len(found[key]):
            raise Misuse(f"{weights} has no output {max(outputs)}: it holds another classifier")
        found[key] = found[key][outputs].clone()
    wanted = network.net.state_dict()
    wrong = [k for k in wanted if k not in found or found[k].shape != wanted[k].shape]
    if wrong:
        raise Misuse(f"{weights} is no {table['architecture']}: {wrong[0]} does not fit")
    kept = {f"{prefix}.{key}": found[key].contiguous() for key in wanted}
    data = save(kept)
    (work / "weights.safetensors").write_bytes(data)
    return hashlib.sha256(data).hexdigest()
