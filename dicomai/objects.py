"""Findings -> the objects that go back: which ones there are, and which earlier ones end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydicom.dataset import Dataset

from dicomai.prepare import geometry
from dicomai.report import (
    capture,
    identity,
    key_objects,
    not_analyzed,
    presentation,
    segmentation,
    sr,
)
from dicomai.report.summary import Overview, most_probable
from dicomai.study import WITHDRAWAL, Algorithm, Exclusion, Finding, Float32, Sent


@dataclass(frozen=True, slots=True)
class Made:
    """One object; source: the instance it shows; replaces: see Result."""

    kind: str
    ds: Dataset
    source_sop_instance_uid: str | None = None
    replaces: tuple[str, ...] = ()


class Maker:
    """Makes a study's results; sent: what earlier analyses of the study have sent."""

    def __init__(self, algorithm: Algorithm, sent: Sequence[Sent]) -> None:
        self._algorithm = algorithm
        self._sent = sent
        self._overview = Overview(algorithm.model.labels)
        # What stands is made again, whoever wants it today: so it is known whether it holds.
        standing = {item.kind for item in sent if _stands(item)}
        self._kinds = algorithm.reporting.kinds | standing

    def of_image(self, header: Dataset, frames: Sequence[list[Finding]]) -> Iterator[Made]:
        """Of one image, with the findings of each of its frames: what shows its positive ones."""
        uid = str(header.SOPInstanceUID)
        heats: dict[tuple[int, str], Float32] = {}
        for findings in frames:
            heats |= self._heats(findings)
            self._look_at(header, findings, heats)
        positive = [item for findings in frames for item in findings if item.positive]
        if "sc" in self._kinds:
            for item in positive:
                heat = heats[item.frame.number, item.label.key]
                ds = capture.capture(header, item, heat, self._algorithm)
                yield Made("sc", self._renew(ds), uid)
        build = {"gsps": presentation.presentation_state, "seg": segmentation.segmentation}
        for kind in sorted(self._kinds & build.keys()) if positive else ():
            ds = build[kind](header, positive, heats, self._algorithm)
            yield Made(kind, self._renew(ds), uid)

    def _heats(self, findings: list[Finding]) -> dict[tuple[int, str], Float32]:
        """Of what is positive, and of what the summary shows; each is as large as the image."""
        wanted = [item for item in findings if item.positive] or [most_probable(findings)]
        return {
            (item.frame.number, item.label.key): geometry.spread(item.cells, item.frame.letterbox)
            for item in wanted
        }

    def _look_at(
        self, header: Dataset, findings: list[Finding], heats: dict[tuple[int, str], Float32]
    ) -> None:
        if "sc" not in self._kinds:
            return
        top = most_probable(findings)
        number = top.frame.number
        name = f"image {header.get('InstanceNumber') or '-'}"
        if identity.has_frames(header):
            name += f", frame {number}"
        heat = heats[number, top.label.key]
        self._overview.add(findings, heat, name, identity.pixel_height(header))

    def of_study(
        self,
        headers: Mapping[str, Dataset],
        findings: Sequence[Finding],
        exclusions: Sequence[Exclusion],
    ) -> Iterator[Made]:
        """Of all images together, what was not analyzed left out; needs one finding at least."""
        if "sc" in self._kinds:
            ds = capture.summary(headers, findings, exclusions, self._overview, self._algorithm)
            yield Made("sc", self._renew(ds))
        positive = [item for item in findings if item.positive]
        if "kos" in self._kinds and positive:
            ds = key_objects.key_objects(headers, positive, self._algorithm)
            yield Made("kos", self._renew(ds))
        if "sr" in self._kinds:
            yield self._document(
                "sr", lambda before: sr.report(headers, findings, self._algorithm, before)
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
        yield self._document(
            "not-analyzed",
            lambda before: not_analyzed.not_analyzed(
                header, exclusions, outcome, self._algorithm, moment, before
            ),
        )

    def withdrawal(
        self, header: Dataset, made: Sequence[str], replaced: Sequence[str], moment: datetime
    ) -> Iterator[Made]:
        """What was sent and is not made any more; made, replaced: SOP Instance UIDs."""
        gone = [
            item
            for item in self._sent
            if _stands(item) and item.sop_instance_uid not in {*made, *replaced}
        ]
        if gone:
            ds = key_objects.withdrawal(header, gone, self._algorithm, moment)
            yield Made(WITHDRAWAL, ds, None, tuple(item.sop_instance_uid for item in gone))

    def _document(self, kind: str, build: Callable[[Sequence[Sent]], Dataset]) -> Made:
        """The document that stands, where it would say the same today; else its successor."""
        standing = [item for item in self._sent if item.kind == kind and _stands(item)]
        for item in standing:
            uid = item.sop_instance_uid
            before = [x for x in self._sent if x.kind == kind and x.replaced_by == uid]
            ds = self._renew(build(before))
            if uid == ds.SOPInstanceUID:
                return Made(kind, ds)
        ds = self._renew(build(standing))
        return Made(kind, ds, None, tuple(item.sop_instance_uid for item in standing))

    def _renew(self, ds: Dataset) -> Dataset:
        """What was withdrawn and holds again is a new object: a PACS hides the old one."""
        ended = {item.sop_instance_uid for item in self._sent if not _stands(item)}
        while ds.SOPInstanceUID in ended:
            ds.SOPInstanceUID = identity.make_uid("again", ds.SOPInstanceUID)
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        return ds


def _stands(item: Sent) -> bool:
    return item.replaced_by is None and item.kind != WITHDRAWAL
