"""Events with fields, one JSON line each on standard error; never patient data."""

import logging
import sys

import structlog


def configure(role: str) -> None:
    """Write every event of this process as a JSON line with its role."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role)
    # pynetdicom and pydicom quote element values in their warnings: those may be patient data.
    for library in ("pynetdicom", "pydicom", "highdicom"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
