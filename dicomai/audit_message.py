"""What an audit event is, and how DICOM writes it as XML (PS3.15 A.5); never patient data.

The standard also asks for the Patient ID of transferred and deleted studies. It is left out: what
goes to a syslog server leaves the daemon's care, and the study's UID leads to the patient.
"""

import base64
import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, IntEnum
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement


class AuditCode(Enum):
    """Audit Event ID (PS3.16 CID 400)."""

    APPLICATION_ACTIVITY = "110100"
    AUDIT_LOG_USED = "110101"
    TRANSFERRED = "110104"
    STUDY_DELETED = "110105"
    EXPORT = "110106"
    SECURITY_ALERT = "110113"


class Outcome(IntEnum):
    """Event Outcome Indicator (PS3.15 A.5.2)."""

    SUCCESS = 0
    MINOR_FAILURE = 4
    SERIOUS_FAILURE = 8


APPLICATION_START = "110120"
APPLICATION_STOP = "110121"
SENT = "sent"  # type of a transfer from here; without it, one to here

# PS3.16 CID 400, 401 and 402, and the codes of participant objects.
MEANINGS = {
    "110100": "Application Activity",
    "110101": "Audit Log Used",
    "110104": "DICOM Instances Transferred",
    "110105": "DICOM Study Deleted",
    "110106": "Export",
    "110113": "Security Alert",
    APPLICATION_START: "Application Start",
    APPLICATION_STOP: "Application Stop",
    "110126": "Node Authentication",
    "110128": "Network Configuration",
    "110129": "Security Configuration",
    "110131": "Software Configuration",
    "110132": "Use of Restricted Function",
    "110037": "URI",
    "110150": "Application",
    "110151": "Application Launcher",
    "110152": "Destination Role ID",
    "110153": "Source Role ID",
    "110154": "Destination Media",
    "110180": "Study Instance UID",
    "110182": "Node ID",
}
APPLICATION, LAUNCHER, DESTINATION, SOURCE, MEDIA = "110150", "110151", "110152", "110153", "110154"
SYSTEM_OBJECT, REPORT, SECURITY_RESOURCE = "2", "3", "13"  # PS3.15 A.5.1.2.2
APPLICATION_SERVER = "4"  # PS3.15 A.5.1.2.1
AUDIT_LOG = "urn:dicomai:audit"


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One event.

    type: of PS3.16 CID 401 where there is one ("110120" Application Start), else a word of ours;
    action: C, R, U, D or E; who: an AE title or the user of a command; address: of the peer;
    detail: of an export, where it went; of an alert, what is wrong
    """

    code: AuditCode
    action: str
    who: str
    type: str | None = None
    outcome: Outcome = Outcome.SUCCESS
    address: str | None = None
    study_instance_uid: str | None = None
    count: int | None = None
    detail: str | None = None


def audit_message(event: AuditEvent, moment: datetime, ae_title: str) -> str:
    """The event as PS3.15 A.5.1 has it, in the order of its schema. ae_title: this program's."""
    root = Element("AuditMessage")
    root.append(_identification(event, moment))
    root.extend(_participants(event, ae_title))
    source = SubElement(root, "AuditSourceIdentification")
    source.set("AuditSourceID", f"{ae_title}@{socket.gethostname()}")
    SubElement(source, "AuditSourceTypeCode", {"csd-code": APPLICATION_SERVER})
    root.extend(_objects(event))
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>{text}'


def _identification(event: AuditEvent, moment: datetime) -> Element:
    found = Element("EventIdentification")
    found.set("EventActionCode", event.action)
    found.set("EventDateTime", moment.astimezone(UTC).isoformat(timespec="milliseconds"))
    found.set("EventOutcomeIndicator", str(int(event.outcome)))
    found.append(_code("EventID", event.code.value))
    if event.type is not None:
        found.append(_code("EventTypeCode", event.type))
    if event.detail is not None:
        SubElement(found, "EventOutcomeDescription").text = event.detail
    return found


def _code(element: str, value: str) -> Element:
    """A coded value; a word of ours is its own meaning."""
    scheme = "DCM" if value in MEANINGS else "99DICOMAI"
    return Element(
        element,
        {
            "csd-code": value,
            "codeSystemName": scheme,
            "originalText": MEANINGS.get(value, value),
        },
    )


