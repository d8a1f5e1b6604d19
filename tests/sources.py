"""Images of other kinds than chest radiographs: as bare as the standard lets them be."""

from collections.abc import Callable
from typing import Any

import cv2
import make
import numpy as np
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import (
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    MRImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    generate_uid,
)

from dicomai.demo.radiographs import pixels, radiographs, set_pixels

SIZE = (160, 128)  # rows, columns


def mammogram() -> Dataset:
    """MG: one of a pair, its laterality stated for the image."""
    ds = make.chest_radiograph()
    small(ds)
    ds.SOPClassUID, ds.Modality = DigitalMammographyXRayImageStorageForPresentation, "MG"
    ds.BodyPartExamined, ds.OrganExposed, ds.ImageLaterality = "BREAST", "BREAST", "L"
    ds.PatientOrientation, ds.ViewPosition = ["A", "R"], "CC"
    ds.AnatomicRegionSequence = [code("76752008", "SCT", "Breast")]
    view = code("399162004", "SCT", "cranio-caudal")
    view.ViewModifierCodeSequence = []
    ds.ViewCodeSequence = [view]
    ds.PositionerType, ds.PresentationLUTShape = "MAMMOGRAPHIC", "IDENTITY"
    ds.PatientSex = "F"
    make.add_file_meta(ds)
    return ds


def slice_image(sop_class_uid: str, modality: str) -> Dataset:
    """A slice with its place in the patient."""
    ds = make.computed_radiograph()
    small(ds)
    ds.SOPClassUID, ds.Modality = sop_class_uid, modality
    del ds.ViewPosition
    del ds.PatientOrientation
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientPosition = "HFS"
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = generate_uid(), ""
    ds.PixelSpacing, ds.SliceThickness = ["0.7", "0.7"], "2"
    ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    ds.ImagePositionPatient = ["-50", "-60", "120"]
    make.add_file_meta(ds)
    return ds


def ct_slice() -> Dataset:
    """CT: 12 of 16 bits, signed by its rescale intercept, a lung window."""
    ds = slice_image(CTImageStorage, "CT")
    grey = np.frombuffer(ds.PixelData, np.uint8).reshape(SIZE)
    set_pixels(ds, grey.astype(np.uint16) * 8, bits_stored=12)
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
    ds.WindowCenter, ds.WindowWidth = ["-400", "40"], ["1600", "400"]
    ds.KVP, ds.AcquisitionNumber = "120", "1"
    return ds


def mr_slice() -> Dataset:
    """MR."""
    ds = slice_image(MRImageStorage, "MR")
    grey = np.frombuffer(ds.PixelData, np.uint8).reshape(SIZE)
    set_pixels(ds, grey.astype(np.uint16) * 4, bits_stored=12)
    ds.WindowCenter, ds.WindowWidth = "512", "1024"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "SE"]
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions = "SE", "NONE", ""
    ds.MRAcquisitionType, ds.EchoTime, ds.EchoTrainLength = "2D", "10", "1"
    ds.RepetitionTime = "500"
    return ds


def frames() -> Dataset:
    """Three grey frames without geometry."""
    ds = make.computed_radiograph()
    small(ds)
    ds.SOPClassUID = MultiFrameGrayscaleByteSecondaryCaptureImageStorage
    ds.Modality, ds.ConversionType = "OT", "WSD"
    del ds.ViewPosition
    del ds.WindowCenter
    del ds.WindowWidth
    ds.PixelData, ds.NumberOfFrames = ds.PixelData * 3, "3"
    ds.FrameIncrementPointer = Tag("PageNumberVector")
    ds.PageNumberVector = [1, 2, 3]
    ds.PresentationLUTShape, ds.BurnedInAnnotation = "IDENTITY", "NO"
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    make.add_file_meta(ds)
    return ds


def ultrasound() -> Dataset:
    """In colour."""
    ds = make.computed_radiograph()
    small(ds)
    ds.SOPClassUID, ds.Modality = UltrasoundImageStorage, "US"
    for keyword in ("ViewPosition", "WindowCenter", "WindowWidth", "BodyPartExamined"):
        del ds[keyword]
    grey = np.frombuffer(ds.PixelData, np.uint8).reshape(SIZE)
    ds.PixelData = cv2.applyColorMap(grey, cv2.COLORMAP_HOT).tobytes()
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.ImageType, ds.Laterality = ["ORIGINAL", "PRIMARY"], ""
    make.add_file_meta(ds)
    return ds


