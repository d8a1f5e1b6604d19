"""The types that pass between the stages: frozen, without behaviour of their own."""

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

# What dicomai writes as Manufacturer, and how it knows its own objects again.
MANUFACTURER = "dicomai"

# What a destination may ask for (destinations.outputs) ...
Kind = Literal["sc", "sr", "gsps", "seg", "kos", "not-analyzed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# ... and what it is sent when something of that does not hold any more.
WITHDRAWAL = "withdrawal"

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Instance:
    """One stored SOP Instance; digest: SHA-256 of transfer syntax and dataset, in hex."""

    sop_instance_uid: str
    sop_class_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    path: Path
    digest: str


@dataclass(frozen=True, slots=True)
class Study:
    """What one claim covers: the analyzable instances of a study at one revision.

    received_at: when the last of them came
    """

    study_instance_uid: str
    revision: int
    received_at: datetime
    instances: tuple[Instance, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one object may ask for; more is refused before memory is taken.

    max_pixels: rows x columns; max_bytes: of a file, and of what a deflated one becomes;
    max_frames: that are shown of one object
    """

    max_pixels: int
    max_bytes: int
    max_frames: int


@dataclass(frozen=True, slots=True)
class Letterbox:
    """Where an image of rows x columns lies inside a square of size x size (pixels)."""

    rows: int
    columns: int
    size: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One image as the network and as a person sees it.

    number: frame number, from 1; pixels: (C, size, size); display: (rows, columns), 0 is black,
    or (rows, columns, 3) in RGB
    """

    source: Instance
    number: int
    pixels: Float32
    display: UInt8
    letterbox: Letterbox


@dataclass(frozen=True, slots=True)
class Score:
    """What the network said of one frame; kept in the database, so that it is said once.

    probabilities: (K,); maps: (K, h, w), each cell's share of the label's logit;
    biases: (K,), so that mean(map) + bias is the logit
    """

    probabilities: Float32
    maps: Float32
    biases: Float32
    engine: str
    analyzed_at: datetime


@dataclass(frozen=True, slots=True)
class Prediction:
    """A frame with its score."""

    frame: Frame
    score: Score


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept (PS3.3 8.8)."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Label:
    """One output of a model; positive from threshold on.

    operating_point: what of the network's own probability is said as 0.5; None: it is said as it is
    """

    key: str
    threshold: float
    code: Code
    operating_point: float | None = None

    def said(self, probability: Float32) -> Float32:
        """The network's probability as it is said: linear below and above the operating point.

        As torchxrayvision's op_norm (Cohen et al., MIDL 2022).
        """
        point = self.operating_point
        if point is None:
            return probability
        above = 1 - (1 - probability) / (2 * (1 - point))
        return np.where(probability < point, probability / (2 * point), above).astype(np.float32)


class Presence(enum.StrEnum):
    """What is said of a label: of its probability, its threshold and the band around that."""

    PRESENT = "present"
    ABSENT = "absent"
    UNDETERMINED = "undetermined"


@dataclass(frozen=True, slots=True)
class Finding:
    """One label of one frame; cells: (h, w), 0 to 1, the probability of each place."""

    frame: Frame
    label: Label
    probability: float
    presence: Presence
    cells: Float32
    analyzed_at: datetime

    @property
    def positive(self) -> bool:
        """Whether the label is said to be present."""
        return self.presence is Presence.PRESENT


@dataclass(frozen=True, slots=True)
class Exclusion:
    """An instance that was not analyzed: a code for programs, a reason for people."""

    instance: Instance
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Accepts:
    """What a model may be shown.

    An empty list accepts everything; an empty string in a list stands for "not stated".
    age_years: youngest and oldest; min_size: pixels of the shorter side;
    frames: "all", "middle" or "every N"
    """

    modalities: tuple[str, ...]
    sop_classes: tuple[str, ...]
    body_parts: tuple[str, ...]
    views: tuple[str, ...]
    photometric: tuple[str, ...]
    presentation_intents: tuple[str, ...]
    localizers: bool
    age_years: tuple[float, float]
    min_size: int
    frames: str


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From the display image (0 to 1) to the network's input: (x * span + low - mean) / std."""

    size: int
    value_range: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Int8:
    """The compressed network of a package: SHA-256 of its two files.

    answer: (2, K), the logits that it gave, where it was made, to two fixed images
    """

    network: str
    weights: str
    answer: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model package without its weights; int8: what processors score with, of compressed ones."""

    name: str
    version: str
    architecture: str
    channels: int
    activation: str
    sha256: str
    accepts: Accepts
    preprocessing: Preprocessing
    labels: tuple[Label, ...]
    calibrated: bool
    provenance: Mapping[str, str]
    path: Path
    int8: Int8 | None = None

    @property
    def digest(self) -> str:
        """SHA-256 that tells it from every other model: of the weights; of all that computes."""
        if self.int8 is None:
            return self.sha256
        parts = f"{self.sha256} {self.int8.network} {self.int8.weights}"
        return hashlib.sha256(parts.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Reporting:
    """The site's choices that decide what results look like.

    undetermined_margin: probability on each side of a threshold; largest_side: of an overlay's
    picture, pixels; kinds: of KINDS, what is made
    """

    layout: Literal["overlay", "side-by-side"]
    undetermined_margin: float
    largest_side: int
    kinds: frozenset[str]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """All that decides what is said of an image, and how it is shown."""

    model: Model
    engine: str
    reporting: Reporting


@dataclass(frozen=True, slots=True)
class Sent:
    """An object that a PACS may hold.

    replaced_by: what withdrew it or took its place; destinations: who may hold it
    """

    sop_instance_uid: str
    sop_class_uid: str
    series_instance_uid: str
    kind: str
    replaced_by: str | None
    destinations: frozenset[str]


@dataclass(frozen=True, slots=True)
class Result:
    """One object to send, on disk.

    source: the instance it shows, or None for a whole study; replaces: SOP Instance UIDs of
    objects sent earlier that do not hold any more; destination: the only one that gets it
    """

    sop_instance_uid: str
    sop_class_uid: str
    series_instance_uid: str
    kind: str
    path: Path
    source_sop_instance_uid: str | None
    replaces: tuple[str, ...] = ()
    destination: str | None = None


@dataclass(frozen=True, slots=True)
class Analysis:
    """What analyze() makes of a study; nothing of it is true before its commit."""

    study: Study
    model: Model
    predictions: tuple[Prediction, ...]
    findings: tuple[Finding, ...]
    exclusions: tuple[Exclusion, ...]
    results: tuple[Result, ...]
