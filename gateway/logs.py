"""JSON lines on stdout, one event a line, through loguru.

Knows how a line looks. Never receives prompts, answers or keys: callers log ids and numbers.
"""

import sys
from typing import TYPE_CHECKING, Any

import msgspec
from loguru import logger

if TYPE_CHECKING:
    from loguru import Message

_encoder = msgspec.json.Encoder()


def _write(message: "Message") -> None:
    record = message.record
    line: dict[str, Any] = {
        "ts": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name.lower(),
        "event": record["message"],
        **record["extra"],
    }
    if (exception := record["exception"]) is not None and exception.type is not None:
        line["exception"] = f"{exception.type.__name__}: {exception.value}"
    sys.stdout.write(_encoder.encode(line).decode() + "\n")
    sys.stdout.flush()


def configure(service: str, level: str = "INFO") -> None:
    """Send every log line of this process to stdout as JSON, marked with the service's name."""
    logger.remove()
    logger.configure(extra={"service": service})
    logger.add(_write, level=level.upper(), backtrace=False, diagnose=False)
