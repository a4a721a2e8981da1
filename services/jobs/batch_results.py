"""The results files of a running batch: on the disk before they are counted, whole after any crash."""

import json
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

from services.jobs.batch_input import Line

EXPIRED = {"code": "batch_expired", "message": "The batch's time was over before this ran."}

UNREADABLE = {"code": "unreadable_answer", "message": "The answer is not JSON, or did not come."}


class Result(NamedTuple):
    """An answered line, on its way to disk."""

    ok: bool
    row: dict[str, Any]


class Results:
    """The two results files of a running batch, and what is in them."""

    def __init__(self, good: Path, bad: Path) -> None:
        self._paths = {True: good, False: bad}
        self._waiting: dict[bool, list[Result]] = {True: [], False: []}
        self._writing = threading.Lock()
        self.ids: set[str] = set()
        self.completed = self.failed = 0
        self.usage: dict[str, int] = {"input_tokens": 0, "output_tokens": 0, "cached_tokens": 0}

    def recover(self) -> None:
        """Read what is there."""
        good, bad = (answered(self._paths[ok]) for ok in (True, False))
        self.ids = good["ids"] | bad["ids"]
        self.completed, self.failed = len(good["ids"]), len(bad["ids"])
        self.usage = good["usage"]

    def add(self, result: Result) -> None:
        """Take a result; `flush` brings it to disk."""
        self._waiting[result.ok].append(result)

    def flush(self) -> int:
        """Write what waits, to the disk itself. Returns how many results that were.

        Raises OSError; what could not be written waits for the next call.
        """
        written = 0
        with self._writing:  # a cancelled caller's thread may still be at it
            for ok, waiting in self._waiting.items():
                results = waiting[:]
                if not results:
                    continue
                append(self._paths[ok], "".join(json.dumps(result.row) + "\n" for result in results).encode())
                del waiting[:len(results)]
                written += len(results)
                self.completed += len(results) if ok else 0
                self.failed += 0 if ok else len(results)
                for result in results:
                    add_usage(self.usage, result.row)
        return written


def append(path: Path, data: bytes) -> None:
    """Add to a file, all or nothing, on the disk itself. Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        size_bytes, rest = file.tell(), memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest):]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size_bytes)
            raise


def row(
    batch_id: str, line: Line, *, response: dict[str, Any] | None = None, error: dict[str, str] | None = None
) -> dict[str, Any]:
    """A line of a results file."""
    return {
        "id": f"batch_req_{batch_id[6:]}_{line.number}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }


def answered(path: Path) -> dict[str, Any]:
    """What a results file holds after a crash: {"ids", "usage"}. A last line that was not written whole is cut off."""
    ids: set[str] = set()
    usage = {"input_tokens": 0, "output_tokens": 0, "cached_tokens": 0}
    good = 0
    if path.exists():
        with open(path, "rb") as file:
            for raw in file:
                try:
                    row = json.loads(raw) if raw.endswith(b"\n") else None
                except ValueError:
                    row = None
                if row is None:
                    break
                good += len(raw)
                ids.add(row["custom_id"])
                add_usage(usage, row)
        os.truncate(path, good)
    return {"ids": ids, "usage": usage}


def add_usage(total: dict[str, int], row: dict[str, Any]) -> None:
    """Add what one result cost."""
    used = ((row.get("response") or {}).get("body") or {}).get("usage") or {}
    total["input_tokens"] += used.get("prompt_tokens") or 0
    total["output_tokens"] += used.get("completion_tokens") or 0
    total["cached_tokens"] += ((used.get("prompt_tokens_details") or {}).get("cached_tokens")) or 0
