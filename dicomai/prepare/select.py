"""What a model may be shown, and why not."""

from pydicom.dataset import Dataset

from dicomai.study import MANUFACTURER, Accepts

VIEW_NAMES = {"LL": "left lateral", "RL": "right lateral", "LLD": "lateral", "RLD": "lateral"}


def why_not(ds: Dataset, accepts: Accepts) -> tuple[str, str] | None:
    """None where the model accepts an image, else a code and the reason in plain words."""
    if ds.get("Manufacturer") == MANUFACTURER:
        return "own-output", "an image that dicomai made itself"
    if "PixelData" not in ds and "FloatPixelData" not in ds and "DoubleFloatPixelData" not in ds:
        return "no-pixels", "the object has no pixel data"
    if not ds.get("Rows") or not ds.get("Columns"):
        return "no-pixels", "the object does not say how many rows and columns it has"
    modality = str(ds.get("Modality") or "")
    if modality not in accepts.modalities:
        return (
            "wrong-modality",
            f"modality {modality or 'not stated'}: {_wanted(accepts.modalities)}",
        )
    if ds.get("PresentationIntentType") == "FOR PROCESSING":
        return "for-processing", "raw image (FOR PROCESSING): send the one FOR PRESENTATION"
    photometric = str(ds.get("PhotometricInterpretation") or "")
    if photometric not in accepts.photometric:
        return "wrong-photometric", (
            f"photometric interpretation {photometric or 'not stated'}: "
            f"{_wanted(accepts.photometric)}"
        )
    body_part = str(ds.get("BodyPartExamined") or "").upper()
    if body_part not in accepts.body_parts:
        return (
            "wrong-body-part",
            f"body part {body_part or 'not stated'}: {_wanted(accepts.body_parts)}",
        )
    view = str(ds.get("ViewPosition") or "").upper()
    if view not in accepts.views:
        name = VIEW_NAMES.get(view, view or "not stated")
        return "wrong-view", f"view {name}: {_wanted(accepts.views)}"
    return None


def _wanted(values: tuple[str, ...]) -> str:
    return "the model accepts " + ", ".join(value for value in values if value)
