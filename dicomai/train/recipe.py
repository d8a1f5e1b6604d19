"""The recipe: everything that decides how a network is trained, as data."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dicomai.errors import Misuse


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Augmentation(_Section):
    """Bounds of the random changes of each training image."""

    rotation_degrees: float = Field(ge=0, le=20)
    shift: float = Field(ge=0, le=0.2)
    zoom: float = Field(ge=0, lt=1)
    aspect: float = Field(ge=0, lt=1)
    horizontal_flip: bool
    brightness: float = Field(ge=0, lt=1)
    contrast: float = Field(ge=0, lt=1)


class Phase(_Section):
    """Epochs at one image size (pixels) under one cycle of the learning rate."""

    size: int = Field(ge=32)
    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0)


class Recipe(_Section):
    """See config/recipe.toml for what each key does."""

    architecture: str
    channels: int
    labels: tuple[str, ...]
    seed: int
    batch_size: int = Field(ge=2)
    weight_decay: float = Field(ge=0)
    label_smoothing: float = Field(ge=0, lt=1)
    average_decay: float = Field(ge=0, lt=1)
    half_precision: bool
    augmentation: Augmentation
    phases: tuple[Phase, ...] = Field(min_length=1)


def load(path: Path) -> Recipe:
    """Read a recipe; a key that is unknown, missing or out of bounds is named (Misuse)."""
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Misuse(f"cannot read the recipe {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise Misuse(f"the recipe {path}: {key}: {first['msg']}") from error
