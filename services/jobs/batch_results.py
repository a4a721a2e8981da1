"""The results of a running batch: rows, each line once, written together with the counts; at the end, files."""

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, insert, select
from sqlalchemy.exc import IntegrityError

from common.database import Database
from common.files import write_whole
from services.jobs import tables
from services.jobs.batch import Batch
from services.jobs.batch_input import Line
from services.jobs.leases import LeaseLost

EXPIRED = {"code": "batch_expired", "message": "The batch's time was over before this ran."}

UNREADABLE = {"code": "unreadable_answer", "message": "The answer is not JSON, or did not come."}

PAGE = 20
"""Rows read at once: one may have megabytes."""
NOTHING_USED = {"input_tokens": 0, "output_tokens": 0, "cached_tokens": 0}


class Result(NamedTuple):
    """An answered line, on its way to the database."""

    line: int
    good: bool
    row: str
    used: dict[str, int]

    @classmethod
    def of(cls, line: int, good: bool, row: dict[str, Any]) -> "Result":
        """From a line of a results file."""
        return cls(line, good, json.dumps(row), used_by(row))


class Results:
    """What a batch has answered so far. Written under the lease `token`: whoever lost it writes nothing."""

    def __init__(self, database: Database, batch: Batch, token: str) -> None:
        self._database, self._id, self._token = database, batch.id, token
        self._waiting: list[Result] = []
        self._writing = threading.Lock()
        self.completed, self.failed = batch.completed, batch.failed
        self.usage = batch.usage or NOTHING_USED
        self.waiting_bytes = 0
        """Of results that are not in the database yet."""

    @property
    def waiting(self) -> int:
        """How many are not in the database yet."""
        return len(self._waiting)

    def lines(self) -> set[int]:
        """Numbers of the lines that are answered. Blocks; raises DatabaseAway."""
        table = tables.batch_results.c
        query = select(table.line).where(table.batch_id == self._id)
        return self._database.transact(lambda c: set(c.execute(query).scalars()))

    def add(self, result: Result) -> None:
        """Take a result; `flush` brings it to the database."""
        self._waiting.append(result)
        self.waiting_bytes += len(result.row)

    def flush(self) -> int:
        """Write what waits, and the counts with it. Blocks. Returns how many results that were.

        Raises DatabaseAway: what could not be written waits for the next call; LeaseLost.
        """
        with self._writing:  # a cancelled caller's thread may still be at it
            results = self._waiting[:]
            if not results:
                return 0
            good = sum(result.good for result in results)
            completed, failed = self.completed + good, self.failed + len(results) - good
            usage = {kind: count + sum(r.used[kind] for r in results) for kind, count in self.usage.items()}
            rows = [{"batch_id": self._id, "line": r.line, "good": r.good, "row": r.row} for r in results]

            def write(c: Connection) -> None:
                counts: dict[str, Any] = {"completed": completed, "failed": failed, "usage": usage, "attempts": 1}
                states = ("in_progress", "cancelling", "finalizing")
                if tables.move(c, tables.batches, self._id, states, self._token, **counts) != "ok":
                    raise LeaseLost(self._id)
                c.execute(insert(tables.batch_results), rows)

            try:
                self._database.transact(write)
            except IntegrityError:  # an earlier try was committed, and its answer lost
                self._catch_up()
                return 0
            del self._waiting[:len(results)]
            self.waiting_bytes -= sum(len(result.row) for result in results)
            self.completed, self.failed, self.usage = completed, failed, usage
            return len(results)

    def _catch_up(self) -> None:
        written = self.lines()
        now = self._database.transact(lambda c: tables.find(c, tables.batches, Batch, self._id))
        assert now is not None  # noqa: S101 - its results are there
        self._waiting = [result for result in self._waiting if result.line not in written]
        self.waiting_bytes = sum(len(result.row) for result in self._waiting)
        self.completed, self.failed, self.usage = now.completed, now.failed, now.usage

    def write_file(self, good: bool, target: Path) -> int:
        """The answered, or the failed, lines in order, as a file. Blocks. Returns its bytes; 0: there is none."""
        if not (self.completed if good else self.failed):
            return 0
        return write_whole(self._rows(good), target)

    def _rows(self, good: bool) -> Iterator[bytes]:
        table, last = tables.batch_results.c, -1
        ours = select(table.line, table.row).where(table.batch_id == self._id, table.good == good)
        while found := self._page(ours.where(table.line > last).order_by(table.line).limit(PAGE)):
            yield from (row.row.encode() + b"\n" for row in found)
            last = found[-1].line

    def _page(self, query: Select[Any]) -> Sequence[Any]:
        return self._database.transact(lambda c: c.execute(query).all())


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


def used_by(row: dict[str, Any]) -> dict[str, int]:
    """What one result has cost."""
    used = ((row.get("response") or {}).get("body") or {}).get("usage") or {}
    details = used.get("prompt_tokens_details") or used.get("input_tokens_details") or {}
    return {
        "input_tokens": used.get("prompt_tokens") or used.get("input_tokens") or 0,
        "output_tokens": used.get("completion_tokens") or used.get("output_tokens") or 0,
        "cached_tokens": details.get("cached_tokens") or 0,
    }
