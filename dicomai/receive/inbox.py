"""The folder of received objects: bytes as they came, durable before anybody is told so.

inbox/<Study Instance UID>/<SOP Instance UID>.<digest>.dcm; inbox/<...>.part is under way
"""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

from pydicom.errors import InvalidDicomError

from dicomai import durable
from dicomai.errors import NotDicom
from dicomai.parse import PARSER_ERRORS, parse_file_head, transfer_syntax_uid
from dicomai.receive import header
from dicomai.receive.header import Header
from dicomai.study import Instance

# What of an object is kept in memory: its identifying attributes are hardly ever further on.
START_BYTES = 1 << 17
# Preamble, prefix, the group length's own element, and what it counts (PS3.10 7.1).
BEFORE_META = 128 + 4 + 12


class Draft:
    """An object under way, written as it comes to a temporary file that keep() gives its name.

    Nothing is raised while it comes: what goes wrong is said at its end.
    """

    def __init__(
        self, inbox: Path, transfer_syntax_uid: str, file_meta: bytes, desk: durable.Desk
    ) -> None:
        """file_meta: preamble, prefix and group 0002, encoded. Raises OSError."""
        self._inbox = inbox
        self._syntax = transfer_syntax_uid
        self._stream = durable.Stream(inbox, desk, self._see)
        self._hasher = _hasher(transfer_syntax_uid)
        self._start = b""
        self._error: OSError | None = None
        self._meta_bytes = len(file_meta)
        self.write(file_meta)

    @property
    def size(self) -> int:
        """Bytes of the file, once header() has been asked."""
        return self._stream.size

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the dataset."""
        if self._error is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self._error = error

    def _see(self, written: memoryview) -> None:
        if not self._stream.size:
            written = written[self._meta_bytes :]
            self._start = bytes(written[:START_BYTES])
        self._hasher.update(written)

    def header(self) -> Header:
        """Of the whole dataset. Raises NotDicom, and OSError where it could not be written."""
        if self._error is not None:
            raise self._error
        self._stream.end()
        found = header.glance(self._start, self._syntax)
        if found is not None:
            return found
        return header.parse(self._stream.path.read_bytes()[self._meta_bytes :], self._syntax)

    def keep(self, found: Header) -> Instance:
        """Give it its name; its content is durable then, its name with a sync of its folder.

        Raises OSError.
        """
        digest = self._hasher.hexdigest()
        folder = self._inbox / found.study_instance_uid
        path = folder / f"{found.sop_instance_uid}.{digest[:12]}.dcm"
        self._stream.keep(path)
        return Instance(
            found.sop_instance_uid,
            found.sop_class_uid,
            found.series_instance_uid,
            self._syntax,
            path,
            digest,
        )

    def close(self) -> None:
        """End; what was not kept is removed."""
        self._stream.close()


def digest(dataset: bytes, transfer_syntax_uid: str) -> str:
    """SHA-256 of what was sent; the file meta, which we write, does not count."""
    hasher = _hasher(transfer_syntax_uid)
    hasher.update(dataset)
    return hasher.hexdigest()


def _hasher(transfer_syntax_uid: str) -> "hashlib._Hash":
    return hashlib.sha256(f"{transfer_syntax_uid}\n".encode())


def file_meta(
    sop_class_uid: str,
    sop_instance_uid: str,
    transfer_syntax_uid: str,
    implementation: tuple[str, str],
) -> bytes:
    """Preamble, prefix and file meta information (PS3.10 7.1).

    implementation: class UID and version name of who writes it
    """
    class_uid, version = implementation
    elements = [
        (0x0001, b"OB\0\0", b"\0\1"),
        (0x0002, b"UI", sop_class_uid.encode()),
        (0x0003, b"UI", sop_instance_uid.encode()),
        (0x0010, b"UI", transfer_syntax_uid.encode()),
        (0x0012, b"UI", class_uid.encode()),
        (0x0013, b"SH", version.encode()),
    ]
    body = b"".join(_element(*element) for element in elements)
    return b"\0" * 128 + b"DICM" + _element(0, b"UL", struct.pack("<I", len(body))) + body


def _element(number: int, vr: bytes, value: bytes) -> bytes:
    if len(value) % 2:
        value += b" " if vr == b"SH" else b"\0"
    return struct.pack("<HH4sI" if len(vr) == 4 else "<HH2sH", 2, number, vr, len(value)) + value


def read_file(path: Path) -> tuple[Header, Instance, int]:
    """A DICOM file from disk with its size. Raises NotDicom where it is none, or broken."""
    data = path.read_bytes()
    try:
        ds = parse_file_head(path, header.WANTED)
        found = header.of_dataset(ds)
        syntax = transfer_syntax_uid(ds)
        length = int(ds.file_meta.get("FileMetaInformationGroupLength", 0))
    except InvalidDicomError as error:
        raise NotDicom("not a DICOM file: it has no DICM prefix") from error
    except PARSER_ERRORS as error:
        raise NotDicom(f"cannot be parsed as DICOM ({header.kind(error)})") from error
    dataset = data[BEFORE_META + length :] if length else data
    instance = Instance(
        found.sop_instance_uid,
        found.sop_class_uid,
        found.series_instance_uid,
        syntax,
        path,
        digest(dataset, syntax),
    )
    return found, instance, len(data)


def read_back(path: Path) -> tuple[Header, Instance, int]:
    """What keep() wrote. Raises NotDicom where it is not what its name says."""
    found, instance, size = read_file(path)
    if not path.name.endswith(f".{instance.digest[:12]}.dcm"):
        raise NotDicom(f"{path.name} does not hold the bytes that its name says")
    return found, instance, size


def _is_older(file: Path, moment: float) -> bool:
    try:
        return file.stat().st_mtime < moment
    except FileNotFoundError:  # written or replaced at this moment
        return False


def remove_drafts(inbox: Path, moment: float) -> int:
    """Remove what nobody has written to since a moment (seconds since 1970); returns how many."""
    old = [file for file in inbox.glob(f"*{durable.TEMPORARY}") if _is_older(file, moment)]
    for file in old:
        file.unlink(missing_ok=True)
    return len(old)


def files_before(folder: Path, moment: float) -> Iterator[list[Path]]:
    """Files last changed before a moment (seconds since 1970), a study's folder at a time.

    What is no study's folder is somebody else's.
    """
    if not folder.is_dir():
        return
    for study in sorted(folder.iterdir()):
        if header.is_uid(study.name) and study.is_dir():
            old = [file for file in sorted(study.iterdir()) if _is_older(file, moment)]
            if old:
                yield old
