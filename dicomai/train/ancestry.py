"""What a model and its ancestors have learnt from, as learnt.json in its package says.

Nobody in it is ever tested on by a descendant. No image can be made of a fingerprint, and of a
patient there is a key, or the Patient ID of a public collection.
"""

import base64
import binascii
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dicomai.errors import Misuse
from dicomai.prepare.fingerprint import BITS

FILE = "learnt.json"
PUBLIC = ""  # the site of Patient IDs that anybody may know
SIZE = BITS // 8


@dataclass(frozen=True, slots=True)
class Ancestry:
    """Patients by the site whose keys they are, and fingerprints of their images."""

    patients: Mapping[str, frozenset[str]] = field(default_factory=dict)
    fingerprints: tuple[bytes, ...] = ()

    def with_more(
        self, site: str, patients: Collection[str], fingerprints: Sequence[bytes]
    ) -> "Ancestry":
        """A descendant's, which has learnt from these too."""
        mine = self.patients.get(site, frozenset()) | frozenset(patients)
        prints = tuple(dict.fromkeys((*self.fingerprints, *fingerprints)))
        return Ancestry({**self.patients, site: mine}, prints)

    def as_json(self) -> str:
        """The file's text."""
        return json.dumps(
            {
                "patients": {site: sorted(keys) for site, keys in sorted(self.patients.items())},
                "fingerprints": base64.b64encode(b"".join(self.fingerprints)).decode(),
            }
        )


def read(package: Path) -> Ancestry:
    """Of a package; one without the file says nothing. Raises Misuse where it is damaged."""
    file = package / FILE
    if not file.is_file():
        return Ancestry()
    try:
        found = json.loads(file.read_text())
        prints = base64.b64decode(found["fingerprints"], validate=True)
        patients = {
            str(site): frozenset(map(str, keys)) for site, keys in found["patients"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise Misuse(f"cannot read {file}: install the package again") from error
    if len(prints) % SIZE:
        raise Misuse(f"{file} is damaged: install the package again")
    return Ancestry(
        patients, tuple(prints[start : start + SIZE] for start in range(0, len(prints), SIZE))
    )
