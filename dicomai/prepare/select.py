"""What a model may be shown, and why not; which frames of an object."""

import re
from collections.abc import Iterable
from datetime import datetime

from pydicom.dataset import Dataset
from pydicom.uid import UID

from dicomai.study import MANUFACTURER, Accepts

VIEW_NAMES = {"LL": "left lateral", "RL": "right lateral", "LATERAL": "lateral"}
# View Position (0018,5101) as the standard writes it, by how devices and people write it.
VIEW_WORDS = {
    "PA": "PA",
    "AP": "AP",
    "POSTERO-ANTERIOR": "PA",
    "POSTEROANTERIOR": "PA",
    "ANTERO-POSTERIOR": "AP",
    "ANTEROPOSTERIOR": "AP",
    "LL": "LL",
    "RL": "RL",
    **dict.fromkeys(("LAT", "LATERAL", "LLD", "RLD", "PROFIL", "SEITLICH", "SEITL"), "LATERAL"),
}
LATERAL = {"LATERAL", "LL", "RL"}
# What stands beside a body part and is none.
NO_BODY_PART = {
    "PORT",
    "PORTABLE",
    "BEDSIDE",
    "ERECT",
    "SUPINE",
    "VIEW",
    "XR",
    "CR",
    "DX",
    "1",
    "2",
}
# CID 4010 "DX View"; SNOMED CT and the retired SRT codes.
VIEW_CODES = {
    "272479007": "PA",
    "R-10214": "PA",
    "399348003": "AP",
    "R-10206": "AP",
    "399173006": "LL",
    "R-10236": "LL",
    "399198007": "RL",
    "R-10232": "RL",
}
# CID 4031 as Body Part Examined (0018,0015) says it (PS3.16 annex L).
REGION_CODES = {
    "816094009": "CHEST",
    "51185008": "CHEST",
    "T-D3000": "CHEST",
    "39607008": "LUNG",
    "74101002": "LUNG",
    "T-28000": "LUNG",
}
YEARS = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}

Refusal = tuple[str, str]


def why_not(ds: Dataset, accepts: Accepts) -> Refusal | None:
    """None where the model accepts an image, else a code and the reason in plain words."""
    return (
        _not_an_image(ds)
        or _unlisted(
            "wrong-modality", "modality", str(ds.get("Modality") or ""), accepts.modalities
        )
        or _wrong_sop_class(ds, accepts)
        or _wrong_kind(ds, accepts)
        or _unlisted(
            "wrong-photometric",
            "photometric interpretation",
            str(ds.get("PhotometricInterpretation") or ""),
            accepts.photometric,
        )
        or _unlisted("wrong-body-part", "body part", body_part(ds), accepts.body_parts)
        or _unlisted("wrong-view", "view", view(ds), accepts.views, VIEW_NAMES)
        or _wrong_age(ds, accepts)
        or _too_small(ds, accepts)
    )


def _not_an_image(ds: Dataset) -> Refusal | None:
    if ds.get("Manufacturer") == MANUFACTURER:
        return "own-output", "an image that dicomai made itself"
    if "PixelData" not in ds and "FloatPixelData" not in ds and "DoubleFloatPixelData" not in ds:
        return "no-pixels", "the object has no pixel data"
    if not ds.get("Rows") or not ds.get("Columns"):
        return "no-pixels", "the object does not say how many rows and columns it has"
    return None


def _unlisted(
    code: str, what: str, found: str, wanted: Iterable[str], names: dict[str, str] | None = None
) -> Refusal | None:
    """An empty list accepts everything."""
    listed = tuple(wanted)
    if not listed or found in listed:
        return None
    name = (names or {}).get(found) or _printable(found) or "not stated"
    return code, f"{what} {name}: the model accepts {', '.join(value for value in listed if value)}"


def _printable(text: str) -> str:
    """What a damaged header holds may be anybody's name: codes are short and plain."""
    return text if re.fullmatch(r"[A-Z0-9 _,()/-]{0,32}", text.upper()) else "something else"


def _wrong_sop_class(ds: Dataset, accepts: Accepts) -> Refusal | None:
    found = str(ds.get("SOPClassUID") or "")
    if not accepts.sop_classes or found in accepts.sop_classes:
        return None
    wanted = ", ".join(UID(uid).name for uid in accepts.sop_classes)
    name = UID(found).name if UID(found).is_valid else "no SOP Class"
    return "wrong-sop-class", f"{name}: the model accepts {wanted}"


def _wrong_kind(ds: Dataset, accepts: Accepts) -> Refusal | None:
    intent = str(ds.get("PresentationIntentType") or "")
    if accepts.presentation_intents and intent not in accepts.presentation_intents:
        if intent == "FOR PROCESSING":
            return "for-processing", "raw image (FOR PROCESSING): send the one FOR PRESENTATION"
        return _unlisted(
            "wrong-intent", "presentation intent", intent, accepts.presentation_intents
        )
    # Image Type (0008,0008), value 3 of CT and MR (PS3.3 C.8.2.1.1.1, C.8.3.1.1.1).
    if not accepts.localizers and "LOCALIZER" in _values(ds, "ImageType"):
        return "localizer", "a localizer: it plans other images"
    return None


