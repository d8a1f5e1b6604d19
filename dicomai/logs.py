"""Events with fields, one JSON line each on standard error; never patient data."""

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any

import structlog

log = structlog.get_logger()

ExcInfo = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


def configure(role: str) -> None:
    """Write every event of this process as a JSON line with its role; what nobody caught, too."""
    structlog.configure(
        processors=[
            lambda _logger, _method, fields: {**fields, "role": role},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            place_of_exception,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What the libraries log and warn of quotes element values: those may be patient data.
    warnings.simplefilter("ignore")
    for library in ("pynetdicom", "pydicom", "highdicom"):
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    if not any(isinstance(handler, _Place) for handler in logging.root.handlers):
        logging.root.addHandler(_Place(logging.WARNING))
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable


def place_of_exception(
    _logger: Any, _method: str, fields: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Replace an exception by its type and where it was raised: its message may quote a patient.

    exc_info: that of sys.exc_info(), or true for the one that is being handled.
    """
    given = fields.pop("exc_info", None)
    if given:
        kind, _, trace = given if isinstance(given, tuple) else sys.exc_info()
        fields["exception"] = kind.__name__ if kind else "unknown"
        frames = traceback.extract_tb(trace)
        fields["raised_at"] = [f"{frame.filename}:{frame.lineno}" for frame in frames[-6:]]
    return fields


class _Place(logging.Handler):
    """Says that a library had something to say, and where; never what."""

    def emit(self, record: logging.LogRecord) -> None:
        """One event for a record."""
        place = f"{record.pathname}:{record.lineno}"
        log.warning("library", library=record.name, severity=record.levelname, logged_at=place)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("uncaught", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:  # a thread may end itself
        return
    name = args.thread.name if args.thread else "unknown"
    found: ExcInfo = (args.exc_type, args.exc_value, args.exc_traceback)
    log.critical("uncaught", thread=name, exc_info=found)


def _unraisable(args: "sys.UnraisableHookArgs") -> None:
    # Not its object either: a repr may quote anything.
    log.error("unraisable", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))
