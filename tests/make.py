"""Test objects: real radiographs in the shapes that hospitals send, built in code, and a model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

from dicomai.demo.radiographs import digital_xray, pixels, radiographs, set_pixels
from dicomai.settings import shipped
from dicomai.study import Accepts

STARTER = shipped("config/models/chest-starter/2")  # what an installation scores with


def chest_radiograph(
    number: int = 0, study: str | None = None, instance_number: int = 1, **attributes: Any
) -> Dataset:
    """A real DX radiograph; attributes are set on it, None removes one."""
    study = study or generate_uid()
    ds = digital_xray(radiographs()[number], "TEST", study, instance_number)
    # One study has one patient, whichever radiograph its pixels are from.
    ds.PatientBirthDate, ds.PatientAge, ds.PatientSex = "19700101", "047Y", "F"
    return change(ds, attributes)


def large_radiograph(study: str | None = None, instance_number: int = 1) -> Dataset:
    """A real radiograph at a detector's size: 2500 x 2048 pixels, 12 of 16 bits, MONOCHROME1."""
    ds = chest_radiograph(0, study, instance_number)
    image = cv2.resize(pixels(radiographs()[0]), (2048, 2500), interpolation=cv2.INTER_CUBIC)
    stored = 4095 - np.rint(image.astype(np.float64) * 4095 / 255).astype(np.uint16)
    set_pixels(ds, stored, bits_stored=12)
    ds.PhotometricInterpretation, ds.PresentationLUTShape = "MONOCHROME1", "INVERSE"
    ds.WindowCenter, ds.WindowWidth = "2048", "4096"
    return ds


def computed_radiograph(number: int = 0, study: str | None = None, **attributes: Any) -> Dataset:
    """The same as a CR image, with little more than what the standard demands."""
    source = chest_radiograph(number, study)
    ds = Dataset()
    for keyword in (
        "SpecificCharacterSet", "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
        "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber",
        "ReferringPhysicianName", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber",
        "BodyPartExamined", "PatientOrientation", "Rows", "Columns", "SamplesPerPixel",
        "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
        "PixelRepresentation", "WindowCenter", "WindowWidth", "PixelData",
    ):  # fmt: skip
        ds[keyword] = source[keyword]
    ds.Modality, ds.Manufacturer, ds.ViewPosition = "CR", "Test", "PA"
    ds.SOPClassUID, ds.SOPInstanceUID = ComputedRadiographyImageStorage, generate_uid()
    add_file_meta(ds)
    return change(ds, attributes)


def accepts(**changes: Any) -> Accepts:
    """What a model of chest radiographs accepts."""
    usual = Accepts(
        modalities=("CR", "DX"),
        sop_classes=(),
        body_parts=("CHEST", ""),
        views=("PA", "AP", ""),
        photometric=("MONOCHROME1", "MONOCHROME2"),
        presentation_intents=("FOR PRESENTATION", ""),
        localizers=False,
        age_years=(0, 130),
        min_size=100,
        frames="all",
    )
    return dataclasses.replace(usual, **changes)


def report(study: str) -> Dataset:
    """Somebody else's structured report, with no pixels."""
    ds = Dataset()
    ds.PatientName, ds.PatientID, ds.StudyInstanceUID = "Test^Report", "TEST", study
    ds.SeriesInstanceUID, ds.SOPInstanceUID = generate_uid(), generate_uid()
    ds.SOPClassUID, ds.Modality = EnhancedSRStorage, "SR"
    add_file_meta(ds)
    return ds


def add_file_meta(ds: Dataset, transfer_syntax_uid: str = ExplicitVRLittleEndian) -> None:
    """File meta information that fits the dataset."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = transfer_syntax_uid
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID


def change(ds: Dataset, attributes: dict[str, Any]) -> Dataset:
    """Set attributes; None removes one."""
    for keyword, value in attributes.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return ds


def save(folder: Path, datasets: Sequence[Dataset]) -> list[Path]:
    """Write datasets as files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for ds in datasets:
        file = folder / f"{ds.SOPInstanceUID}.dcm"
        ds.save_as(file, enforce_file_format=True)
        files.append(file)
    return files
