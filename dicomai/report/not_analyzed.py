"""A report of what was not analyzed, and why: silence must not be taken for "normal"."""

import copy
from collections.abc import Sequence
from datetime import datetime

from highdicom.sr import (
    CodeContentItem,
    CodedConcept,
    ContainerContentItem,
    ContentSequence,
    EnhancedSR,
    ImageContentItem,
    LanguageOfContentItemAndDescendants,
    RelationshipTypeValues,
    TextContentItem,
)
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomai.report import identity, origin
from dicomai.report.sr import observer, previous, refer_to_request
from dicomai.study import MANUFACTURER, Algorithm, Exclusion, Sent

SERIES_NUMBER = 9906

TITLE = CodedConcept("not-analyzed", "99DICOMAI", "Images not analyzed by AI")
# CID 6047, as CAD reports state it.
SUMMARY = CodedConcept("111017", "DCM", "CAD Processing and Findings Summary")
NONE_ANALYZED = CodedConcept("111245", "DCM", "No algorithms succeeded; without findings")
SOME_POSITIVE = CodedConcept("111244", "DCM", "Not all algorithms succeeded; with findings")
SOME_NEGATIVE = CodedConcept("111243", "DCM", "Not all algorithms succeeded; without findings")
ENGLISH = CodedConcept("en", "RFC5646", "English")
# CID 7001 and CID 7002, of TID 2000.
SECTION = CodedConcept("121064", "DCM", "Current Procedure Descriptions")
DESCRIPTION = CodedConcept("121065", "DCM", "Procedure Description")
SOURCE = CodedConcept("260753009", "SCT", "Source")


def document_uid(
    source: Dataset,
    exclusions: Sequence[Exclusion],
    outcome: CodedConcept,
    algorithm: Algorithm,
    moment: datetime,
    predecessors: Sequence[Sent],
) -> str:
    """The SOP Instance UID of not_analyzed() of the same."""
    about = [
        f"{x.instance.sop_instance_uid}:{x.instance.digest}:{x.code}:{x.reason}" for x in exclusions
    ]
    before = [f"after {item.sop_instance_uid}" for item in predecessors]
    occasion = identity.occasion(source, moment)
    return identity.object_uid(
        "not-analyzed", [*about, *before, outcome.value, *occasion], algorithm
    )


def not_analyzed(
    source: Dataset,
    exclusions: Sequence[Exclusion],
    outcome: CodedConcept,
    algorithm: Algorithm,
    moment: datetime,
    predecessors: Sequence[Sent],
) -> Dataset:
    """One line of text an image, with the reason.

    source: a header of the study; outcome: NONE_ANALYZED, SOME_POSITIVE or SOME_NEGATIVE
    """
    ds = EnhancedSR(
        evidence=_stand_ins(source, exclusions),
        content=_content(exclusions, outcome, algorithm),
        series_instance_uid=identity.series_uid(source.StudyInstanceUID, "not-analyzed", algorithm),
        series_number=SERIES_NUMBER,
        sop_instance_uid=document_uid(source, exclusions, outcome, algorithm, moment, predecessors),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        previous_versions=previous(source, predecessors),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    local = identity.local_time(moment, source)
    identity.sign(ds, source, identity.PATIENT_AND_STUDY, algorithm, local)
    ds.SeriesDescription = f"NOT analyzed by AI {algorithm.model.name}"
    item = Dataset()
    item.CodingSchemeDesignator = "99DICOMAI"
    item.CodingSchemeName = "dicomai"
    item.CodingSchemeResponsibleOrganization = MANUFACTURER
    ds.CodingSchemeIdentificationSequence = [item]
    refer_to_request(ds, source)
    classes = {x.instance.sop_instance_uid: x.instance.sop_class_uid for x in exclusions}
    origin.name_classes(ds, classes)
    return ds


def _stand_ins(source: Dataset, exclusions: Sequence[Exclusion]) -> list[Dataset]:
    """What highdicom needs to know of images that may be unreadable themselves."""
    known = origin.for_highdicom(source)
    found = []
    for exclusion in exclusions:
        ds = copy.deepcopy(known)  # pydicom's copy shares its elements
        ds.SOPInstanceUID = exclusion.instance.sop_instance_uid
        ds.SeriesInstanceUID = exclusion.instance.series_instance_uid
        found.append(ds)
    return found


def _content(
    exclusions: Sequence[Exclusion], outcome: CodedConcept, algorithm: Algorithm
) -> Dataset:
    contains = RelationshipTypeValues.CONTAINS
    root = ContainerContentItem(TITLE, template_id="2000")
    section = ContainerContentItem(SECTION, relationship_type=contains)
    root.ContentSequence = ContentSequence(
        [*LanguageOfContentItemAndDescendants(ENGLISH), *observer(algorithm.model), section]
    )
    section.ContentSequence = ContentSequence()
    model = algorithm.model
    count = len(exclusions)
    lead = (
        f"{count} {'image was' if count == 1 else 'images were'} NOT analyzed by {model.name} "
        f"{model.version}. Nothing is said about {'it' if count == 1 else 'them'}: this does not "
        f"mean normal. {identity.NOTICE}."
    )
    section.ContentSequence.append(CodeContentItem(SUMMARY, outcome, contains))
    section.ContentSequence.append(TextContentItem(DESCRIPTION, lead, contains))
    for exclusion in exclusions:
        line = TextContentItem(DESCRIPTION, f"{exclusion.code}: {exclusion.reason}", contains)
        line.ContentSequence = ContentSequence(
            [
                ImageContentItem(
                    SOURCE,
                    exclusion.instance.sop_class_uid,
                    exclusion.instance.sop_instance_uid,
                    relationship_type=RelationshipTypeValues.INFERRED_FROM,
                )
            ]
        )
        section.ContentSequence.append(line)
    return root
