"""Datasets as they come: what pydicom does not read, or reads without bounds."""

import io
import resource
import struct
import time
import zlib
from pathlib import Path

import make
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicomai.errors import NotDicom, TooLarge
from dicomai.parse import HEAD_BYTES, parse, parse_file, transfer_syntax_uid
from dicomai.prepare import pixels
from dicomai.receive import header, inbox
from dicomai.study import Limits

LIMITS = Limits(max_pixels=10_000_000, max_bytes=50_000_000, max_frames=10)


def encoded(ds: Dataset, syntax: str) -> bytes:
    """The dataset alone."""
    copy = Dataset(ds)
    buffer = io.BytesIO()
    pydicom.dcmwrite(
        buffer,
        copy,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian,
        force_encoding=True,
    )
    return buffer.getvalue()


def small() -> Dataset:
    """An identified object without pixels."""
    ds = make.report("1.2.3")
    del ds.file_meta
    return Dataset(ds)


def written(folder: Path, syntax: str, dataset: bytes) -> Path:
    """A file with file meta information around a dataset."""
    ds = make.report("1.2.3")
    meta = io.BytesIO()
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    pydicom.filewriter.write_file_meta_info(meta, ds.file_meta, enforce_standard=True)
    file = folder / "object.dcm"
    file.write_bytes(b"\0" * 128 + b"DICM" + meta.getvalue() + dataset)
    return file


def test_an_unknown_vr_of_undefined_length_is_implicit_little_endian_in_a_big_endian_file() -> None:
    ds = small()
    before, after = Dataset(), Dataset()
    for element in ds:
        (before if element.tag < 0x00081140 else after).add(element)
    item = Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3.4"
    content = encoded(item, ImplicitVRLittleEndian)
    sequence = (
        struct.pack(">HH2sHI", 0x0008, 0x1140, b"UN", 0, 0xFFFFFFFF)
        + struct.pack("<HHI", 0xFFFE, 0xE000, len(content))
        + content
        + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    )
    data = encoded(before, ExplicitVRBigEndian) + sequence + encoded(after, ExplicitVRBigEndian)
    found = parse(data, ExplicitVRBigEndian)
    assert found[0x00081140].value[0].ReferencedSOPInstanceUID == "1.2.3.4"
    assert found.SOPInstanceUID == ds.SOPInstanceUID
    assert found.SeriesInstanceUID == ds.SeriesInstanceUID
    assert header.parse(data, ExplicitVRBigEndian).series_instance_uid == ds.SeriesInstanceUID


def bomb(megabytes: int, tag: int = 0x00420011) -> bytes:
    """A deflated dataset with so many megabytes of zeros in one element."""
    ds = small()
    ds.add_new(tag, "OB", b"\0" * (megabytes << 20))
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return deflater.compress(encoded(ds, ExplicitVRLittleEndian)) + deflater.flush()


def test_a_deflated_dataset_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    data = bomb(60)
    assert len(data) < 100_000
    file = written(tmp_path, DeflatedExplicitVRLittleEndian, data)
    with pytest.raises(TooLarge, match="max_megabytes"):
        pixels.read(file, LIMITS)


def test_a_deflated_dataset_below_the_limit_is_read(tmp_path: Path) -> None:
    file = written(tmp_path, DeflatedExplicitVRLittleEndian, bomb(40))
    assert len(pixels.read(file, LIMITS).EncapsulatedDocument) == 40 << 20


def test_the_receiver_inflates_no_more_than_a_header(tmp_path: Path) -> None:
    before = bomb((HEAD_BYTES >> 20) + 1, 0x00091001)
    with pytest.raises(NotDicom):  # some of its identifying attributes would come after the bomb
        header.parse(before, DeflatedExplicitVRLittleEndian)
    behind = bomb(60)
    assert header.parse(behind, DeflatedExplicitVRLittleEndian).study_instance_uid == "1.2.3"


def test_the_receiver_reads_no_further_than_the_attributes_that_it_wants() -> None:
    items = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 500_000
    groups = struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(items)) + items
    started = time.perf_counter()
    data = encoded(small(), ExplicitVRLittleEndian) + groups
    found = header.parse(data, ExplicitVRLittleEndian)
    assert found.study_instance_uid == "1.2.3"
    assert time.perf_counter() - started < 0.5


def test_a_damaged_length_asks_for_no_more_than_there_is(tmp_path: Path) -> None:
    dataset = encoded(small(), ExplicitVRLittleEndian)
    dataset += struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 0xFFFFFFF0) + b"1234"
    file = written(tmp_path, ExplicitVRLittleEndian, dataset)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, hard))
    try:
        assert pixels.read(file, LIMITS).PixelData == b"1234"
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_file_larger_than_the_limit_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "large.dcm"
    with file.open("wb") as sparse:
        sparse.truncate(LIMITS.max_bytes + 1)
    with pytest.raises(TooLarge, match="at most 50000000"):
        pixels.read(file, LIMITS)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_a_dataset_without_preamble_and_file_meta_is_read(tmp_path: Path, syntax: str) -> None:
    ds = small()
    file = tmp_path / "bare"
    file.write_bytes(encoded(ds, syntax))
    found = parse_file(file, LIMITS.max_bytes)
    assert found.SOPInstanceUID == ds.SOPInstanceUID
    assert transfer_syntax_uid(found) == syntax
    found, instance, _ = inbox.read_file(file)
    assert found.study_instance_uid == "1.2.3"
    assert instance.transfer_syntax_uid == syntax


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(300), b"a letter" * 50])
def test_other_files_are_no_dicom(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "other"
    file.write_bytes(content)
    with pytest.raises(NotDicom):
        pixels.read(file, LIMITS)
    with pytest.raises(NotDicom):
        inbox.read_file(file)


def test_sequences_nested_too_deep_are_refused(tmp_path: Path) -> None:
    opening = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF)
    opening += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    dataset = encoded(small(), ExplicitVRLittleEndian) + opening * 50_000
    file = written(tmp_path, ExplicitVRLittleEndian, dataset)
    with pytest.raises(NotDicom):
        pixels.read(file, LIMITS)
