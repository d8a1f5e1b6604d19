"""Events with fields, one JSON line each on standard error; never patient data."""

import logging
import sys
import traceback
import warnings
from collections.abc import MutableMapping
from typing import Any

import structlog


def configure(role: str) -> None:
    """Write every event of this process as a JSON line with its role."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            place_of_exception,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role)
    # What the libraries log and warn of quotes element values: those may be patient data.
    warnings.simplefilter("ignore")
    for library in ("pynetdicom", "pydicom", "highdicom"):
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)


def place_of_exception(
    _logger: Any, _method: str, fields: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Replace an exception by its type and where it was raised: its message may quote a patient."""
    if fields.pop("exc_info", None):
        kind, _, trace = sys.exc_info()
        fields["exception"] = kind.__name__ if kind else "unknown"
        frames = traceback.extract_tb(trace)
        fields["raised_at"] = [f"{frame.filename}:{frame.lineno}" for frame in frames[-6:]]
    return fields
