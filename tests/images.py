"""Every real DICOM file: decoded, or the reason; and its picture beside DCMTK's.

`make images` prints the table and writes it to tests/images.md. DCMTK's dcmj2pnm renders frame 1
without overlays, with the same window; what it cannot decompress itself goes through dcmdjpls. It
has no decoder for JPEG 2000, HTJ2K and Deflated Image Frame.
"""

import csv
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from peers import shared
from pydicom.dataset import Dataset

from dicomai.errors import Rejected
from dicomai.prepare import image, pixels
from dicomai.prepare.decoders import Frames
from dicomai.prepare.pool import Pool
from dicomai.study import Limits

LIMITS = Limits(max_pixels=64_000_000, max_bytes=1 << 30, max_frames=2000)
WORKERS = 2
GREY_MEAN, GREY_NEAR, GREY_SHARE = 0.5, 2, 0.999
COLOUR_NEAR = 3

# Where DCMTK shows something else, and the passage that decides. Files that are not listed agree.
EXCEPTIONS = {
    "orthanc-tests/2026-05-26-oob-monochrome-46341.dcm": (
        "refused: 46341 x 46341 promised, 9 kB there (PS3.3 C.7.6.3.1.4: Pixel Data hold Rows x "
        "Columns pixels); DCMTK makes up what is missing"
    ),
    "pydicom/rtdose_expb.dcm": (
        "32-bit cells of a big endian file have their most significant byte first (PS3.5 7.3), as "
        "pydicom and rtdose.dcm, the same dose in little endian, show; DCMTK swaps 16-bit words"
    ),
    "pydicom-data/eCT_Supplemental.dcm": (
        "window and rescale are in functional groups (PS3.3 C.7.6.16.2.9, C.7.6.16.2.10), which "
        "dcmj2pnm does not read"
    ),
}
EXCEPTIONS["pydicom/rtdose_expb_1frame.dcm"] = EXCEPTIONS["pydicom/rtdose_expb.dcm"]


@dataclass
class Row:
    """One line of the table; differences in grey levels of 255."""

    file: str
    transfer_syntax: str
    photometric: str
    pydicom_decodes: bool
    frames: int = 0
    shown: int = 0
    reason: str = ""
    seconds: float = 0.0
    option: str = ""
    mean: float | None = None
    largest: int | None = None
    near: float | None = None
    colour: bool = False
    notes: list[str] = field(default_factory=list)
    megabytes: float = 0.0

    @property
    def dcmtk_renders(self) -> bool:
        return bool(self.option)

    @property
    def agrees(self) -> bool:
        """True where DCMTK does not render it either."""
        if self.mean is None or self.largest is None or self.near is None:
            return True
        if self.colour:
            return self.largest <= COLOUR_NEAR
        return self.mean <= GREY_MEAN and self.near >= GREY_SHARE


def entries(root: Path) -> list[dict[str, str]]:
    """The lines of manifest.csv, which says what is odd about each file."""
    with (root / "manifest.csv").open() as file:
        return list(csv.DictReader(file))


def peak_megabytes(pid: int | str) -> float:
    """The most memory that a process has had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def table(root: Path, progress: bool = False) -> Iterator[Row]:
    """A row for each file of root/manifest.csv."""
    manifest = entries(root)
    with tempfile.TemporaryDirectory() as scratch, Pool(WORKERS, 60, 1024) as pool:
        work = Path(scratch)
        calls = [(root / entry["file"], work / str(i), LIMITS) for i, entry in enumerate(manifest)]
        for entry, call in zip(manifest, calls, strict=True):
            row = Row(
                entry["file"],
                entry["transfer_syntax"],
                entry["photometric"],
                entry["pydicom_decode"] == "ok",
            )
            started = time.perf_counter()
            (done,) = pool.map(image.render, [call])
            row.seconds = time.perf_counter() - started
            if isinstance(done, Rejected):
                row.reason = f"{done.code}: {done}"
            else:
                row.frames = len(done)
                row.shown = sum(frame.path is not None for frame in done)
                row.reason = next((f.reason for f in done if f.reason), "")
            compare(row, call[0], work)
            if progress:
                print(line(row), flush=True)
            row.megabytes = peak_megabytes("self") + sum(map(peak_megabytes, pool.process_ids()))
            yield row


def compare(row: Row, file: Path, work: Path) -> None:
    """Frame 1 beside DCMTK's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ds = pixels.read(file, LIMITS)
            frames = Frames(ds, LIMITS)
            shown = image.show(ds, frames, 1)
        except Rejected as error:
            if error.code != "too-large":  # DCMTK would take 4 GB for it, and does render it
                row.option = "yes" if dcmtk(file, [], work) else ""
            return
        options, padding = window(ds, frames)
    picture = dcmtk(file, options, work)
    if picture is None:
        return
    theirs = read_picture(picture)
    row.option = " ".join(options) or "no option"
    row.colour = shown.ndim == 3
    # DCMTK floors where we round: the unrounded result is floored, for this comparison alone.
    # (A thousandth of a level more: float32 falls just below whole ones.)
    ours = np.rint(shown * 255) if row.colour else np.floor(shown * 255 + 0.001)
    difference = np.abs(ours - theirs)
    if padding is not None:
        # Excluded from the grey-scale pipeline (PS3.3 C.7.5.1.1.2); DCMTK windows it.
        difference = difference[~padding]
        row.notes.append(f"{padding.mean():.0%} padding is black here (PS3.3 C.7.5.1.1.2)")
    row.mean, row.largest = float(difference.mean()), int(difference.max())
    row.near = float((difference <= GREY_NEAR).mean())
    if row.file in EXCEPTIONS:
        row.notes.append(EXCEPTIONS[row.file])


