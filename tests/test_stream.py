"""C-STORE requests as bytes, held against what pynetdicom would send."""

from pathlib import Path

import make
import pytest
from pydicom.dataset import Dataset
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import split_dataset
from pynetdicom.pdu import P_DATA_TF

from dicomai.deliver import stream


def request(file: Path, ds: Dataset) -> C_STORE:
    """pynetdicom's own request for a file."""
    primitive = C_STORE()
    primitive.MessageID, primitive.Priority = 7, stream.MEDIUM
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = (
        ds.SOPClassUID,
        ds.SOPInstanceUID,
    )
    primitive._dataset_path = (file, split_dataset(file)[1])
    return primitive


def decoded(pdus: bytes) -> list[tuple[int, bytes]]:
    """Context and value (with its control header) of each fragment."""
    found = []
    while pdus:
        length = 6 + int.from_bytes(pdus[2:6], "big")
        pdu = P_DATA_TF()
        pdu.decode(pdus[:length])
        found += [
            (x.context_id, x.presentation_data_value) for x in pdu.presentation_data_value_items
        ]
        pdus = pdus[length:]
    return found


@pytest.mark.parametrize("largest_pdu", [4096, 16384, 16382, 32768, 1 << 18])
def test_the_fragments_are_those_of_pynetdicom(tmp_path: Path, largest_pdu: int) -> None:
    ds = make.chest_radiograph()
    (file,) = make.save(tmp_path, [ds])
    primitive = request(file, ds)
    message = C_STORE_RQ()
    message.primitive_to_message(primitive)
    theirs = [
        item for pdata in message.encode_msg(3, largest_pdu)
        for item in pdata.presentation_data_value_list
    ]  # fmt: skip
    pieces = stream.blocks(stream.command(primitive), 3, primitive._dataset_path, largest_pdu)
    ours = decoded(b"".join(bytes(piece) for piece in pieces))
    assert [bytes(value) for _, value in ours[1:]] == [value for _, value in theirs[1:]]
    assert {context for context, _ in ours} == {3}
    # The command says the same; pynetdicom has another value for "a dataset follows".
    mine, other = elements(ours[0][1][1:]), elements(theirs[0][1][1:])
    assert mine.pop(0x0800) != other.pop(0x0800)
    assert mine == other


def elements(command: bytes) -> dict[int, bytes]:
    """Of a command set."""
    found = {}
    while command:
        number, length = (int.from_bytes(command[a:b], "little") for a, b in ((2, 4), (4, 8)))
        found[number], command = command[8 : 8 + length], command[8 + length :]
    return found


def test_a_peer_that_takes_any_length_gets_no_endless_pdu(tmp_path: Path) -> None:
    ds = make.large_radiograph()
    (file,) = make.save(tmp_path, [ds])
    primitive = request(file, ds)
    pieces = stream.blocks(stream.command(primitive), 1, primitive._dataset_path, 0)
    sent = [bytes(piece) for piece in pieces]
    assert max(map(len, sent)) <= stream.BLOCK_BYTES
    values = [value[1:] for _, value in decoded(b"".join(sent))[1:]]
    assert b"".join(values) == file.read_bytes()[split_dataset(file)[1] :]
    assert max(map(len, values)) < stream.LARGEST_PDU


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    ds = make.large_radiograph()
    (file,) = make.save(tmp_path, [ds])
    primitive = request(file, ds)
    pieces = stream.blocks(stream.command(primitive), 1, primitive._dataset_path, 16384)
    next(pieces)
    next(pieces)
    with file.open("r+b") as opened:
        opened.truncate(100_000)
    with pytest.raises(OSError, match="shorter"):
        list(pieces)
