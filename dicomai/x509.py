"""Certificate files: whether they can be used, and for how long."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path


def faults_of_pair(certificate: Path, key: Path, ahead: timedelta) -> list[str]:
    """What is wrong with our own certificate and its key; ahead: for how long it must last."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, _no_password)
        # The library's only reader of a file; the others want a connection.
        facts = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
    except FileNotFoundError:
        missing = key if certificate.is_file() else certificate
        return [f"there is no {missing}: correct the settings"]
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        return [f"{certificate} and {key} cannot be used: {_reason(error)}"]
    return _expiry(certificate, str(facts["notAfter"]), ahead)


def _no_password() -> str:
    return ""  # without it, the library asks at the terminal


def faults_of_authorities(file: Path, ahead: timedelta) -> list[str]:
    """What is wrong with the certificates of those who sign."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(file)
    except FileNotFoundError:
        return [f"there is no {file}: correct the settings"]
    except OSError as error:
        return [f"{file} cannot be used: {_reason(error)}"]
    ends = [str(facts["notAfter"]) for facts in context.get_ca_certs()]
    return [fault for end in ends for fault in _expiry(file, end, ahead)]


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)


def _expiry(file: Path, not_after: str, ahead: timedelta) -> list[str]:
    end, now = datetime.fromtimestamp(ssl.cert_time_to_seconds(not_after), UTC), datetime.now(UTC)
    if end > now + ahead:
        return []
    return [f"{file} {'has expired' if end < now else 'expires'} on {end:%Y-%m-%d}: renew it"]