def window(ds: Dataset, frames: Frames) -> tuple[list[str], NDArray[np.bool_] | None]:
    """The option of dcmj2pnm that asks for the same window, and which pixels are padding."""
    if ds.get("SamplesPerPixel", 1) != 1 or ds.PhotometricInterpretation == "PALETTE COLOR":
        return [], None
    stored = frames.decode(1)
    described = pixels.of_frame(ds, 1)
    values = pixels.values_of(stored.cells, stored)
    ends = pixels._padding(described, stored)
    padding = None if ends is None else (values >= ends[0]) & (values <= ends[1])
    if padding is not None and not padding.any():
        padding = None
    if ds.get("VOILUTSequence"):
        return ["+Wl", "1"], padding
    if ds.get("WindowWidth") not in (None, ""):
        return ["+Wi", "1"], padding
    if padding is None:
        return ["+Wm"], None
    # The window from the lowest to the highest value that is no padding (PS3.3 C.11.2.1.2.1).
    inside = pixels._modality(described, stored)(values[~padding])
    low, high = inside.min(), inside.max()
    return ["+Ww", f"{(low + high + 1) / 2}", f"{high - low + 1}"], padding


def dcmtk(file: Path, options: list[str], work: Path) -> Path | None:
    """DCMTK's picture; None where it has none."""
    picture = work / "dcmtk.ppm"
    picture.unlink(missing_ok=True)
    for source in (file, work / "decompressed.dcm"):
        if source != file:
            _run("/usr/bin/dcmdjpls", str(file), str(source))
        _run("/usr/bin/dcmj2pnm", "-O", "+F", "1", *options, "+op", str(source), str(picture))
        source.unlink() if source != file and source.exists() else None
        if picture.exists():
            return picture
    return None


def read_picture(file: Path) -> NDArray[Any]:
    """(rows, columns), or RGB."""
    found = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    assert found is not None
    return cv2.cvtColor(found, cv2.COLOR_BGR2RGB) if found.ndim == 3 else found


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=False, timeout=60)


def line(row: Row) -> str:
    """A row as Markdown."""
    frames = f"{row.shown} of {row.frames}" if row.frames != row.shown else str(row.shown)
    beside = ""
    if row.mean is not None and row.near is not None:
        beside = f"{row.mean:.3f} / {row.near:.2%} / {row.largest}"
    elif row.dcmtk_renders:
        beside = "renders it"
    notes = "; ".join(filter(None, [row.reason, *row.notes]))
    if row.mean is None and row.file in EXCEPTIONS:
        notes += f"; {EXCEPTIONS[row.file]}"
    return (
        f"| {row.file} | {row.transfer_syntax} | {row.photometric or '-'} | {frames} | "
        f"{row.option if row.mean is not None else ''} | {beside} | {notes} |"
    )


HEAD = """\
# Every real file, decoded or the reason

Made by `make images`. Frames: how many were rendered. Beside DCMTK 3.6.7: the option of `dcmj2pnm`
that asks for the same window, then mean absolute difference (of 255), pixels within 2, largest
difference of frame 1; nothing where DCMTK does not render the file.

| file | transfer syntax | photometric interpretation | frames | dcmj2pnm | beside DCMTK | notes |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    """Print and write the table, and what it says altogether."""
    cv2.setNumThreads(1)
    started = time.perf_counter()
    rows = list(table(shared() / "data/dicom", progress=True))
    beside = [row for row in rows if row.mean is not None]
    missed = [r for r in rows if (r.dcmtk_renders or r.pydicom_decodes) and not r.shown]
    apart = [row for row in beside if not row.agrees]
    summary = (
        f"\n{len(rows)} files: {sum(row.shown > 0 for row in rows)} decoded, "
        f"{sum(row.shown == 0 for row in rows)} with a reason. Of those that DCMTK or pydicom "
        f"decodes, not decoded: {', '.join(row.file for row in missed) or 'none'}. Beside DCMTK: "
        f"{sum(not row.colour for row in beside)} grey and {sum(row.colour for row in beside)} "
        f"colour files, apart: {', '.join(row.file for row in apart) or 'none'}.\n"
    )
    (Path(__file__).parent / "images.md").write_text(
        HEAD + "\n".join(map(line, rows)) + "\n" + summary
    )
    print(summary)
    print(
        f"{time.perf_counter() - started:.0f} s, slowest {max(row.seconds for row in rows):.2f} s; "
        f"peak memory of all processes together {rows[-1].megabytes:.0f} MB"
    )
    unexplained = [row.file for row in missed + apart if row.file not in EXCEPTIONS]
    sys.exit(f"not explained: {unexplained}" if unexplained else 0)


if __name__ == "__main__":
    main()