def _participants(event: AuditEvent, ae_title: str) -> list[Element]:
    """Who took part, in the roles of the message's table in PS3.15 A.5.3."""
    match event.code:
        case AuditCode.TRANSFERRED if event.type == SENT:
            return [_ours(ae_title, SOURCE, "true"), _peer(event, DESTINATION, "false")]
        case AuditCode.TRANSFERRED:
            return [_peer(event, SOURCE, "true"), _ours(ae_title, DESTINATION, "false")]
        case AuditCode.SECURITY_ALERT:
            # A.5.3: first who reports it, then who did it, and he is no requestor.
            return [_ours(ae_title, APPLICATION, "false"), _peer(event, None, "false")]
        case AuditCode.EXPORT:
            return [_person(event, SOURCE), _medium(event)]
        case _:
            return [_ours(ae_title, APPLICATION, "false"), _person(event, LAUNCHER)]


def _participant(user_id: str, requestor: str, role: str | None) -> Element:
    found = Element("ActiveParticipant", {"UserID": user_id, "UserIsRequestor": requestor})
    if role is not None:
        found.append(_code("RoleIDCode", role))
    return found


def _ours(ae_title: str, role: str, requestor: str) -> Element:
    """This process (A.5.2.1: a process is known by its id, A.5.2.2: and by its AE title)."""
    found = _participant(str(os.getpid()), requestor, role)
    found.set("AlternativeUserID", f"AETITLES={ae_title}")
    return _at(found, socket.gethostname())


def _peer(event: AuditEvent, role: str | None, requestor: str) -> Element:
    found = _participant(event.who, requestor, role)
    found.set("AlternativeUserID", f"AETITLES={event.who}")
    return found if event.address is None else _at(found, event.address)


def _person(event: AuditEvent, role: str) -> Element:
    """A user of this machine (A.5.2.1: login name @ domain)."""
    found = _participant(f"{event.who}@{socket.gethostname()}", "true", role)
    return _at(found, event.address or socket.gethostname())


def _medium(event: AuditEvent) -> Element:
    """Where an export went (PS3.17 WW.3)."""
    found = _participant(event.detail or "not stated", "false", MEDIA)
    SubElement(found, "MediaIdentifier").append(_code("MediaType", "110037"))
    return found


def _at(participant: Element, address: str) -> Element:
    participant.set("NetworkAccessPointID", address)
    participant.set("NetworkAccessPointTypeCode", "2" if _is_ip(address) else "1")
    return participant


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _objects(event: AuditEvent) -> list[Element]:
    found = []
    if event.code is AuditCode.AUDIT_LOG_USED:
        uri = Element(
            "ParticipantObjectIDTypeCode",
            {"csd-code": "12", "codeSystemName": "RFC-3881", "originalText": "URI"},
        )
        log = _object(AUDIT_LOG, uri, "Security Audit Log")
        log.set("ParticipantObjectTypeCodeRole", SECURITY_RESOURCE)
        found.append(log)
    if event.code is AuditCode.SECURITY_ALERT and event.detail is not None:
        node = event.address or event.who
        subject = _object(node, _code("ParticipantObjectIDTypeCode", "110182"), event.who)
        words = event.detail if event.count is None else f"{event.detail} (times: {event.count})"
        value = base64.b64encode(words.encode()).decode()
        detail = {"type": "Alert Description", "value": value}
        SubElement(subject, "ParticipantObjectDetail", detail)
        found.append(subject)
    if event.study_instance_uid is not None:
        found.append(_study(event, event.study_instance_uid))
    return found


def _object(uid: str, kind: Element, name: str) -> Element:
    found = Element("ParticipantObjectIdentification", {"ParticipantObjectID": uid})
    found.set("ParticipantObjectTypeCode", SYSTEM_OBJECT)
    found.append(kind)
    # The schema has a name or a query, and not neither.
    SubElement(found, "ParticipantObjectName").text = name
    return found


def _study(event: AuditEvent, uid: str) -> Element:
    found = _object(uid, _code("ParticipantObjectIDTypeCode", "110180"), "Study")
    found.set("ParticipantObjectTypeCodeRole", REPORT)
    if event.count is not None:
        description = SubElement(found, "ParticipantObjectDescription")
        SubElement(description, "SOPClass", {"NumberOfInstances": str(event.count)})
    return found
