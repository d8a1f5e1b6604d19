"""The straight line: Study -> Analysis; no database, no network.

select -> Frame -> predict -> Prediction -> Finding -> Result files
"""

import dataclasses
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from dicomai import durable
from dicomai.errors import Rejected
from dicomai.objects import Made, Maker
from dicomai.report.summary import Glimpse
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
    outputs: destination -> kinds of results that it gets; suffix: of the files below out;
    ready: what analyze_images() has said before, where nothing was sent
    """

    scores: Mapping[tuple[str, int], Score]
    sent: tuple[Sent, ...]
    outputs: Mapping[str, Collection[str]]
    now: datetime
    out: Path
    suffix: str = ".dcm"
    ready: Mapping[Instance, "Part | Rejected"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """What is made of one image; seen: what its study's summary shows of it."""

    header: Dataset
    predictions: tuple[Prediction, ...]
    seen: tuple[Glimpse, ...]
    results: tuple[Result, ...]


def analyze(study: Study, scorer: Scorer, context: Context) -> Analysis:
    """Analyze every image that the model accepts; a damaged image fails alone.

    Writes the result files below context.out; they mean nothing before the caller's commit.
    """
    headers: dict[str, Dataset] = {}
    exclusions: list[Exclusion] = []
    predictions: list[Prediction] = []
    results: list[Result] = []
    maker = Maker(scorer.algorithm, context.sent, context.outputs)
    ready = {} if context.sent else context.ready
    made = analyze_images([x for x in study.instances if x not in ready], scorer, context)
    for instance in study.instances:
        part = ready[instance] if instance in ready else next(made)
        if isinstance(part, Rejected):
            exclusions.append(Exclusion(instance, part.code, str(part)))
            continue
        headers[instance.sop_instance_uid] = part.header
        predictions += part.predictions
        results += part.results
        maker.look_at(part.seen)
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


def analyze_images(
    instances: Sequence[Instance], scorer: Scorer, context: Context
) -> Iterator[Part | Rejected]:
    """What can be said of each image, whatever else its study holds, in their order.

    Pictures are forgotten after some frames: a study may have thousands.
    """
    maker = Maker(scorer.algorithm, context.sent, context.outputs)
    held: list[tuple[Dataset, list[Frame]] | Rejected] = []
    waiting = 0
    for prepared in scorer.prepare(tuple(instances)):
        if isinstance(prepared, Rejected):
            held.append(prepared)
            continue
        header, *frames = prepared
        held.append((header, frames))
        waiting += len(frames)
        if waiting >= FRAMES_AT_ONCE:
            yield from _parts(held, maker, scorer, context)
            held, waiting = [], 0
    yield from _parts(held, maker, scorer, context)


def _parts(
    held: Sequence[tuple[Dataset, list[Frame]] | Rejected],
    maker: Maker,
    scorer: Scorer,
    context: Context,
) -> Iterator[Part | Rejected]:
    shown = [frame for item in held if not isinstance(item, Rejected) for frame in item[1]]
    scored = iter(score_frames(shown, scorer, context))
    for item in held:
        if isinstance(item, Rejected):
            yield item
            continue
        header, frames = item
        predictions = [next(scored) for _ in frames]
        findings = [find(prediction, scorer.algorithm) for prediction in predictions]
        seen, results = [], []
        for made in maker.of_image(header, findings):
            if isinstance(made, Glimpse):
                seen.append(made)
            else:
                results.append(write(made, context))
        kept = [Prediction(without_pictures(x.frame), x.score) for x in predictions]
        yield Part(header, tuple(kept), tuple(seen), tuple(results))


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
