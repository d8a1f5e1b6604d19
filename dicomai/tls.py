"""TLS as PS3.15 B.12 has it: BCP 195 (RFC 8996, RFC 9325), certificates of either side from files.

TLS 1.3 where the peer has it, else TLS 1.2 with the cipher suites that RFC 9325 4.2 recommends.
"""

import ssl
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from dicomai.errors import Misuse

log = structlog.get_logger()

CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
)
# What OpenSSL says, in words for a person who has two programs to bring together.
REASONS = {
    "WRONG_VERSION_NUMBER": "the peer speaks no TLS",
    "HTTP_REQUEST": "the peer speaks HTTP",
    "UNSUPPORTED_PROTOCOL": "the peer speaks nothing newer than TLS 1.1",
    "NO_SHARED_CIPHER": "no cipher suite in common",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer sent no certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not know who signed our certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer demands a certificate",
}


@dataclass(frozen=True, slots=True)
class Files:
    """PEM files, and the section of the settings that names them.

    ca: who signs the other side
    """

    section: str
    certificate: Path | None
    key: Path | None
    ca: Path | None

    def stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Differs after a file was changed or replaced."""
        return tuple(_stamp(path) for path in (self.certificate, self.key, self.ca))


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return found and (found.st_mtime_ns, found.st_ino, found.st_size)


def acceptor(files: Files) -> ssl.SSLContext:
    """For whoever connects to us; with a CA, peers need a certificate of it. Raises Misuse."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    _load(context, files)
    if files.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class Requestor(ssl.SSLContext):
    """For one connection of ours; trouble: why it failed, which pynetdicom does not say."""

    trouble: str | None = None


class _Socket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError as error:
            self._fail(error)
            raise

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        # With TLS 1.3 the peer refuses our certificate after the handshake (RFC 8446 4.4.2.4).
        try:
            return super().recv(buflen, flags)
        except ssl.SSLError as error:
            self._fail(error)
            raise

    def _fail(self, error: OSError) -> None:
        assert isinstance(self.context, Requestor)
        self.context.trouble = words(error)
        self.close()  # pynetdicom 3.0.4 does not where the peer has reset the connection


Requestor.sslsocket_class = _Socket


def requestor(files: Files) -> Requestor:
    """For connecting to a peer whose certificate is of the CA. Raises Misuse."""
    context = Requestor(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    _load(context, files)
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(":".join(CIPHERS))
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION


def _load(context: ssl.SSLContext, files: Files) -> None:
    if files.ca is not None:
        _load_ca(context, f"{files.section}.tls_ca", files.ca)
    if files.certificate is None or files.key is None:
        return
    for name, path in (("tls_certificate", files.certificate), ("tls_key", files.key)):
        _readable(f"{files.section}.{name}", path)
    try:
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except ssl.SSLError as error:
        raise _blame(files, error) from error


def _load_ca(context: ssl.SSLContext, key: str, path: Path) -> None:
    _readable(key, path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise Misuse(f"{key}: {path} holds no certificate in PEM format") from error


def _readable(key: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise Misuse(f"{key}: cannot read {path}: {error.strerror}") from error


def _blame(files: Files, error: ssl.SSLError) -> Misuse:
    assert files.certificate is not None
    certificate, key = f"{files.section}.tls_certificate", f"{files.section}.tls_key"
    _load_ca(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, files.certificate)
    if error.reason == "KEY_VALUES_MISMATCH":
        return Misuse(f"{key}: {files.key} is not the key of {files.certificate}")
    if error.reason in {"EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"}:
        return Misuse(f"{certificate}: {files.certificate} is too weak ({words(error)})")
    return Misuse(f"{key}: {files.key} holds no private key in PEM format without password")


def words(error: OSError) -> str:
    """Why a handshake failed, for a person."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError):
        return "the peer closed the connection"
    if isinstance(error, TimeoutError):
        return "the peer does not answer"
    reason = getattr(error, "reason", None) or "handshake failed"
    return REASONS.get(reason, reason.lower().replace("_", " "))


class Acceptor:
    """The listener's context, made anew when its files change."""

    def __init__(self, files: Files) -> None:
        """Raises Misuse."""
        self._files = files
        self._lock = threading.Lock()
        self._stamp = files.stamp()
        self._context = acceptor(files)

    def context(self) -> ssl.SSLContext:
        """From the files as they are; if they are broken, from the last good ones."""
        with self._lock:
            stamp = self._files.stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._context = acceptor(self._files)
                except (Misuse, OSError) as error:
                    # Once for each change: not with every connection.
                    log.error("certificates_not_reloaded", error=str(error))
                else:
                    log.info("certificates_reloaded")
            return self._context


class Own(Protocol):
    """The files that a section of the settings names."""

    @property
    def tls_certificate(self) -> Path | None: ...
    @property
    def tls_key(self) -> Path | None: ...
    @property
    def tls_ca(self) -> Path | None: ...


class Peer(Own, Protocol):
    """What the settings say of a destination."""

    @property
    def name(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def tls_name(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Channel:
    """How to connect to a peer; name: what its certificate is to be for."""

    files: Files
    name: str

    def context(self) -> Requestor:
        """The files as they are now. Raises Misuse."""
        return requestor(self.files)


def listens(receive: Own) -> Acceptor | None:
    """How the listener answers, None for plain TCP. Raises Misuse."""
    if receive.tls_certificate is None:
        return None
    return Acceptor(Files("receive", receive.tls_certificate, receive.tls_key, receive.tls_ca))


def channel(peer: Peer) -> Channel | None:
    """How to connect to a destination, None for plain TCP."""
    if peer.tls_ca is None:
        return None
    section = f"destinations.{peer.name}"
    files = Files(section, peer.tls_certificate, peer.tls_key, peer.tls_ca)
    return Channel(files, peer.tls_name or peer.host)


def check(destinations: Iterable[Peer]) -> None:
    """Raises Misuse with the key and the file that cannot be used."""
    for peer in destinations:
        found = channel(peer)
        if found is not None:
            found.context()