def _wrong_age(ds: Dataset, accepts: Accepts) -> Refusal | None:
    youngest, oldest = accepts.age_years
    if youngest <= 0 and oldest >= 130:
        return None
    wanted = f"the model accepts {youngest:g} to {oldest:g} years"
    age = age_years(ds)
    if age is None:
        return "wrong-age", f"age not stated: {wanted}"
    if age < youngest:
        return "paediatric" if youngest <= 21 else "wrong-age", f"age {int(age)} years: {wanted}"
    return ("wrong-age", f"age {int(age)} years: {wanted}") if age >= oldest + 1 else None


def _too_small(ds: Dataset, accepts: Accepts) -> Refusal | None:
    try:
        rows, columns = int(ds.Rows), int(ds.Columns)
    except (TypeError, ValueError):
        return "no-pixels", "Rows or Columns is not a number"
    if min(rows, columns) >= accepts.min_size:
        return None
    return (
        "too-small",
        f"{rows} x {columns} pixels: the model accepts {accepts.min_size} and more each way",
    )


def view(ds: Dataset) -> str:
    """View Position, else View Code Sequence, else what Patient Orientation or a text tells.

    As View Position writes it; LATERAL where the side is not known; empty where nothing is.
    """
    stated = str(ds.get("ViewPosition") or "").upper()
    if stated:
        return _view_in(stated) or stated
    code, meaning = _code(ds, "ViewCodeSequence")
    if code or meaning:
        return VIEW_CODES.get(code) or _view_in(meaning) or meaning or code
    # A row between front and back is seen from the side; "AL" and the like are oblique
    # (PS3.3 C.7.6.1.1.1).
    row = _values(ds, "PatientOrientation")[0]
    if row[:1] in {"A", "P"}:
        return "LATERAL" if len(row) == 1 else "OBLIQUE"
    # Free text decides only against an image: a lateral view that is called so nowhere else.
    texts = ("BodyPartExamined", "SeriesDescription", "ProtocolName")
    found = {_view_in(str(ds.get(keyword) or "").upper()) for keyword in texts}
    return "LATERAL" if found & LATERAL and not found & {"PA", "AP"} else ""


def _view_in(text: str) -> str:
    """The view that a text names, if it names one."""
    found = {VIEW_WORDS[word] for word in _split(text) if word in VIEW_WORDS}
    return found.pop() if len(found) == 1 else ""


def _split(text: str) -> list[str]:
    return [word for word in re.split(r"[^A-Z0-9-]+", text) if word]


def body_part(ds: Dataset) -> str:
    """Body Part Examined without view and circumstances, else Anatomic Region Sequence."""
    stated = str(ds.get("BodyPartExamined") or "").upper()
    if stated:
        if _printable(stated) != stated:
            return stated
        rest = [w for w in _split(stated) if w not in VIEW_WORDS and w not in NO_BODY_PART]
        return " ".join(rest)
    code, meaning = _code(ds, "AnatomicRegionSequence")
    return REGION_CODES.get(code) or meaning or code


def _code(ds: Dataset, keyword: str) -> tuple[str, str]:
    """Value and meaning of the first item of a code sequence, empty where there is none."""
    items = ds.get(keyword)
    if not isinstance(items, Iterable) or not items:
        return "", ""
    item = next(iter(items))
    return str(item.get("CodeValue") or ""), str(item.get("CodeMeaning") or "").upper()


def age_years(ds: Dataset) -> float | None:
    """Patient's Age (0010,1010), else from the dates of birth and study."""
    stated = re.fullmatch(r"([0-9]{3})([DWMY])", str(ds.get("PatientAge") or "").strip())
    if stated:
        return int(stated[1]) / YEARS[stated[2]]
    try:
        born = datetime.strptime(str(ds.get("PatientBirthDate") or ""), "%Y%m%d")
        seen = datetime.strptime(str(ds.get("StudyDate") or ""), "%Y%m%d")
    except ValueError:
        return None
    return (seen - born).days / 365.25


def _values(ds: Dataset, keyword: str) -> list[str]:
    value = ds.get(keyword)
    if value is None or isinstance(value, str):
        return str(value or "").upper().split("\\")
    return [str(part).upper() for part in value] or [""]


def frame_numbers(count: int, rule: str) -> range:
    """Which of count frames, from 1; rule: "all", "middle" or "every N"."""
    if rule == "all":
        return range(1, count + 1)
    if rule == "middle":
        middle = (count + 1) // 2
        return range(middle, middle + 1)
    return range(1, count + 1, int(rule.removeprefix("every ")))
