"""vLLM's own log lines as JSON, like everybody else's; `logging.json` tells vLLM of it."""

import logging
from datetime import UTC, datetime

import msgspec

_encode = msgspec.json.Encoder().encode


class JsonFormatter(logging.Formatter):
    """One line, whatever is in the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The keys of `common/logs.py`, and the logger's name."""
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "event": record.getMessage(), "service": "engine", "logger": record.name,
        }  # fmt: skip
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line).decode()