def small(ds: Dataset) -> None:
    """Fewer pixels: the referees look at all of them."""
    grey = cv2.resize(pixels(radiographs()[0]), SIZE[::-1], interpolation=cv2.INTER_AREA)
    set_pixels(ds, grey.astype(np.uint8), bits_stored=8)


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a code sequence."""
    ds = Dataset()
    ds.CodeValue, ds.CodingSchemeDesignator, ds.CodeMeaning = value, scheme, meaning
    return ds


def small_radiograph(build: Callable[..., Dataset]) -> Callable[[], Dataset]:
    """A radiograph of make.py with fewer pixels."""

    def built() -> Dataset:
        ds = build()
        small(ds)
        return ds

    return built


SOURCES: dict[str, Callable[[], Dataset]] = {
    "CR": small_radiograph(make.computed_radiograph),
    "DX": small_radiograph(make.chest_radiograph),
    "MG": mammogram,
    "CT": ct_slice,
    "MR": mr_slice,
    "multi-frame": frames,
    "colour": ultrasound,
}

# Specific Character Set, and a name and a description in its characters (PS3.3 C.12.1.1.2).
CHARACTER_SETS: dict[str, tuple[Any, str, str]] = {
    "ASCII": (None, "Smith^John", "Chest"),
    "Latin 1": ("ISO_IR 100", "Müller^Bjørn", "Thorax früh"),
    "Latin 2": ("ISO_IR 101", "Wałęsa^Łukasz", "Płuca"),
    "Cyrillic": ("ISO_IR 144", "Дюжев^Иван", "Лёгкие"),
    "Arabic": ("ISO_IR 127", "قباني^لنزار", "صدر"),
    "Greek": ("ISO_IR 126", "Διονυσιος^Νικος", "Θώρακας"),
    "Hebrew": ("ISO_IR 138", "שרון^דבורה", "חזה"),
    "Thai": ("ISO_IR 166", "นามสกุล^ชื่อ", "ทรวงอก"),
    "Japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", "胸部"),
    "Korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동", "흉부"),
    "Chinese": ("GB18030", "Wang^XiaoDong=王^小东=", "胸部"),
    "UTF-8": ("ISO_IR 192", "Ælfgifu^Þórr=王^太郎=", "Thorax 胸部"),
}
TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
# What becomes of the source's Type 2 attributes of patient and study.
PRESENCE = ("full", "empty", "missing")


def source(kind: str, characters: str, presence: str) -> Dataset:
    """An image of a kind, with identity in a character set; see PRESENCE."""
    ds = SOURCES[kind]()
    name, description = CHARACTER_SETS[characters][1:]
    if CHARACTER_SETS[characters][0] is None:
        del ds.SpecificCharacterSet
    else:
        ds.SpecificCharacterSet = CHARACTER_SETS[characters][0]
    ds.StudyDescription = description
    if presence == "full":
        ds.PatientName = ds.ReferringPhysicianName = name
        ds.IssuerOfPatientID, ds.TimezoneOffsetFromUTC = "HOSPITAL", "+0900"
        ds.PatientAge, ds.PatientSize, ds.PatientWeight = "047Y", "1.7", "70"
        ds.RequestAttributesSequence = [request(description)]
        return ds
    for keyword in TYPE_2:
        if presence == "missing":
            ds.pop(keyword, None)
        else:
            setattr(ds, keyword, "")
    # What a worklist without values leaves behind.
    ds.RequestAttributesSequence = [request("")]
    ds.ProcedureCodeSequence = []
    return ds


def request(description: str) -> Dataset:
    """An item of Request Attributes Sequence, of empty values where there is no description."""
    item = Dataset()
    item.RequestedProcedureID = "RP1" if description else ""
    item.ScheduledProcedureStepID = "SPS1" if description else ""
    item.RequestedProcedureDescription = description
    item.RequestedProcedureCodeSequence = [code("T1", "99SITE", "Thorax")] if description else []
    return item
