"""Encoded datasets: bounded, and right where pydicom is not.

Bytes are kept as they came, valid or not, so nothing here validates values.
"""

import io
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_preamble, read_sequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicomai.errors import TooLarge

# A warning would quote values, which may be a patient's.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

# What pydicom raises for bytes that are no dataset.
PARSER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,  # RecursionError: sequences nested too deep
    TypeError,
    ValueError,
    zlib.error,
)
# Where a deflated dataset keeps its identifying attributes.
HEAD_BYTES = 64 << 20
# What pydicom inflates without bounds, and what it reads wrongly.
BY_HAND = {DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian}
UNDEFINED_LENGTH = 0xFFFFFFFF
LONG_HEADER = 12  # tag, VR, two reserved bytes, length (PS3.5 7.1.2)

StopWhen = Callable[[BaseTag, str | None, int], bool]


def parse(
    data: bytes, syntax: UID, stop_when: StopWhen | None = None, tags: Collection[int] = ()
) -> Dataset:
    """Parse an encoded dataset; raises one of PARSER_ERRORS.

    stop_when: (tag, VR, length) before which to end; tags: what to keep, everything if empty
    """
    file = io.BytesIO(data)
    wanted: list[BaseTag | int] | None = [Tag(tag) for tag in tags] or None
    if syntax != ExplicitVRBigEndian:
        # Whatever else it is called, it is Explicit VR Little Endian (PS3.5 annex A).
        implicit = syntax == ImplicitVRLittleEndian
        return read_dataset(file, implicit, True, stop_when=stop_when, specific_tags=wanted)
    return _parse_big_endian(file, stop_when, wanted)


def _parse_big_endian(
    file: io.BytesIO, stop_when: StopWhen | None, wanted: list[BaseTag | int] | None
) -> Dataset:
    """VR UN of undefined length is a sequence in Implicit VR Little Endian, whatever the dataset
    is in (PS3.5 6.2.2); pydicom 3.0 goes on in big endian and loses its way.
    """
    found = Dataset()
    while True:
        sequence: list[BaseTag] = []

        def at_sequence(
            tag: BaseTag, vr: str | None, length: int, sequence: list[BaseTag] = sequence
        ) -> bool:
            if vr == "UN" and length == UNDEFINED_LENGTH:
                sequence.append(tag)
            return bool(sequence) or (stop_when is not None and stop_when(tag, vr, length))

        part = read_dataset(file, False, False, stop_when=at_sequence, specific_tags=wanted)
        found.update(part)
        found.set_original_encoding(False, False)
        if not sequence:
            return found
        file.seek(LONG_HEADER, io.SEEK_CUR)
        items = read_sequence(file, True, True, UNDEFINED_LENGTH, "iso8859")
        if wanted is None or sequence[0] in wanted:
            found.add_new(sequence[0], "SQ", items)


def parse_head(data: bytes, syntax: UID, tags: Collection[int]) -> Dataset:
    """The elements named by tags of an encoded dataset, no further than the last of them.

    Raises one of PARSER_ERRORS. Of a deflated dataset no more is inflated than a header needs.
    """
    if syntax == DeflatedExplicitVRLittleEndian:
        data = inflate(data, HEAD_BYTES)
    return parse(data, syntax, _after(tags), tags)


def _after(tags: Collection[int]) -> StopWhen:
    last = max(tags)
    return lambda tag, _vr, _length: bool(tag > last)


def inflate(data: bytes, limit: int) -> bytes:
    """At most limit bytes of a deflated dataset: it may be a thousand times its size (RFC 1951)."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limit)


def parse_file(path: Path, max_bytes: int) -> Dataset:
    """Parse a DICOM file, also one without preamble or file meta information.

    max_bytes: what a deflated dataset may become. Raises TooLarge for more, InvalidDicomError where
    it is no DICOM file, OSError, or one of PARSER_ERRORS.
    """
    # From memory: a damaged length of 4 GB asks a file for 4 GB, and a buffer for what is left.
    data = path.read_bytes()
    meta, start = _file_meta(data)
    if meta is None:
        return _parse_bare(data)
    syntax = UID(str(meta.get("TransferSyntaxUID") or ""))
    if syntax not in BY_HAND:
        return pydicom.dcmread(io.BytesIO(data))
    dataset = data[start:]
    if syntax == DeflatedExplicitVRLittleEndian:
        dataset = inflate(dataset, max_bytes + 1)
        if len(dataset) > max_bytes:
            raise TooLarge(
                f"the deflated dataset holds more than {max_bytes} bytes (prepare.max_megabytes)"
            )
    ds = parse(dataset, syntax)
    ds.file_meta = meta
    return ds


def parse_file_head(path: Path, tags: Collection[int]) -> Dataset:
    """The same for the elements named by tags, no further than the last of them."""
    data = path.read_bytes()
    meta, start = _file_meta(data)
    if meta is None:
        return _parse_bare(data, tags)
    syntax = UID(str(meta.get("TransferSyntaxUID") or ""))
    if syntax not in BY_HAND:
        head = io.BytesIO(data)
        return pydicom.dcmread(head, specific_tags=[*tags], stop_before_pixels=True)
    ds = parse_head(data[start:], syntax, tags)
    ds.file_meta = meta
    return ds


def _file_meta(data: bytes) -> tuple[FileMetaDataset | None, int]:
    """File meta information (PS3.10 7.1) and where the dataset begins; None where it is missing."""
    file = io.BytesIO(data)
    try:
        read_preamble(file, force=False)
    except InvalidDicomError:
        return None, 0
    meta = read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
    return FileMetaDataset(meta), file.tell()


def _parse_bare(data: bytes, tags: Collection[int] = ()) -> Dataset:
    """A dataset alone, as old modalities write it to disk; it begins with group 0002 or 0008."""
    if data[:2] in {b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08"}:
        ds = pydicom.dcmread(io.BytesIO(data), force=True, specific_tags=[*tags] or None)
        if "SOPClassUID" in ds:  # what no other file gives
            return ds
    raise InvalidDicomError("it has no DICM prefix")


def transfer_syntax_uid(ds: Dataset) -> str:
    """The file's own; what the parser found where the file does not say."""
    meta = getattr(ds, "file_meta", None)
    stated = str(meta.get("TransferSyntaxUID") or "") if meta is not None else ""
    if stated:
        return stated
    implicit, little = ds.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian
