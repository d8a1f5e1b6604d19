"""The straight line: Study -> Analysis; no database, no network.

select -> Frame -> predict -> Prediction -> Finding -> Result files
"""

import dataclasses
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from dicomai import durable
from dicomai.errors import Rejected
from dicomai.objects import Made, Maker
from dicomai.study import (
    Algorithm,
    Analysis,
    Exclusion,
    Finding,
    Float32,
    Frame,
    Instance,
    Prediction,
    Presence,
    Result,
    Score,
    Sent,
    Study,
)

FRAMES_AT_ONCE = 16

Predict = Callable[[Float32], tuple[Float32, Float32]]
# Of each instance in turn: its header and its frames (prepare.image), or why there are none.
Prepare = Callable[[tuple[Instance, ...]], Iterator[list[Any] | Rejected]]


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model that is ready: predict takes (N, C, size, size), see Engine.score.

    read_header: of an image that cannot be analyzed, or why that cannot be read either
    """

    algorithm: Algorithm
    prepare: Prepare
    read_header: Callable[[Instance], Dataset | Rejected]
    biases: Float32
    predict: Predict


@dataclass(frozen=True, slots=True)
class Context:
    """What is known beforehand.

    scores: earlier ones by (digest, frame number); sent: what earlier analyses have sent;
    outputs: destination -> kinds of results that it gets; suffix: of the files below out
    """

    scores: Mapping[tuple[str, int], Score]
    sent: tuple[Sent, ...]
    outputs: Mapping[str, Collection[str]]
    now: datetime
    out: Path
    suffix: str = ".dcm"


def analyze(study: Study, scorer: Scorer, context: Context) -> Analysis:
    """Analyze every image that the model accepts; a damaged image fails alone.

    Writes the result files below context.out; they mean nothing before the caller's commit.
    """
    headers: dict[str, Dataset] = {}
    exclusions: list[Exclusion] = []
    waiting: list[Frame] = []
    predictions: list[Prediction] = []
    results: list[Result] = []
    maker = Maker(scorer.algorithm, context.sent, context.outputs)

    def finish() -> None:
        """Score and draw what waits, then forget the pictures: a study may have thousands."""
        scored = score_frames(waiting, scorer, context)
        for uid, items in groupby(scored, lambda item: item.frame.source.sop_instance_uid):
            frames = [find(item, scorer.algorithm) for item in items]
            results.extend(write(made, context) for made in maker.of_image(headers[uid], frames))
        predictions.extend(Prediction(without_pictures(item.frame), item.score) for item in scored)
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
    findings = tuple(x for item in predictions for x in find(item, scorer.algorithm))
    if findings:
        results += [write(made, context) for made in maker.of_study(headers, findings, exclusions)]
    header = next(iter(headers.values()), None) or any_header(study, scorer)
    if header is not None:  # else nobody could file what is said
        moment = max([study.received_at, *(item.analyzed_at for item in findings)])
        last = maker.of_exclusions(header, findings, exclusions, moment)
        results += [write(made, context) for made in last]
        gone = maker.withdrawals(header, results, moment)
        results += [write(made, context) for made in gone]
    return Analysis(
        study,
        scorer.algorithm.model,
        tuple(predictions),
        findings,
        tuple(exclusions),
        tuple(results),
    )


def refuse(study: Study, reason: str, scorer: Scorer, context: Context) -> Analysis:
    """What is said of a study that cannot be analyzed as a whole; nothing else is known of it."""
    exclusions = tuple(Exclusion(instance, "failed", reason) for instance in study.instances)
    maker = Maker(scorer.algorithm, context.sent, context.outputs)
    header = any_header(study, scorer)
    results: list[Result] = []
    if header is not None:
        said = maker.of_exclusions(header, (), exclusions, study.received_at)
        results = [write(made, context) for made in said]
    return Analysis(study, scorer.algorithm.model, (), (), exclusions, tuple(results))


def any_header(study: Study, scorer: Scorer) -> Dataset | None:
    """The header of the first image of a study that can be read that far."""
    for instance in study.instances:
        header = scorer.read_header(instance)
        if isinstance(header, Dataset):
            return header
    return None


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
                probabilities[row], maps[row], scorer.biases, scorer.algorithm.engine, context.now
            )
    return [Prediction(frame, known[index]) for index, frame in enumerate(frames)]


def find(prediction: Prediction, algorithm: Algorithm) -> list[Finding]:
    """One finding a label, positive or not."""
    score = prediction.score
    margin = algorithm.reporting.undetermined_margin
    cells = local(score.maps, score.biases, algorithm.model.activation)
    return [
        Finding(
            prediction.frame,
            label,
            float(score.probabilities[k]),
            presence(float(score.probabilities[k]), label.threshold, margin),
            label.said(cells[k]),
            score.analyzed_at,
        )
        for k, label in enumerate(algorithm.model.labels)
    ]


def presence(probability: float, threshold: float, margin: float) -> Presence:
    """Present from the threshold on; undetermined within the margin around it."""
    if probability >= threshold + margin:
        return Presence.PRESENT
    return Presence.ABSENT if probability < threshold - margin else Presence.UNDETERMINED


def local(maps: Float32, biases: Float32, activation: str) -> Float32:
    """What the network would say of an image that looks everywhere like this place: 0 to 1.

    maps: (K, h, w), biases: (K,). The model's own activation of (class map + bias), so that heat
    maps of different images share one scale; a map's mean plus its bias is the image's own logit.
    """
    logits = np.clip(maps + biases[:, None, None], -30, 30)
    if activation == "softmax":
        return np.asarray(np.exp(logits - np.logaddexp.reduce(logits, axis=0)), np.float32)
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


def write(made: Made, context: Context) -> Result:
    """Put an object on disk, below its SOP Instance UID."""
    ds = made.ds
    path = context.out / f"{ds.SOPInstanceUID}{context.suffix}"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    durable.write(path, [buffer.getbuffer()])
    return Result(
        str(ds.SOPInstanceUID),
        str(ds.SOPClassUID),
        str(ds.SeriesInstanceUID),
        made.kind,
        path,
        made.source_sop_instance_uid,
        made.replaces,
        made.destination,
    )
