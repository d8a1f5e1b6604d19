"""From a trained network to a model package, all or nothing."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from dicomai import durable
from dicomai.errors import Misuse
from dicomai.infer import package
from dicomai.infer.network import ResNetWithMaps, build
from dicomai.study import Model
from dicomai.train.dataset import Sample, digest, load_images, targets
from dicomai.train.evaluate import (
    auc_interval,
    sensitivity_specificity,
    youden_by_source,
)
from dicomai.train.loop import MEAN, STD, Trained, score
from dicomai.train.recipe import Recipe

# SNOMED CT and DICOM codes of what this project trains on (shared DICOM.md, section 2).
CODES = {"pneumonia": ("233604007", "SCT", "Pneumonia")}

MODEL_TOML = """\
name = "{name}"
version = "{version}"
architecture = "{architecture}"
channels = {channels}
activation = "sigmoid"
sha256 = "{sha256}"

# An empty list accepts everything; an empty string accepts images that do not say.
[accepts]
modalities = ["CR", "DX"]
sop_classes = []
body_parts = ["CHEST", "THORAX", "LUNG", ""]
views = ["PA", "AP", ""]
photometric = ["MONOCHROME1", "MONOCHROME2"]
presentation_intents = ["FOR PRESENTATION", ""]
localizers = false
age_years = [0, 130]
min_size = 100
frames = "all"

[preprocessing]
size = {size}
resize = "letterbox"
value_range = [0.0, 1.0]
mean = [{mean}]
std = [{std}]

[[labels]]
key = "{label}"
threshold = {threshold}
code = ["{code[0]}", "{code[1]}", "{code[2]}"]

[provenance]
data_digest = "{data_digest}"
training = "{training}"
parent = ""
"""


def publish(
    trained: Trained,
    samples: tuple[Sample, ...],
    recipe: Recipe,
    name: str,
    version: str,
    out: Path,
) -> Model:
    """Write out/name/version with half-precision weights and their evaluation on "test"."""
    folder = refuse_existing(out, name, version)
    (label,) = recipe.labels
    if label not in CODES:
        raise Misuse(f"there is no code for the label {label}: add it to dicomai/train/publish.py")
    with scratch(folder) as work:
        weights = {
            key: value.half().contiguous() if value.is_floating_point() else value.contiguous()
            for key, value in trained.network.state_dict().items()
        }
        save_file(weights, work / "weights.safetensors")
        evaluation = evaluate(rounded(trained.network, recipe), trained.size, samples, recipe)
        sha256 = hashlib.sha256((work / "weights.safetensors").read_bytes()).hexdigest()
        phases = ", ".join(f"{p.epochs} epochs at {p.size} px" for p in recipe.phases)
        values = {
            "name": name,
            "version": version,
            "architecture": recipe.architecture,
            "channels": recipe.channels,
            "sha256": sha256,
            "size": trained.size,
            "mean": MEAN,
            "std": STD,
            "label": label,
            "threshold": evaluation["threshold"],
            "code": CODES[label],
            "data_digest": digest(samples),
            "training": f"dicomai.train from scratch, seed {recipe.seed}: {phases}",
        }
        (work / "model.toml").write_text(MODEL_TOML.format(**values))
        evaluation["epochs"] = [dataclasses.asdict(epoch) for epoch in trained.epochs]
        (work / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
        package.verify(package.read(work))
        for file in work.iterdir():
            durable.sync_file(file)
        durable.sync_folder(work)
        work.rename(folder)
        durable.sync_folder(folder.parent)
    return package.read(folder)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder that is renamed to become a package; what is left of it goes.

    It lies one level deeper than packages are looked for: a training that is killed leaves none.
    """
    around = folder.with_name(f"{folder.name}{durable.TEMPORARY}")
    shutil.rmtree(around, ignore_errors=True)  # of one that was killed
    work = around / folder.name
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(around)


def refuse_existing(out: Path, name: str, version: str) -> Path:
    """The folder of a new package. Raises Misuse where there is one already."""
    folder = out / name / version
    if folder.exists():
        raise Misuse(f"{folder} exists already: choose another version")
    return folder


def rounded(network: ResNetWithMaps, recipe: Recipe) -> ResNetWithMaps:
    """The network as it will be loaded: weights through half precision."""
    copy = build(recipe.architecture, recipe.channels, len(recipe.labels))
    copy.load_state_dict({key: value.cpu() for key, value in network.state_dict().items()})
    return copy.half().float().eval().to(memory_format=torch.channels_last)


def evaluate(
    network: ResNetWithMaps, size: int, samples: tuple[Sample, ...], recipe: Recipe
) -> dict[str, Any]:
    """The threshold chosen on "val", and each source's figures on "test"."""
    device = torch.device("cpu")
    splits: dict[str, tuple[Any, ...]] = {}
    for split in ("val", "test"):
        chosen = tuple(sample for sample in samples if sample.split == split)
        splits[split] = (
            targets(chosen).astype(np.float64),
            score(network, load_images(chosen, size), device, half_precision=False),
            np.array([sample.source for sample in chosen]),
            np.array([sample.patient_id for sample in chosen]),
        )
    truth, scores, sources, _ = splits["val"]
    threshold = round(youden_by_source(truth, scores, sources), 3)
    truth, scores, sources, patients = splits["test"]
    figures = {}
    for source in np.unique(sources):
        of = sources == source
        area = auc_interval(truth[of], scores[of], patients[of], recipe.seed)
        sensitivity, specificity = sensitivity_specificity(truth[of], scores[of], threshold)
        figures[str(source)] = {
            "images": int(of.sum()),
            "patients": len(np.unique(patients[of])),
            "positive": int(truth[of].sum()),
            "auc": round(area.value, 4),
            "auc_95": [round(area.low, 4), round(area.high, 4)],
            "sensitivity": round(sensitivity, 4),
            "specificity": round(specificity, 4),
        }
    return {
        "label": recipe.labels[0],
        "split": "test",
        "threshold": threshold,
        "threshold_rule": "largest mean Youden index over the sources on val",
        "interval": "95 % percentile bootstrap, 2000 resamples of patients",
        "sources": figures,
    }
