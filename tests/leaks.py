"""Looks for what may identify a patient in what a program says, in every form it may take."""

import base64
import html
import json
import re
from urllib.parse import quote

# Who the patient is: as the objects of tests/test_privacy.py say it, and as a program may take it
# apart. Nothing of this is in any other text.
SECRETS = (
    "Zzyzx",
    "Quentin",
    "Ørsåkerström",
    "Bjørné",
    "Yamaquux",
    "Tarouquux",
    "熊谷澤",
    "鶴太郎",
    "くまがいざわ",
    "PID-73991-Q",
    "OTHER-51515",
    "ACC55120Q",
    "19310407",
    "1931-04-07",
    "Quuxstadt",
    "Doktorovic",
    "Vladimira",
    "Operatorix",
    "Quallenbiss",
    "Quittenallee",
    "PRIVQ-4711",
    "+49 621 515151",
)
ENCODINGS = ("utf-8", "latin-1", "iso2022_jp", "shift_jis", "euc_jp", "utf-16-le", "utf-16-be")
ESCAPES = re.compile(rb"\x1b[$(]{1,2}[@-Z]")  # ISO 2022


def forms(secret: str) -> set[bytes]:
    """A text as it may stand in output."""
    found = {
        json.dumps(secret)[1:-1].encode(),
        secret.encode("unicode_escape"),
        html.escape(secret).encode("ascii", "xmlcharrefreplace"),
        "".join(f"&#x{ord(c):x};" for c in secret).encode(),
    }
    for encoding in ENCODINGS:
        try:
            raw = secret.encode(encoding)
        except UnicodeEncodeError:
            continue
        # As bytes; as ISO 2022 without its escapes; as characters of the wrong set.
        wrong = raw.decode("latin-1")
        found |= {raw, ESCAPES.sub(b"", raw), wrong.encode(), json.dumps(wrong)[1:-1].encode()}
        found |= {repr(raw)[2:-1].encode(), quote(raw).encode()}
        found |= {raw.hex(separator).encode() for separator in " :"}
        found |= {raw.hex().encode()} | {
            "".join(f"{mark}{byte:02x}" for byte in raw).encode() for mark in ("%", "\\x", "=")
        }
        # In base64, whatever stands before it.
        for offset in range(3):
            coded = base64.b64encode(b"\0" * offset + raw)
            found.add(coded[-(-offset * 4 // 3) : -4])
    return {form for form in found if len(form) >= 5}


FORMS = {secret: forms(secret) | forms(secret.upper()) for secret in SECRETS}


def leaks(said: bytes) -> list[str]:
    """Which secrets it holds, each with what stands around it."""
    lower = said.lower()
    found = []
    for secret, ways in FORMS.items():
        for way in ways:
            place = lower.find(way.lower())
            if place >= 0:
                found.append(f"{secret} as {way!r}: {said[max(0, place - 100) : place + 60]!r}")
                break
    return found
