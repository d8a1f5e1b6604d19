"""The straight line: Study -> Analysis; no database, no network.

select -> Frame -> predict -> Prediction -> Finding -> Result files
"""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from dicomai import durable
from dicomai.errors import Rejected
from dicomai.prepare import geometry
from dicomai.report import capture, sr
from dicomai.report.sr import Predecessor
from dicomai.study import (
    Analysis,
    Exclusion,
    Finding,
    Float32,
    Frame,
    Instance,
    Model,
    Prediction,
    Result,
    Score,
    Study,
)

FRAMES_AT_ONCE = 16

Predict = Callable[[Float32], tuple[Float32, Float32]]
# Of each instance in turn: its header and its frames (prepare.image), or why there are none.
Prepare = Callable[[tuple[Instance, ...]], Iterator[list[Any] | Rejected]]


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model that is ready: predict takes (N, C, size, size), see Engine.score."""

    model: Model
    prepare: Prepare
    engine: str
    biases: Float32
    predict: Predict


@dataclass(frozen=True, slots=True)
class Context:
    """What is known beforehand: earlier scores by (digest, frame number), the earlier report."""

    scores: Mapping[tuple[str, int], Score]
    predecessor: Predecessor | None
    now: datetime
    out: Path


def analyze(study: Study, scorer: Scorer, context: Context) -> Analysis:
    """Analyze every image that the model accepts; a damaged image fails alone.

    Writes the result files below context.out; they mean nothing before the caller's commit.
    """
    headers: dict[str, Dataset] = {}
    exclusions: list[Exclusion] = []
    waiting: list[Frame] = []
    predictions: list[Prediction] = []
    overlays: list[Result] = []

    def finish() -> None:
        """Score and draw what waits, then forget the pictures: a study may have thousands."""
        for item in score_frames(waiting, scorer, context):
            overlays.append(write_overlay(headers, find(item, scorer.model), scorer, context))
            predictions.append(Prediction(without_pictures(item.frame), item.score))
        waiting.clear()

    for instance, prepared in zip(study.instances, scorer.prepare(study.instances), strict=True):
        if isinstance(prepared, Rejected):
            exclusions.append(Exclusion(instance, prepared.code, str(prepared)))
            continue
        headers[instance.sop_instance_uid], *shown = prepared
        waiting += shown
        if len(waiting) >= FRAMES_AT_ONCE:
            finish()
    finish()
    findings = tuple(finding for item in predictions for finding in find(item, scorer.model))
    report = (write_report(headers, findings, scorer, context),) if findings else ()
    return Analysis(
        study,
        scorer.model,
        tuple(predictions),
        findings,
        tuple(exclusions),
        (*overlays, *report),
    )


def without_pictures(frame: Frame) -> Frame:
    """What the report and the database need to know of a frame."""
    # Copies: a view would keep the whole array.
    return dataclasses.replace(
        frame, pixels=frame.pixels[:0].copy(), display=frame.display[:0].copy()
    )


def score_frames(frames: list[Frame], scorer: Scorer, context: Context) -> list[Prediction]:
    """Score what has no score yet; one image is scored once, whatever arrives later."""
    known = {
        index: context.scores[key]
        for index, frame in enumerate(frames)
        if (key := (frame.source.digest, frame.number)) in context.scores
    }
    missing = [index for index in range(len(frames)) if index not in known]
    if missing:
        batch = np.stack([frames[index].pixels for index in missing])
        probabilities, maps = scorer.predict(batch)
        for row, index in enumerate(missing):
            known[index] = Score(
                probabilities[row], maps[row], scorer.biases, scorer.engine, context.now
            )
    return [Prediction(frame, known[index]) for index, frame in enumerate(frames)]


def find(prediction: Prediction, model: Model) -> list[Finding]:
    """One finding a label, positive or not."""
    score = prediction.score
    return [
        Finding(
            prediction.frame,
            label,
            float(score.probabilities[k]),
            bool(score.probabilities[k] >= label.threshold),
            local(score.maps[k], float(score.biases[k])),
            score.analyzed_at,
        )
        for k, label in enumerate(model.labels)
    ]


def local(cells: Float32, bias: float) -> Float32:
    """What the network would say of an image that looks everywhere like this place: 0 to 1.

    The logistic function of (class map + bias), so that heat maps of different images share one
    scale; the map's mean plus the bias is the image's own logit.
    """
    return np.asarray(1 / (1 + np.exp(-np.clip(cells + bias, -30, 30))), np.float32)


def write_overlay(
    headers: dict[str, Dataset], findings: list[Finding], scorer: Scorer, context: Context
) -> Result:
    """A Secondary Capture of one image, of its most probable finding."""
    top = max(findings, key=lambda item: item.probability)
    uid = top.frame.source.sop_instance_uid
    heat = geometry.spread(top.cells, top.frame.letterbox)
    overlay = capture.capture(headers[uid], top, heat, scorer.model, scorer.engine)
    return _write(overlay, "sc", uid, context.out)


def write_report(
    headers: dict[str, Dataset], findings: tuple[Finding, ...], scorer: Scorer, context: Context
) -> Result:
    """One Structured Report for all."""
    document = sr.report(headers, findings, scorer.model, scorer.engine, context.predecessor)
    return _write(document, "sr", None, context.out)


def _write(ds: Dataset, kind: str, source: str | None, out: Path) -> Result:
    path = out / f"{ds.SOPInstanceUID}.dcm"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    durable.write(path, [buffer.getbuffer()])
    return Result(
        str(ds.SOPInstanceUID), str(ds.SOPClassUID), str(ds.SeriesInstanceUID), kind, path, source
    )
