"""The recipe: everything that decides how a network is trained and judged, as data."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dicomai.errors import Misuse
from dicomai.study import Code

# As packages have them (dicomai.infer.package).
Short = Annotated[str, Field(pattern=r"^[ -~]{1,16}$")]
Printable = Annotated[str, Field(pattern=r"^[ -~]{1,64}$")]
# From the image on; "head" is the one linear layer after them.
STAGES = {
    "resnet18": ("stem", "layer1", "layer2", "layer3", "layer4"),
    "resnet50": ("stem", "layer1", "layer2", "layer3", "layer4"),
    "densenet121": ("stem", "block1", "block2", "block3", "block4"),
    "vgg16": ("block1", "block2", "block3", "block4", "block5"),
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Target(_Section):
    """A label with its code (value, scheme, meaning)."""

    key: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    code: tuple[Short, Short, Printable]

    def as_code(self) -> Code:
        """The code of a model package."""
        return Code(*self.code)


class Augmentation(_Section):
    """Bounds of the random changes of each training image."""

    rotation_degrees: float = Field(default=0, ge=0, le=20)
    shift: float = Field(default=0, ge=0, le=0.2)
    zoom: float = Field(default=0, ge=0, lt=1)
    aspect: float = Field(default=0, ge=0, lt=1)
    brightness: float = Field(default=0, ge=0, lt=1)
    contrast: float = Field(default=0, ge=0, lt=1)
    horizontal_flip: bool = False
    vertical_flip: bool = False
    fill: Literal["nearest", "black"] = "nearest"


class Loss(_Section):
    """What is made small; l2 is the weight decay of the optimizer (Loshchilov, ICLR 2019)."""

    class_weights: Literal["balanced", "none"] = "balanced"
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    dropout: float = Field(default=0, ge=0, lt=1)
    l1: float = Field(default=0, ge=0)
    l2: float = Field(default=0, ge=0)


class Phase(_Section):
    """Epochs in which the network learns from one stage on; the stages before it are frozen.

    size: of the images (pixels), where it is not the recipe's; views: of each image, that a phase
    which trains the head alone computes once and draws from
    """

    fine_tune_from: str
    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    size: int | None = Field(default=None, ge=32, le=1024)
    warmup_epochs: float = Field(default=0, ge=0)
    decay: Literal["cosine", "plateau", "none"] = "none"
    batch_norm: Literal["frozen", "updated"] = "updated"
    views: int = Field(default=4, ge=1)


class Judgement(_Section):
    """How a candidate is judged; threshold: "youden", or the sensitivity that it is to reach."""

    threshold: Literal["youden"] | Annotated[float, Field(gt=0, lt=1)] = "youden"
    resamples: int = Field(default=2000, ge=100)


class Recipe(_Section):
    """See config/recipe.toml for what each key does."""

    architecture: Literal["resnet18", "resnet50", "densenet121", "vgg16"]
    channels: Literal[1, 3]
    size: int = Field(ge=32, le=1024)
    kind: Literal["multi-label", "multi-class"]
    start: str
    seed: int = Field(ge=0)
    batch_size: int = Field(ge=2)
    half_precision: bool
    gradient_clip: float = Field(gt=0)
    average_decay: float = Field(ge=0, lt=1)
    patience: int = Field(ge=1)
    labels: tuple[Target, ...] = Field(min_length=1)
    augmentation: Augmentation
    loss: Loss
    judgement: Judgement
    phases: tuple[Phase, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        stages = (*STAGES[self.architecture], "head")
        for number, phase in enumerate(self.phases, 1):
            if phase.fine_tune_from not in stages:
                raise ValueError(
                    f"phase {number}: fine_tune_from '{phase.fine_tune_from}' is none of "
                    f"{', '.join(stages)}"
                )
        keys = [label.key for label in self.labels]
        if len(set(keys)) < len(keys):
            raise ValueError("a label is there twice")
        if self.kind == "multi-class" and len(keys) < 2:
            raise ValueError("multi-class needs two labels or more; one is multi-label")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """The labels' keys."""
        return tuple(label.key for label in self.labels)

    def as_text(self, search: Mapping[str, float] | None = None) -> str:
        """What tells one training from another."""
        return json.dumps(self.model_dump() | ({"search": dict(search)} if search else {}))

    @property
    def activation(self) -> str:
        """What makes probabilities of logits."""
        return "softmax" if self.kind == "multi-class" else "sigmoid"


def load(path: Path) -> Recipe:
    """Read a recipe; a key that is unknown, missing or out of bounds is named (Misuse)."""
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Misuse(f"cannot read the recipe {path}: {error}") from error
    except ValidationError as error:
        # A misspelt key is a missing one too, but only the first says what to correct.
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"])
        raise Misuse(f"the recipe {path}: {key + ': ' if key else ''}{first['msg']}") from error
