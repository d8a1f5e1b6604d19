"""Model packages: a folder of data, never code, read and verified without torch.

models/<name>/<version>/   model.toml   weights.safetensors   evaluation.json   LICENSE   README.md
of a compressed one also   int8.xml   int8.bin
"""

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dicomai.errors import ModelDamaged
from dicomai.study import Accepts, Code, Int8, Label, Model, Preprocessing

WEIGHTS = "weights.safetensors"
INT8 = "int8.xml", "int8.bin"  # a network as OpenVINO keeps it
LONGEST_VERSION = 16
SHA256 = r"^[0-9a-f]{64}$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Accepts(_Section):
    modalities: tuple[str, ...]
    sop_classes: tuple[str, ...]
    body_parts: tuple[str, ...]
    views: tuple[str, ...]
    photometric: tuple[str, ...]
    presentation_intents: tuple[str, ...]
    localizers: bool
    age_years: tuple[Annotated[float, Field(ge=0)], float]
    min_size: int = Field(ge=1)
    frames: str = Field(pattern=r"^(all|middle|every [1-9][0-9]{0,3})$")


class _Preprocessing(_Section):
    size: int = Field(ge=32, le=4096)
    resize: Literal["letterbox"]
    value_range: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]


class _Label(_Section):
    key: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    threshold: float = Field(ge=0, le=1)
    operating_point: float | None = Field(default=None, gt=0, lt=1)
    # Drawn into pictures, and written in whatever character set the source has (PS3.5 6.2).
    code: tuple[
        Annotated[str, Field(pattern=r"^[ -~]{1,16}$")],
        Annotated[str, Field(pattern=r"^[ -~]{1,16}$")],
        Annotated[str, Field(pattern=r"^[ -~]{1,64}$")],
    ]


class _Int8(_Section):
    network: str = Field(pattern=SHA256)
    weights: str = Field(pattern=SHA256)
    answer: tuple[tuple[float, ...], ...] = Field(min_length=2, max_length=2)


class _Package(_Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST_VERSION)
    architecture: Literal["resnet50", "resnet18", "densenet121", "vgg16"]
    channels: Literal[1, 3]
    activation: Literal["sigmoid", "softmax"]
    sha256: str = Field(pattern=SHA256)
    accepts: _Accepts
    preprocessing: _Preprocessing
    labels: tuple[_Label, ...] = Field(min_length=1)
    calibrated: bool = False
    provenance: dict[str, str]
    int8: _Int8 | None = None

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> "_Package":
        for name in ("mean", "std"):
            if len(getattr(self.preprocessing, name)) != self.channels:
                raise ValueError(f"preprocessing.{name} needs one value for each channel")
        if self.int8 and any(len(row) != len(self.labels) for row in self.int8.answer):
            raise ValueError("int8.answer needs one value for each label")
        return self


def read(folder: Path) -> Model:
    """Read folder/model.toml; what is unknown, missing or out of bounds is named (ModelDamaged)."""
    file = folder / "model.toml"
    try:
        package = _Package.model_validate(tomllib.loads(file.read_text()))
    except FileNotFoundError:
        raise ModelDamaged(
            f"there is no model package in {folder}: {file.name} is missing"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ModelDamaged(f"cannot read {file}: {error}: install the package again") from error
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ModelDamaged(
            f"{file}: '{key}': {problem['msg']}: install the package again"
        ) from error
    return Model(
        name=package.name,
        version=package.version,
        architecture=package.architecture,
        channels=package.channels,
        activation=package.activation,
        sha256=package.sha256,
        accepts=Accepts(**package.accepts.model_dump()),
        preprocessing=Preprocessing(**package.preprocessing.model_dump(exclude={"resize"})),
        labels=tuple(
            Label(item.key, item.threshold, Code(*item.code), item.operating_point)
            for item in package.labels
        ),
        calibrated=package.calibrated,
        provenance=package.provenance,
        path=folder,
        int8=Int8(**package.int8.model_dump()) if package.int8 else None,
    )


def verify(model: Model) -> None:
    """Raise ModelDamaged unless each file is, byte for byte, the one that model.toml names."""
    files = {WEIGHTS: model.sha256}
    if model.int8 is not None:
        files |= dict(zip(INT8, (model.int8.network, model.int8.weights), strict=True))
    for name, expected in files.items():
        _verify(model.path / name, expected)


def _verify(file: Path, expected: str) -> None:
    found = sha256_of(file)
    if found != expected:
        raise ModelDamaged(
            f"{file} is damaged (SHA-256 {found[:12]}, expected {expected[:12]}): "
            "install the package again"
        )


def sha256_of(file: Path) -> str:
    """Of a file of a package. Raises ModelDamaged where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelDamaged(
            f"cannot read {file}: {error.strerror}: install the package again"
        ) from error


def installed(folders: tuple[Path, ...]) -> list[Model]:
    """All packages below the folders (name/version), later folders losing to earlier ones.

    By name; of versions, those that begin with a number by its size, the others after them.
    """
    found: dict[tuple[str, str], Model] = {}
    for folder in folders:
        for file in sorted(folder.glob("*/*/model.toml")):
            model = read(file.parent)
            found.setdefault((model.name, model.version), model)
    return sorted(found.values(), key=_place)


def _place(model: Model) -> tuple[str, bool, str, str]:
    rest = model.version.lstrip("0123456789")
    number = model.version.removesuffix(rest)
    return model.name, not number, number.rjust(16), rest
