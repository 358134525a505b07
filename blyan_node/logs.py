"""Log lines on stderr, for people (console) or for machines (one JSON object a line), each with the node's id.

Modules log with ``logging.getLogger(__name__)`` and pass ids as ``extra={"session": ..., "block": ...}``; both forms
show them. Prompts and answers are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class Console(logging.Formatter):
    """``18:42:03 info  16Uiu2…kq9d  message  key=value``; a traceback follows on its own lines."""

    def __init__(self, node: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        message = record.getMessage() + "".join(f"  {key}={value}" for key, value in _extras(record).items())
        line = f"{self.formatTime(record, self.datefmt)} {record.levelname.lower():<7} {self._node}  {message}"
        return line if not record.exc_info else f"{line}\n{self.formatException(record.exc_info)}"


class Json(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, node, logger, message, extras, traceback."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "node": self._node,
            "logger": record.name,
            "message": record.getMessage(),
        } | _extras(record)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def start_logging(*, level: str, form: str, node: str, stream: TextIO | None = None) -> None:
    """Send our log lines from ``level`` up, and the libraries' warnings, to ``stream`` (stderr by default).

    ``form`` is ``console`` or ``json``; ``node`` a short form of the peer id. libp2p's own lines take the same form.
    Of those only errors are shown, and of its dials not even these: whoever dialled gets an exception, and reports it
    where it matters. All its warnings come with ``debug``.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Json(node) if form == "json" else Console(node))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("blyan_node").setLevel(level.upper())
    libp2p = logging.getLogger("libp2p")
    libp2p.propagate = True  # its import turns this off, and what then has no handler goes to stderr raw
    libp2p.setLevel(logging.WARNING if level == "debug" else logging.ERROR)
    logging.getLogger("libp2p.transport.tcp").setLevel(logging.NOTSET if level == "debug" else logging.CRITICAL)
