"""NIH ChestX-ray14 images as Digital X-Ray objects For Presentation (PS3.3 A.26)."""

import csv
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)

IMAGES = Path(__file__).parent / "images"


@dataclass(frozen=True, slots=True)
class Radiograph:
    """One image of images/index.csv; view: PA or AP.

    pixel_spacing_mm: (rows, columns) of the 512 x 512 file, which had lost its aspect ratio
    """

    path: Path
    label: str
    age_years: int
    sex: str
    view: str
    pixel_spacing_mm: tuple[float, float]


def radiographs() -> tuple[Radiograph, ...]:
    """The images that travel with the program."""
    with (IMAGES / "index.csv").open(newline="") as file:
        return tuple(
            Radiograph(
                IMAGES / row["file"],
                row["label"],
                int(float(row["age_years"])),
                row["sex"],
                row["view"],
                (
                    float(row["pixel_spacing_mm"]) * float(row["orig_height"]) / 512,
                    float(row["pixel_spacing_mm"]) * float(row["orig_width"]) / 512,
                ),
            )
            for row in csv.DictReader(file)
        )


def pixels(radiograph: Radiograph) -> NDArray[np.uint8]:
    """Grey values (rows, columns), 0 is black."""
    image = cv2.imread(str(radiograph.path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise FileNotFoundError(radiograph.path)
    return image.astype(np.uint8)


def digital_xray(
    radiograph: Radiograph, patient_id: str, study_instance_uid: str, instance_number: int = 1
) -> Dataset:
    """A DX Image For Presentation with this radiograph's pixels; UIDs follow from the arguments."""
    name = radiograph.path.stem
    ds = Dataset()
    _patient_and_study(ds, radiograph, patient_id, study_instance_uid)
    _acquisition(ds, radiograph)
    ds.SOPClassUID = DigitalXRayImageStorageForPresentation
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=["series", study_instance_uid])
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[name, study_instance_uid, str(instance_number)])
    ds.SeriesNumber, ds.InstanceNumber = 1, instance_number
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.DerivationDescription = "512 x 512 pixels, from JPEG quality 92, NIH ChestX-ray14"
    set_pixels(ds, pixels(radiograph), bits_stored=8)
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LIN", 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.PresentationLUTShape = "IDENTITY"
    # (x - 127.5) / 255 + 0.5: the pixel values as they are (PS3.3 C.11.2.1.2.1).
    ds.WindowCenter, ds.WindowWidth = "128", "256"
    ds.BurnedInAnnotation = "NO"
    ds.LossyImageCompression = "01"
    ds.LossyImageCompressionRatio = "6"
    ds.LossyImageCompressionMethod = "ISO_10918_1"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return ds


def set_pixels(ds: Dataset, image: NDArray[np.unsignedinteger], bits_stored: int) -> None:
    """Grey pixels of 8 or 16 bits allocated, uncompressed."""
    ds.Rows, ds.Columns = image.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = image.dtype.itemsize * 8
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits_stored, bits_stored - 1, 0
    data = image.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB" if ds.BitsAllocated == 8 else "OW"


def _patient_and_study(
    ds: Dataset, radiograph: Radiograph, patient_id: str, study_instance_uid: str
) -> None:
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.PatientName = f"Demo^{patient_id.title()}"
    ds.PatientID, ds.IssuerOfPatientID = patient_id, "DICOMAI-DEMO"
    ds.PatientBirthDate = f"{2017 - radiograph.age_years}0101"
    ds.PatientSex, ds.PatientAge = radiograph.sex, f"{radiograph.age_years:03}Y"
    ds.StudyInstanceUID = study_instance_uid
    ds.StudyDate, ds.StudyTime, ds.StudyID = "20170101", "120000", "1"
    ds.AccessionNumber, ds.ReferringPhysicianName = f"A{patient_id}"[:16], ""
    ds.StudyDescription = "Chest"


def _acquisition(ds: Dataset, radiograph: Radiograph) -> None:
    ds.Modality, ds.Manufacturer = "DX", "NIH Clinical Center"
    ds.ContentDate, ds.ContentTime, ds.AcquisitionDate = "20170101", "120000", "20170101"
    ds.BodyPartExamined, ds.ViewPosition, ds.ImageLaterality = "CHEST", radiograph.view, "U"
    ds.PatientOrientation = ["L", "F"]
    ds.DetectorType, ds.PositionerType = None, None
    ds.ImagerPixelSpacing = [f"{mm:.4f}" for mm in radiograph.pixel_spacing_mm]
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator = "51185008", "SCT"
    region.CodeMeaning = "Chest"
    ds.AnatomicRegionSequence = [region]
    view = Dataset()
    code = {"PA": "272479007", "AP": "399348003"}[radiograph.view]
    view.CodeValue, view.CodingSchemeDesignator = code, "SCT"
    view.CodeMeaning = {"PA": "postero-anterior", "AP": "antero-posterior"}[radiograph.view]
    view.ViewModifierCodeSequence = []
    ds.ViewCodeSequence = [view]
    ds.AcquisitionContextSequence = []
    ds.KVP = None
