"""Every error of the program.

DicomaiError
├── Misuse                  what a person typed or wrote into a file (exit code 2)
├── Unready                 the surroundings are not as they must be (exit code 1)
│   ├── DatabaseUnready
│   ├── ModelDamaged
│   ├── PortInUse
│   └── FolderNotOurs
├── Retryable               the same thing may work later
│   ├── PeerUnreachable
│   ├── PeerBusy
│   └── HeldElsewhere
├── Rejected                the same thing will never work
│   ├── UnsupportedPixels
│   ├── NotAccepted
│   ├── TooLarge
│   ├── NotDicom
│   ├── OutOfMemory
│   └── PeerRefused
├── Inaccurate              a compressed model says too much else than what it was made of
├── LeaseLost               somebody else holds the work now
├── Stopped                 work was told to end, and goes on another time
└── Misbehaviour            a peer breaks the protocol or a limit: its connection ends
"""


class DicomaiError(Exception):
    """The message is one line for a person: what is wrong and what to do."""

    exit_code = 1


class Misuse(DicomaiError):
    """A setting, option or argument that cannot be used."""

    exit_code = 2


class Unready(DicomaiError):
    """Something that the program stands on is missing or damaged."""


class DatabaseUnready(Unready):
    """The database cannot be reached, is not migrated, or is newer than the code."""


class ModelDamaged(Unready):
    """A model package that cannot be read, or whose weights are not the ones it names."""


class PortInUse(Unready):
    """Another program listens where this one should."""


class FolderNotOurs(Unready):
    """The data folder belongs to another database, or another daemon works in it."""


class Retryable(DicomaiError):
    """Worth another attempt after a wait."""


class PeerUnreachable(Retryable):
    """No association with the peer, or it ended without an answer."""


class PeerBusy(Retryable):
    """The peer answered that it is out of resources (status A7xx, PS3.4 B.2.3)."""


class HeldElsewhere(Retryable):
    """Another daemon on the same database has the study's files."""


class Rejected(DicomaiError):
    """Not worth another attempt; code: the reason for programs."""

    code = "rejected"

    def __init__(self, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.code = code or type(self).code


class UnsupportedPixels(Rejected):
    """Pixel data that cannot be decoded or shown."""

    code = "undecodable"


class NotAccepted(Rejected):
    """An image that the model does not take."""


class TooLarge(Rejected):
    """An object that asks for more than the settings allow."""

    code = "too-large"


class NotDicom(Rejected):
    """A file or dataset without what every stored DICOM object has."""

    code = "not-dicom"


class OutOfMemory(Rejected):
    """The device has no memory even for one image."""

    code = "out-of-memory"


class PeerRefused(Rejected):
    """The peer will not take this object, now or later."""


class Inaccurate(DicomaiError):
    """A compressed model that would say too much else than what it was made of."""


class LeaseLost(DicomaiError):
    """The work was given to another worker, or its study has changed."""


class Misbehaviour(DicomaiError):
    """What a peer does that ends its connection; code: the kind, for programs and for counting.

    is_answered: the peer has been told already, by a rejection
    """

    def __init__(self, code: str, words: str, is_answered: bool = False) -> None:
        super().__init__(words)
        self.code = code
        self.is_answered = is_answered


class Stopped(DicomaiError):
    """Work that was told to end before its end; what it had done is kept."""
