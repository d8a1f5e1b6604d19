"""Findings -> the objects that go back: which ones there are, and which earlier ones end."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import cv2
import numpy as np
from pydicom.dataset import Dataset

from dicomai.prepare import geometry
from dicomai.report import (
    capture,
    identity,
    key_objects,
    not_analyzed,
    origin,
    presentation,
    segmentation,
    sr,
)
from dicomai.report.presentation import Line
from dicomai.report.summary import Glimpse, Overview, glimpse, most_probable
from dicomai.study import (
    WITHDRAWAL,
    Algorithm,
    Exclusion,
    Finding,
    Float32,
    Frame,
    Result,
    Sent,
    UInt8,
)


@dataclass(frozen=True, slots=True)
class Made:
    """One object; source: the instance it shows; replaces, destination: see Result."""

    kind: str
    ds: Dataset
    source_sop_instance_uid: str | None = None
    replaces: tuple[str, ...] = ()
    destination: str | None = None


class Maker:
    """Makes a study's results.

    sent: what earlier analyses of the study have sent; outputs: destination -> kinds that it gets
    """

    def __init__(
        self, algorithm: Algorithm, sent: Sequence[Sent], outputs: Mapping[str, Collection[str]]
    ) -> None:
        self._algorithm = algorithm
        self._sent = sent
        self._outputs = outputs
        self._overview = Overview(algorithm.model.labels)
        self._standing = {item.sop_instance_uid: item for item in sent if _stands(item)}
        self._ended = {item.sop_instance_uid for item in sent if item.replaced_by is not None}
        # What stands is made again, whoever wants it today: so it is known whether it holds.
        self._kinds = algorithm.reporting.kinds | {item.kind for item in self._standing.values()}

    def of_image(
        self, header: Dataset, frames: Sequence[list[Finding]]
    ) -> Iterator[Made | Glimpse]:
        """Of one image, with the findings of each of its frames: what shows its positive ones.

        And what the study's summary is to show of it, see look_at(). A map is as large as the
        image: none is kept.
        """
        lines: dict[tuple[int, str], list[Line]] = {}
        planes: dict[tuple[int, str], UInt8] = {}
        for findings in frames:
            if "sc" in self._kinds:
                yield from self._pictures(header, findings)
            for item in findings:
                if not item.positive or not self._kinds & {"gsps", "seg"}:
                    continue
                key = item.frame.number, item.label.key
                heat = geometry.spread(item.cells, item.frame.letterbox)
                if "gsps" in self._kinds:
                    lines[key] = presentation.contours(heat)
                if "seg" in self._kinds:
                    planes[key] = segmentation.plane(heat)
        positive = [item for findings in frames for item in findings if item.positive]
        if lines:
            ds = presentation.presentation_state(header, positive, lines, self._algorithm)
            yield from self._made("gsps", ds, header)
        if planes:
            ds = segmentation.segmentation(header, positive, planes, self._algorithm)
            yield from self._made("seg", ds, header)

    def _pictures(self, header: Dataset, findings: list[Finding]) -> Iterator[Made | Glimpse]:
        """An overlay of each positive finding of a frame, and what the summary shows of it."""
        frame = _shrunk(findings[0].frame, self._algorithm.reporting.largest_side)
        findings = [dataclasses.replace(item, frame=frame) for item in findings]
        top = most_probable(findings)
        for item in findings:
            if not item.positive and item is not top:
                continue
            heat = geometry.spread(item.cells, frame.letterbox)
            if item is top:
                yield _glimpse(header, findings, heat)
            if item.positive:
                ds = capture.capture(header, item, heat, self._algorithm)
                yield from self._made("sc", ds, header)

    def look_at(self, seen: Iterable[Glimpse]) -> None:
        """The summary shows this, too."""
        for item in seen:
            self._overview.add(item)

    def of_study(
        self,
        headers: Mapping[str, Dataset],
        findings: Sequence[Finding],
        exclusions: Sequence[Exclusion],
    ) -> Iterator[Made]:
        """Of all images together, what was not analyzed left out; needs one finding at least."""
        if "sc" in self._kinds:
            ds = capture.summary(headers, findings, exclusions, self._overview, self._algorithm)
            yield from self._made("sc", ds)
        positive = [item for item in findings if item.positive]
        if "kos" in self._kinds and positive:
            ds = key_objects.key_objects(headers, positive, self._algorithm)
            yield from self._made("kos", ds)
        if "sr" in self._kinds:
            yield from self._document(
                "sr",
                lambda before: sr.report_uid(findings, self._algorithm, before),
                lambda before: sr.report(headers, findings, self._algorithm, before),
            )

    def of_exclusions(
        self,
        header: Dataset,
        findings: Sequence[Finding],
        exclusions: Sequence[Exclusion],
        moment: datetime,
    ) -> Iterator[Made]:
        """What was not analyzed, and why; header: of any image of the study."""
        if "not-analyzed" not in self._kinds or not exclusions:
            return
        if not findings:
            outcome = not_analyzed.NONE_ANALYZED
        elif any(item.positive for item in findings):
            outcome = not_analyzed.SOME_POSITIVE
        else:
            outcome = not_analyzed.SOME_NEGATIVE
        said = (header, exclusions, outcome, self._algorithm, moment)
        yield from self._document(
            "not-analyzed",
            lambda before: not_analyzed.document_uid(*said, before),
            lambda before: not_analyzed.not_analyzed(*said, before),
        )

    def withdrawals(
        self, header: Dataset, made: Sequence[Result], moment: datetime
    ) -> Iterator[Made]:
        """For each destination what it may hold and what is not made any more."""
        uids = {item.sop_instance_uid for item in made}
        succeeded = {uid for item in made for uid in item.replaces}
        for destination, kinds in sorted(self._outputs.items()):
            gone = [
                item
                for uid, item in self._standing.items()
                if destination in item.destinations
                and uid not in uids
                and not (uid in succeeded and item.kind in kinds)
            ]
            if gone and WITHDRAWAL in kinds:
                ds = key_objects.withdrawal(header, gone, destination, self._algorithm, moment)
                ended = tuple(item.sop_instance_uid for item in gone)
                yield Made(WITHDRAWAL, ds, None, ended, destination)

    def _made(self, kind: str, ds: Dataset, header: Dataset | None = None) -> Iterator[Made]:
        """An object that somebody wants, or that stands."""
        self._renew(ds)
        if kind in self._algorithm.reporting.kinds or ds.SOPInstanceUID in self._standing:
            yield Made(kind, ds, None if header is None else str(header.SOPInstanceUID))

    def _document(
        self,
        kind: str,
        uid_of: Callable[[Sequence[Sent]], str],
        build: Callable[[Sequence[Sent]], Dataset],
    ) -> Iterator[Made]:
        """The document that stands, where it would say the same today; else its successor.

        A successor names all before it: whether the last one ever arrived is not known.
        """
        standing = [item for item in self._standing.values() if item.kind == kind]
        for item in standing:
            before = self._before(item)
            if self._renewed(uid_of(before)) == item.sop_instance_uid:
                yield Made(kind, self._renew(build(before)))
                return
        if kind in self._algorithm.reporting.kinds:
            before = [*standing, *(x for item in standing for x in self._before(item))]
            ended = tuple(item.sop_instance_uid for item in standing)
            yield Made(kind, self._renew(build(before)), None, ended)

    def _before(self, document: Sent) -> list[Sent]:
        """The documents that it replaced, and those that they replaced."""
        replaced = [x for x in self._sent if x.replaced_by == document.sop_instance_uid]
        return [*replaced, *(y for x in replaced for y in self._before(x))]

    def _renew(self, ds: Dataset) -> Dataset:
        ds.SOPInstanceUID = self._renewed(ds.SOPInstanceUID)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        return ds

    def _renewed(self, uid: str) -> str:
        """What was withdrawn and holds again is a new object: a PACS hides the old one."""
        while uid in self._ended:
            uid = identity.make_uid("again", uid)
        return uid


def _glimpse(header: Dataset, findings: list[Finding], heat: Float32) -> Glimpse:
    name = f"image {header.get('InstanceNumber') or '-'}"
    if origin.has_frames(header):
        name += f", frame {findings[0].frame.number}"
    return glimpse(findings, heat, name, origin.pixel_height(header))


def _shrunk(frame: Frame, largest_side: int) -> Frame:
    """As it is shown in an overlay, whose map is far coarser."""
    box = geometry.shrunk(frame.letterbox, largest_side)
    if box is frame.letterbox:
        return frame
    display = cv2.resize(frame.display, (box.columns, box.rows), interpolation=cv2.INTER_AREA)
    return dataclasses.replace(frame, display=np.asarray(display, np.uint8), letterbox=box)


def _stands(item: Sent) -> bool:
    return item.replaced_by is None and item.kind != WITHDRAWAL
